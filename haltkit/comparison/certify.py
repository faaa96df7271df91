"""Certify a policy's threshold on a subject: live runs, one loss per sequence, and what can be promised from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from haltkit.calibration import Certificate, calibrate
from haltkit.calibration.certificate import Method
from haltkit.calibration.conditional import Asked
from haltkit.comparison.by_region import joint_path
from haltkit.comparison.by_step import certify_by_step, spec_by_step
from haltkit.comparison.live import Live, Ran, Risk, halts_together
from haltkit.comparison.possible import Possible, possible_if_known
from haltkit.comparison.settings import Given, Sweeps, candidates
from haltkit.driving import Look
from haltkit.protocol import Readout, granularity_of
from haltkit.recording.replay import replay
from haltkit.setting import Setting
from haltkit.specs import UnprintablePolicy, packed
from haltkit.standing import PLAIN, Standing
from haltkit.subject import Subject

__all__ = ["By", "Certified", "Risk", "certify", "check_asked"]

By = Literal["step", "region"]
CHOOSERS = 8  # one sample of so many finds the path through the thresholds of regions
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
    by: By | None = None,
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

    Thresholds by region are a path through those of all regions, found on the first eighth of the samples
    (:func:`haltkit.comparison.by_region.joint_path`) and tested on the others in its order. Thresholds by step are
    proposed by one half of the samples, drawn at random, and tested on the other
    (:func:`haltkit.comparison.by_step.certify_by_step`): then the risk is at most epsilon among what halts by step t,
    for every step t.

    Args:
        subject: at least two samples; every sequence of the second and later ones is a unit, or every such sample where
            a policy halts whole batches: sequences that halt together are not independent.
        policy: one policy, with its threshold open or given, or a card.
        risk: ``disagreement`` and ``loss-gap`` are against full depth, ``answer`` is against the labels: it needs a
            loss that is 0 or 1.
        epsilon, delta, method, seed: see :func:`haltkit.calibration.calibrate`.
        by: a threshold for each ``step`` or each ``region``; None: one.
        taus: ``auto``, from the scores on the first sample at most depths, or the thresholds to test.
        loss_bound: where ``loss-gap`` is cut; 1 for the others.
        on_setting: told of every setting before it is run.

    Raises:
        ValueError: an unknown risk or method, a negative seed, several policies, fewer than two samples, logits or
            labels that the subject lacks, a loss outside [0, 1] as an ``answer``, or epsilon or delta outside their
            range; by step, several regions, a policy without an open threshold, rows that halt one by one without
            losses of their own, or ``conformal``.
    """
    check_asked(risk, method, seed, by)
    if len(subject.samples) < 2:
        raise ValueError(
            "the first sample is used to choose thresholds, so a calibration needs at least two: give more sequences "
            "(--sequences), or make smaller samples of them (--batch)"
        )
    if risk == "disagreement" and subject.logits is None:
        raise ValueError(f"{subject.name} has no logits, so nothing can be said about disagreement: use loss-gap")
    if risk == "answer" and subject.unit != "wrong":
        raise ValueError(
            f"the answer risk needs labels, by which the loss is right or wrong, and that of {subject.name} is "
            f"{subject.metric}: give the Subject such a loss and unit='wrong', or use disagreement or loss-gap"
        )
    bound = loss_bound if risk == "loss-gap" else 1.0
    told = on_setting or (lambda _: None)
    looked = replace(subject, samples=subject.samples[:1])
    look = looked.look()
    depths = sorted({*range(2, min(look.full_depth, 16) + 1), *range(20, look.full_depth + 1, 4)})
    dense = replace(subject, target_steps=tuple(depths))
    given = candidates(policy if isinstance(policy, str) else [policy], subject)
    if len(given) != 1:
        raise ValueError(f"{len(given)} policies: a certificate is about one, so give one")
    sweeps = Sweeps.on(dense, look, taus)
    measured = _RISKS[risk].format(item=subject.item, metric=subject.metric, bound=bound)

    def live_on(samples: Sequence[Any]) -> Live:
        return Live.of(subject, samples, look.full_depth, risk, bound)

    if by == "step":
        spec = spec_by_step(given[0], sweeps)
        order = np.random.default_rng(seed).permutation(len(subject.samples)).tolist()
        halves = [[subject.samples[i] for i in part] for part in (order[: len(order) // 2], order[len(order) // 2 :])]
        asked = Asked(epsilon, delta, method, measured, loss_bound=bound, seed=seed)
        certificate, ran, live = certify_by_step(spec, sweeps, (halves[0], halves[1]), live_on, asked, told)
    else:
        if by == "region":
            choosing = max(1, len(subject.samples) // CHOOSERS)
            settings = joint_path(given[0], sweeps, live_on(subject.samples[:choosing]), told)
        else:
            choosing, settings = 1, _from_the_safest(sweeps.settings(given[0]), look, sweeps.readout)
        live = live_on(subject.samples[choosing:])
        together = any(map(_together, settings))
        record = partial(
            calibrate,
            epsilon=epsilon,
            delta=delta,
            method=method,
            risk=measured,
            loss_bound=bound,
            unit=live.unit(together),
            loss=live.loss,
            seed=seed,
        )
        certificate, ran = _in_sequence(settings, live, together, record, told)
    if ran is None:
        return Certified(certificate, None, {}, look.full_depth, standing=given[0].standing)
    headroom, _ = possible_if_known(replace(looked, full_depth=look.full_depth))
    times = live.ms(ran), live.ms(live.full)
    return Certified(
        certificate, ran.setting, dict(ran.steps), look.full_depth, *times, headroom, standing=given[0].standing
    )


def _in_sequence(
    settings: Sequence[Setting],
    live: Live,
    together: bool,
    record: Callable[..., Certificate],
    on_setting: Callable[[Setting], None],
) -> tuple[Certificate, Ran | None]:
    """Run settings live in the order of their test until one fails; the certificate, and the run that it chose."""
    columns: list[Tensor] = []
    runs: list[Ran] = []
    for setting in settings:
        on_setting(setting)
        ran = live.run(setting)
        columns.append(live.by_unit(ran, together))
        runs.append(ran.summary())
        certificate = record(torch.stack(columns, 1), settings=[_named(one.setting) for one in runs])
        if certificate.chosen != len(columns) - 1:
            break
    return certificate, None if certificate.chosen is None else runs[certificate.chosen]


def _together(setting: Setting) -> bool:
    """Whether whole batches halt in any region."""
    return any(halts_together(granularity_of(one)) for one in setting.policies.values())


def check_asked(risk: str, method: str, seed: int, by: str | None = None) -> None:
    """Check what :func:`certify` is asked for, as far as that takes no subject.

    Raises:
        ValueError: an unknown risk, method or kind of threshold, a negative seed, or thresholds by step by a method
            that has no p-values.
    """
    for name, asked, allowed in (("risk", risk, get_args(Risk)), ("method", method, get_args(Method))):
        if asked not in allowed:
            raise ValueError(f"{name}={asked!r}: allowed are {', '.join(allowed)}")
    if by is not None and by not in get_args(By):
        raise ValueError(f"by={by!r}: allowed are {', '.join(get_args(By))}")
    if by == "step" and method == "conformal":
        raise ValueError("conformal has no p-values, which thresholds by step need: use another method")
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
