"""One setting on all samples of a subject: its mean loss and steps, untimed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from haltkit.setting import Setting
from haltkit.subject import Subject

__all__ = ["Evaluated", "evaluate"]


@dataclass(frozen=True)
class Evaluated:
    """One setting on all samples.

    Attributes:
        loss: mean over the items, in the subject's unit.
        steps: mean steps per item, by region.
        items: how many.
    """

    loss: float
    steps: dict[str, float]
    items: int


@torch.no_grad()
def evaluate(subject: Subject, setting: Setting) -> Evaluated:
    """Mean loss and steps at one setting; every item counts the same.

    Raises:
        ValueError: the subject has no samples, or its loss is not finite.
    """
    if not subject.samples:
        raise ValueError(f"{subject.name} has no samples to evaluate it on")
    total, items = 0.0, 0
    steps = dict.fromkeys(subject.regions, 0.0)
    told = {} if setting.depth is None else setting.depth.steps
    with subject.using(setting) as run:
        for sample in subject.samples:
            done = run(sample)
            losses = subject.losses(done.output, sample)
            for name in steps:
                mean = float(done.steps[name].double().mean()) if name in done.steps else told[name]
                steps[name] += mean * losses.numel()
            total += float(losses.double().sum())
            items += losses.numel()
    return Evaluated(total / items, {name: count / items for name, count in steps.items()}, items)
