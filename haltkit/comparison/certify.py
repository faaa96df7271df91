"""Certify a policy's threshold on a subject: live runs, one loss per sequence, and what can be promised from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from haltkit import timing
from haltkit.calibration import Certificate, calibrate
from haltkit.calibration.certificate import Method
from haltkit.comparison.possible import Possible, possible_if_known
from haltkit.comparison.settings import Given, Sweeps, candidates
from haltkit.driving import Look, Pass
from haltkit.protocol import Readout, granularity_of
from haltkit.recording.replay import replay
from haltkit.setting import Setting
from haltkit.specs import UnprintablePolicy, packed
from haltkit.standing import PLAIN, Standing
from haltkit.subject import Subject

__all__ = ["Certified", "Risk", "certify", "check_asked"]

Risk = Literal["disagreement", "loss-gap", "answer"]
_RISKS: dict[Risk, str] = {
    "disagreement": "share of {item}s whose top prediction is another than at full depth",
    "loss-gap": "{metric} above full depth's, cut to [0, {bound:g}]",
    "answer": "share of wrong {item}s",
}


@dataclass(frozen=True)
class Certified:
    """What a calibration on live runs found.

    Attributes:
        certificate: with the settings that were run, from the safest to the most eager; the last is the first that
            failed, if one did.
        setting: the certified one; None where nothing is certified.
        steps: mean steps of the certified setting by region, on the calibration units.
        full_depth: steps of full depth.
        ms: its wall-clock milliseconds per item of the subject on the calibration units, one run; None without one.
        full_ms: the same at full depth.
        headroom: of the sample that chose the thresholds, by region; empty where it is not known.
        standing: of the policy that was given, where it came from a card.
    """

    certificate: Certificate
    setting: Setting | None
    steps: dict[str, float]
    full_depth: int
    ms: float | None = None
    full_ms: float | None = None
    headroom: Mapping[str, Possible] = field(default_factory=dict)
    standing: Standing = PLAIN

    @property
    def time(self) -> float | None:
        """The certified setting's time over full depth's; None without a setting."""
        return None if self.ms is None or self.full_ms is None else self.ms / self.full_ms


@torch.no_grad()
def certify(
    subject: Subject,
    policy: Given,
    *,
    risk: Risk = "disagreement",
    epsilon: float,
    delta: float,
    taus: str | Sequence[float] = "auto",
    method: Method = "betting",
    loss_bound: float = 1.0,
    seed: int = 0,
    on_setting: Callable[[Setting], None] | None = None,
) -> Certified:
    """Find the most eager threshold whose risk is at most epsilon with probability 1 - delta.

    The thresholds are chosen on the first sample, which is then not used any more. The others are run live at full
    depth and at one threshold after the other, from the smallest, until one fails. Settings without a single threshold
    (``stable``, or a policy per region) come in the order of the steps that they take on the first sample, the most
    first.

    Args:
        subject: at least two samples; every sequence of the second and later ones is a unit, or every such sample where
            a policy halts whole batches: sequences that halt together are not independent.
        policy: one policy, with its threshold open or given, or a card.
        risk: ``disagreement`` and ``loss-gap`` are against full depth, ``answer`` is against the labels: it needs a
            loss that is 0 or 1.
        epsilon, delta, method, seed: see :func:`haltkit.calibration.calibrate`.
        taus: ``auto``, from the scores on the first sample at most depths, or the thresholds to test.
        loss_bound: where ``loss-gap`` is cut; 1 for the others.
        on_setting: told of every setting before it is run.

    Raises:
        ValueError: an unknown risk or method, a negative seed, several policies, fewer than two samples, logits or
            labels that the subject lacks, a loss outside [0, 1] as an ``answer``, or epsilon or delta outside their
            range.
    """
    check_asked(risk, method, seed)
    if len(subject.samples) < 2:
        raise ValueError(
            "the first sample is used to choose thresholds, so a calibration needs at least two: give more sequences "
            "(--sequences), or make smaller samples of them (--batch)"
        )
    if risk == "disagreement" and subject.logits is None:
        raise ValueError(f"{subject.name} has no logits, so nothing can be said about disagreement: use loss-gap")
    if risk == "answer" and subject.unit != "wrong":
        raise ValueError(f"the loss of {subject.name} is in {subject.unit}, not right or wrong: there are no labels")
    bound = loss_bound if risk == "loss-gap" else 1.0
    chosen_on, samples = subject.samples[:1], subject.samples[1:]
    look = replace(subject, samples=chosen_on).look()
    depths = sorted({*range(2, min(look.full_depth, 16) + 1), *range(20, look.full_depth + 1, 4)})
    dense = replace(subject, target_steps=tuple(depths))
    given = candidates(policy if isinstance(policy, str) else [policy], subject)
    if len(given) != 1:
        raise ValueError(f"{len(given)} policies: a certificate is about one, so give one")
    sweeps = Sweeps.on(dense, look, taus)
    settings = _from_the_safest(sweeps.settings(given[0]), look, sweeps.readout)
    run = partial(_run, subject, samples)
    full_seconds, full = timing.clock(lambda: run(Setting.of(look.full_depth, subject.regions)))
    # Sequences that halt together are not independent: what halts as one counts as one.
    policies = [one for setting in settings for one in setting.policies.values()]
    together = any(granularity_of(one) == "batch" for one in policies)
    lost = partial(_losses, subject, risk, bound, together, full)
    record = partial(
        calibrate,
        epsilon=epsilon,
        delta=delta,
        method=method,
        risk=_RISKS[risk].format(item=subject.item, metric=subject.metric, bound=bound),
        loss_bound=bound,
        unit="batch" if together and any(len(losses) > 1 for _, losses, _ in full) else "sequence",
        seed=seed,
    )
    columns: list[Tensor] = []
    steps: list[dict[str, float]] = []
    times: list[float] = []
    for setting in settings:
        if on_setting is not None:
            on_setting(setting)
        seconds, passes = timing.clock(partial(run, setting))
        times.append(seconds)
        columns.append(lost(passes))
        steps.append(_mean_steps(setting, passes))
        tried = [_named(one) for one in settings[: len(columns)]]
        certificate = record(torch.stack(columns, 1), settings=tried)
        if certificate.chosen != len(columns) - 1:
            break
    chosen = certificate.chosen
    if chosen is None:
        return Certified(certificate, None, {}, look.full_depth, standing=given[0].standing)
    headroom, _ = possible_if_known(replace(subject, samples=chosen_on, full_depth=look.full_depth))
    items = sum(losses.numel() for _, losses, _ in full)
    ms, full_ms = (1e3 * seconds / items for seconds in (times[chosen], full_seconds))
    found = Certified(certificate, settings[chosen], steps[chosen], look.full_depth, ms, full_ms, headroom)
    return replace(found, standing=given[0].standing)


def check_asked(risk: str, method: str, seed: int) -> None:
    """Check what :func:`certify` is asked for, as far as that takes no subject.

    Raises:
        ValueError: an unknown risk or method, or a negative seed.
    """
    for name, asked, allowed in (("risk", risk, get_args(Risk)), ("method", method, get_args(Method))):
        if asked not in allowed:
            raise ValueError(f"{name}={asked!r}: allowed are {', '.join(allowed)}")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")


def _from_the_safest(settings: list[Setting], look: Look, readout: Readout | None) -> list[Setting]:
    """Settings in the order of their test: thresholds as they are, others by their steps on the recording."""
    if len(settings) < 2 or all(setting.tau is not None for setting in settings):
        return settings

    def steps(setting: Setting) -> float:
        taken = (
            replay(setting.policies[name], region, readout=readout).steps for name, region in look.recordings[0].items()
        )
        return sum(float(one.double().mean()) for one in taken)

    return sorted(settings, key=steps, reverse=True)


def _named(setting: Setting) -> str:
    """A setting in a certificate, as the card beside it says it."""
    try:
        return packed(setting.policies)[0]
    except UnprintablePolicy:
        return setting.label


def _run(subject: Subject, samples: Sequence[Any], setting: Setting) -> list[tuple[Pass, Tensor, Tensor | None]]:
    """Each sample's pass, losses and top predictions; logits are not kept."""
    kept = []
    with subject.using(setting) as run:
        for sample in samples:
            done = run(sample)
            tops = None if subject.logits is None else subject.logits(done.output).argmax(-1)
            kept.append((replace(done, output=None), subject.losses(done.output, sample), tops))
    return kept


