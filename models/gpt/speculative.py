"""Speculative generation: few loops draft, the decoder's own policy verifies all drafts in one pass.

Self-speculation (arXiv 2404.16710 drafts with a model's own early layers; here its own early loops do). A draft is kept
if it is the token that the verifying pass chooses at its place with that place's noise, so the text is the one that the
decoder alone would give: at temperature 0 and when sampling. What can differ is rounding: rows that are computed
together are summed in another order than one row alone, so two tokens that are tied to the last digits may change
places (:class:`~haltkit.models.gpt.sampling.Sampling` says how often).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from haltkit import signals
from haltkit.front import Committed
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.sampling import GenerationError, Sampling
from haltkit.models.gpt.wavefront import Wavefront
from haltkit.policies import Fixed
from haltkit.specs import Policies

__all__ = ["Drafter", "Speculation", "by_shallow_steps", "by_wavefront", "check_speculation"]

# From a final token and how many drafts to drafts for the positions after it; fewer where a draft cannot be made. What
# it leaves in the cache behind the text is overwritten.
Drafter = Callable[[int, int], list[int]]


def check_speculation(layout: str, ahead: int) -> None:
    """Refuse what cannot be verified in one pass.

    Raises:
        GenerationError: no drafts, or a layout in which positions that are computed together read each other otherwise
            than one after the other.
    """
    if ahead < 1:
        raise GenerationError(f"ahead={ahead}: at least 1 draft is made before a pass verifies it")
    if layout != "depth-indexed":
        raise GenerationError(
            f"layout={layout} cannot verify drafts in one pass, as later positions must read earlier ones' steps: use "
            "layout=depth-indexed"
        )


def by_shallow_steps(decoder: Decoder, policy: Policies, sampling: Sampling, stop: frozenset[int]) -> Drafter:
    """Drafts one token after the other under a policy of few steps, which reads the cache of final positions.

    Raises:
        GenerationError, ValueError: a policy that cannot decode.
    """
    shallow = decoder.under(policy)
    depths = {name: one.steps for name, one in shallow.policies.items() if isinstance(one, Fixed)}
    fixed = (
        depths if len(depths) == len(shallow.policies) else None
    )  # what breaks in a draft is seen when it is verified

    def draft(token: int, count: int) -> list[int]:
        shallow.lengths, found = list(decoder.lengths), []
        for _ in range(count):
            newest = torch.tensor([token], device=decoder.device)
            logits = shallow.step(newest).logits if fixed is None else shallow.step_fixed(newest, fixed)
            if not bool(signals.finite(logits)):
                break
            token = int(sampling.pick(logits, shallow.lengths))
            found.append(token)
            if token in stop:
                break
        return found

    return draft


def by_wavefront(wavefront: Wavefront, sampling: Sampling, stop: frozenset[int]) -> Drafter:
    """Drafts the tokens that a wavefront commits, and then those of the positions that are open at that time."""

    def draft(token: int, count: int) -> list[int]:
        committed = wavefront.tokens(token, count, sampling=sampling, stop=stop)
        found: list[int] = []
        for one in committed:
            if one.token is None:
                break
            found.append(one.token)
            if len(found) + len(wavefront.drafts) >= count:  # verifying them costs little, and waiting for them much
                return [*found, *wavefront.drafts][:count]
        return found

    return draft


class Speculation:
    """Continues one text whose prompt a :class:`~haltkit.models.gpt.decoding.Decoder` has taken.

    Args:
        decoder: of one sequence; its policies verify.
        drafter: makes drafts.
        ahead: how many are made before they are verified.

    Attributes:
        verified: passes that verified drafts.
        drafted, accepted: drafts that were made, and those that were kept.
    """

    def __init__(self, decoder: Decoder, drafter: Drafter, *, ahead: int) -> None:
        check_speculation(decoder.layout.name, ahead)
        self.decoder, self.drafter, self.ahead = decoder, drafter, ahead
        self.verified = self.drafted = self.accepted = 0

    @torch.inference_mode()
    def tokens(
        self, first: int, count: int, *, sampling: Sampling, stop: frozenset[int] = frozenset()
    ) -> Iterator[Committed]:
        """The tokens that follow ``first``, each as soon as it is verified: ``count`` of them, or up to a stop token.

        Args:
            first: the prompt's next token, which is final.
            sampling: of this sequence.
        """
        token, done = first, 0
        while done < count:
            ahead = min(self.ahead, count - done - 1)
            drafts = self.drafter(token, ahead) if ahead else []
            given = torch.tensor([token, *drafts], device=self.decoder.device)
            seen = self.decoder.extend(given)
            chosen, sound = self._choose(seen.logits, sampling)
            kept = _agreed(drafts, chosen, sound)
            self.verified += 1
            self.drafted += len(drafts)
            self.accepted += kept
            steps = {name: taken.tolist() for name, taken in seen.steps.items()}
            self.decoder.rewind(len(drafts) - kept)
            for row in range(kept + 1):
                if not sound[row]:
                    yield Committed(None, {name: taken[row] for name, taken in steps.items()})
                    return
                token, done = chosen[row], done + 1
                yield Committed(token, {name: taken[row] for name, taken in steps.items()})
                if token in stop:
                    return

    def _choose(self, logits: Tensor, sampling: Sampling) -> tuple[list[int], list[bool]]:
        """The token after each of the newest positions, and whether its logits are finite."""
        [end] = self.decoder.lengths
        sound = signals.finite(logits)
        chosen = sampling.pick(logits.masked_fill(~sound.unsqueeze(-1), 0.0), range(end - len(logits) + 1, end + 1))
        return chosen.tolist(), sound.tolist()


def _agreed(drafts: Sequence[int], chosen: Sequence[int], sound: Sequence[bool]) -> int:
    """How many first drafts are the token that was chosen at their place."""
    for row, draft in enumerate(drafts):
        if not sound[row] or draft != chosen[row]:
            return row
    return len(drafts)
