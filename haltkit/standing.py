"""What stands behind a policy where it runs: the promise of its card's certificate, or that it runs without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CERTIFICATE", "MODEL", "PLAIN", "Standing"]

# What of a card a user can do without: what is promised on its model, or that it is for one model alone.
CERTIFICATE, MODEL = "its certificate", "the check of its model"


@dataclass(frozen=True)
class Standing:
    """What every output says of a policy that came from a card.

    Attributes:
        promise: what a certificate about this very model promises; empty: nothing is promised.
        bound: whether the card is for this very model, and for no other.
        without: what of the card its user does without, ``CERTIFICATE`` or ``MODEL``; empty: the card is used whole.
        differences: from the model that the card is about, in words.
    """

    promise: str = ""
    bound: bool = False
    without: str = ""
    differences: tuple[str, ...] = ()

    @classmethod
    def waived(cls, what: str, differences: Sequence[str] = ()) -> Standing:
        """Of a card that is used without ``what``, on a model that differs like this from its own."""
        return cls(without=what, differences=tuple(differences))

    def __str__(self) -> str:
        """One line for outputs; empty where there is nothing to say."""
        if self.without:
            known = f" ({'; '.join(self.differences)})" if self.differences else ""
            return f"used without {self.without}{known}: nothing is promised"
        return f"certified: {self.promise}" if self.promise else ""

    def mark(self, name: str) -> str:
        """A name of the policy that says what it is used without: for tables, legends and titles."""
        return f"{name} (without {self.without})" if self.without else name


PLAIN = Standing()  # of a policy that is not from a card, or from one for any model