def _losses(
    subject: Subject,
    risk: Risk,
    bound: float,
    together: bool,
    full: Sequence[tuple[Pass, Tensor, Tensor | None]],
    passes: Sequence[tuple[Pass, Tensor, Tensor | None]],
) -> Tensor:
    """One loss per sequence, or one per sample where its sequences halt together; in [0, bound]."""
    found = []
    for (_, losses, tops), (_, full_losses, full_tops) in zip(passes, full, strict=True):
        if risk == "disagreement":
            assert tops is not None  # certify refuses a subject without logits
            assert full_tops is not None
            differ = (tops != full_tops).reshape(len(tops), -1).double()
            each = differ.amax(1) if subject.granularity == "sequence" else differ.mean(1)
        else:
            each = losses.double().reshape(len(losses), -1).mean(1)
            if risk == "loss-gap":
                each = (each - full_losses.double().reshape(len(losses), -1).mean(1)).clamp(0.0, bound)
        found.append(each.mean(0, keepdim=True) if together else each)
    return torch.cat(found).cpu()


def _mean_steps(setting: Setting, passes: Sequence[tuple[Pass, Tensor, Tensor | None]]) -> dict[str, float]:
    if setting.depth is not None:
        return {name: float(steps) for name, steps in setting.depth.steps.items()}
    names = passes[0][0].steps
    return {name: float(torch.cat([p.steps[name].flatten() for p, _, _ in passes]).double().mean()) for name in names}
