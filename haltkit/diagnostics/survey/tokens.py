"""One window token by token: the steps each took under each policy, and its signals over the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from haltkit.diagnostics.numbers import Numbers, rounded
from haltkit.diagnostics.results import Tokens
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.specs import Policies
from haltkit.subject import Subject

__all__ = ["survey_tokens", "text_of"]


def text_of(subject: Subject, ids: Tensor) -> tuple[str, ...]:
    """The text of each token ``(T,)``, or its number where the subject has no text."""
    return tuple(subject.tokens(ids) if subject.tokens is not None else [str(int(i)) for i in ids])


@torch.no_grad()
def survey_tokens(
    subject: Subject, window: Tensor, policies: Sequence[str] | Mapping[str, Policies], loops: int = 32
) -> Tokens:
    """One window token by token: the steps each took under each policy, and its signals over the loop.

    Args:
        window: inputs ``(T,)``.
        policies: specs, or policies by the names that they are shown by; one that looks at logits is skipped where the
            subject has no readout.
        loops: the depth of the recording and the budget of the policies.

    Returns:
        tokens whose steps are ``native``, or ``replayed``: exact only where rows do not look at each other.
    """
    trajectory = subject.record(window[None], loops)
    steps, left_out = {}, {}
    named = policies if isinstance(policies, Mapping) else dict(zip(policies, policies, strict=True))
    for shown, policy in named.items():
        try:
            taken = subject.halted(window[None], policy, loops)
        except ValueError as error:
            left_out[shown] = str(error)
            continue
        steps[shown] = {name: tuple(int(v) for v in values.flatten()) for name, values in taken.items()}
    return Tokens(
        text_of(subject, window),
        loops,
        {name: _curves(region) for name, region in trajectory.regions.items()},
        steps,
        "native" if subject.halts_itself else "replayed",
        left_out,
    )


def _curves(region: RegionTrajectory) -> dict[str, tuple[Numbers, ...]]:
    found = {
        "step_norm": region.step_norms(),
        "acceleration": region.accelerations(),
        "cosine": region.step_angles(),
    }
    return {
        key: tuple(tuple(rounded(v, 3) for v in row) for row in values.flatten(1).T) for key, values in found.items()
    }
