"""What halting loses on a unit: one number per sequence, in ``[0, bound]``. Calibration and spot checks share these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["LOSSES", "Judged", "Loss", "as_losses", "lost"]

# disagreement-anywhere: of sequences that are right or wrong as a whole.
Loss = Literal["disagreement", "disagreement-anywhere", "loss-gap", "answer"]
LOSSES: tuple[Loss, ...] = get_args(Loss)


@dataclass(frozen=True)
class Judged:
    """What is kept of one pass over ``B`` sequences.

    Attributes:
        losses: ``(B,)`` or ``(B, ...)``; None: not needed.
        tops: top predictions, ``(B, ...)`` int64; None: not needed, or there are no logits.
    """

    losses: Tensor | None = None
    tops: Tensor | None = None


def lost(loss: Loss, bound: float, halted: Judged, full: Judged) -> Tensor:
    """What halting lost on each sequence, ``(B,)`` float64 in ``[0, bound]``.

    Args:
        loss: ``disagreement``: the share of positions with another top prediction than at full depth;
            ``disagreement-anywhere``: 1 where there is any; ``loss-gap``: the mean loss above full depth's, cut to the
            range; ``answer``: the mean loss itself.
        bound: the largest possible loss.
        halted, full: the same sequences under the policy and at full depth.

    Raises:
        ValueError: an unknown loss, predictions of other shapes, or something that it needs was not kept.
    """
    if loss in ("disagreement", "disagreement-anywhere"):
        if halted.tops is None or full.tops is None:
            raise ValueError(f"{loss} is told by top predictions, and there are no logits")
        if halted.tops.shape != full.tops.shape:
            raise ValueError(
                f"the halted run predicts {tuple(halted.tops.shape)} and full depth {tuple(full.tops.shape)}: they "
                "cannot be compared. Watch a call that gives as many predictions both times, such as a forward pass"
            )
        differ = (halted.tops != full.tops).reshape(len(full.tops), -1).double()
        return differ.amax(1) if loss == "disagreement-anywhere" else differ.mean(1)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: known are {', '.join(LOSSES)}")
    each = _by_sequence(halted.losses, loss)
    return each if loss == "answer" else (each - _by_sequence(full.losses, loss)).clamp(0.0, bound)


def _by_sequence(losses: Tensor | None, loss: Loss) -> Tensor:
    if losses is None:
        raise ValueError(f"{loss} is told by losses, and there are none")
    return losses.double().reshape(len(losses), -1).mean(1)


def as_losses(value: Any) -> Tensor:
    """What a user's loss gave, as ``(B,)`` or ``(B, ...)`` without gradients; a number is that of a single sequence.

    Raises:
        ValueError: neither a number nor a tensor of numbers, or not finite.
    """
    if isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor):
        raise ValueError(f"the loss must be a number or a tensor of them, less being better; got {type(value)}")
    if not bool(value.isfinite().all()):
        raise ValueError("the loss is not finite: nothing can be compared by it")
    return value.detach().reshape(1) if value.ndim == 0 else value.detach()
