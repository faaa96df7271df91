"""Does the promise of a certificate hold on real models? 1,000 calibrations on what live runs of them have lost.

    python examples/bench_recorded_calibration.py [--models chase text] [--units 1024] [--splits 1000]

A policy is run live on many sequences at full depth and at each of a few thresholds, and the share of each sequence's
rows whose top prediction is another than at full depth is kept. These losses are the population: the true risk of every
threshold is their mean. Each calibration draws ``--draws`` sequences from it, with replacement, so the draws are
independent and the truth is known; it is broken if the true risk of the threshold that it certifies is above epsilon.
Epsilon is set just below the true risk of one threshold, where that is likeliest. ``saving``: steps saved by the
certified threshold over those saved by the best threshold in hindsight, target 0.7; what may be broken is delta plus
three standard errors of the simulation. The two rows below show what goes wrong without the rules.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from haltkit.calibration import calibrate
from haltkit.models.checkpoint import BUNDLED
from haltkit.models.gpt.subject import checkpoint_subject as text_subject
from haltkit.models.reasoner.subject import checkpoint_subject as reasoner_subject
from haltkit.setting import Setting
from haltkit.specs import policy
from haltkit.subject import Subject

Floats = NDArray[np.float64]
DELTA = 0.1


def subject_of(model: str, units: int) -> Subject:
    """The bundled model on so many sequences."""
    if model == "text":  # the first 48 tokens of every window of the bundled text
        subject = text_subject(BUNDLED, name="text", tokens=units * 256, batch=16, max_loops=16)
        return replace(subject, samples=[window[:, :49] for window in subject.samples])
    return reasoner_subject(BUNDLED / model, name=model, sequences=units)


@torch.no_grad()
def losses_of(subject: Subject, spec: str, taus: list[float]) -> tuple[Floats, Floats]:
    """Losses ``(sequences, thresholds)``, and the mean steps at each threshold with full depth's last."""
    full_depth = int(subject.about["max_loops"])
    assert subject.logits is not None

    def run(setting: Setting) -> tuple[list[torch.Tensor], float]:
        assert subject.logits is not None
        tops, steps = [], []
        with subject.using(setting) as once:
            for sample in subject.samples:
                done = once(sample)
                tops.append(subject.logits(done.output).argmax(-1))
                steps += [s.double().mean() for s in done.steps.values()]  # none at a fixed depth
        return tops, float(torch.stack(steps).mean()) if steps else float(full_depth)

    full, most = run(Setting.of(full_depth, subject.regions))
    columns, mean_steps = [], []
    for tau in taus:
        tops, steps = run(Setting.of(policy(spec.format(tau=tau)), subject.regions))
        shares = [(a != b).reshape(len(a), -1).double() for a, b in zip(tops, full, strict=True)]
        columns.append(torch.cat([s.amax(1) if subject.granularity == "sequence" else s.mean(1) for s in shares]))
        mean_steps.append(steps)
        print(f"  tau {tau:<8.3g} risk {float(columns[-1].mean()):.4f}, {steps:.2f} of {most:.0f} steps", flush=True)
    return torch.stack(columns, 1).numpy(), np.array([*mean_steps, most])


def plain(losses: Floats, epsilon: float) -> int | None:
    """The last threshold whose observed risk is low enough: what one does without a calibration."""
    passed = np.flatnonzero(losses.mean(0) <= epsilon)
    return int(passed[-1]) if len(passed) else None


def splits_of(name: str, losses: Floats, steps: Floats, splits: int, draws: int) -> None:
    """Calibrate many times, and hold each result against the whole population."""
    risks, saved = losses.mean(0), steps[-1] - steps[:-1]
    # So many draws can certify a risk of ln(1 / delta) / draws where no loss is seen at all, and nothing below.
    worth = np.flatnonzero(risks > 2 * math.log(1 / DELTA) / draws)
    if len(worth) == 0:
        print(f"{name}: no threshold has a risk that {draws} draws could tell from 0")
        return
    epsilon = float(risks[worth[0]]) - 1e-6
    best = saved[risks <= epsilon].max(initial=0.0)
    methods: dict[str, tuple[bool, Callable[[Floats], int | None]]] = {
        method: (True, partial(_certified, epsilon=epsilon, method=method))
        for method in ("betting", "hoeffding-bentkus")
    }
    methods["conformal (an expectation)"] = False, partial(_certified, epsilon=epsilon, method="conformal")
    methods["plain (wrong)"] = False, partial(plain, epsilon=epsilon)
    print(
        f"\n{name}: {len(losses)} sequences, {draws} drawn per calibration, epsilon {epsilon:.4f}, delta {DELTA}; "
        f"best in hindsight saves {best:.2f} of {steps[-1]:.0f} steps"
    )
    print(f"{'method':28} {'broken':>7} {'allowed':>8} {'mean risk':>10} {'saving':>7} {'nothing':>8}")
    for label, (promises, choose) in methods.items():
        generator = np.random.default_rng(0)
        chosen = [choose(losses[generator.integers(0, len(losses), draws)]) for _ in range(splits)]
        risk = np.array([0.0 if i is None else risks[i] for i in chosen])
        saving = np.array([0.0 if i is None else saved[i] for i in chosen]) / max(best, 1e-12)
        allowed = f"{DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / splits):8.3f}" if promises else "       -"
        nothing = np.mean([i is None for i in chosen])
        broken = (risk > epsilon).mean()
        print(f"{label:28} {broken:7.3f} {allowed} {risk.mean():10.4f} {saving.mean():7.3f} {nothing:8.3f}")


def _certified(losses: Floats, *, epsilon: float, method: Any) -> int | None:
    delta = {} if method == "conformal" else {"delta": DELTA}
    return calibrate(losses, epsilon=epsilon, method=method, **delta).chosen


TAUS = {
    "chase": [0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0],
    "sudoku": [0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0],
    "text": [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 0.8],
}
SPECS = {"sudoku": "norm:tau={tau},granularity=sequence"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(TAUS), default=["chase", "text"])
    parser.add_argument("--units", type=int, default=1024, help="sequences of each model; the bundled text has 259")
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=512)
    options = parser.parse_args()
    for model in options.models:
        print(f"{model}: live runs")
        losses, steps = losses_of(subject_of(model, options.units), SPECS.get(model, "norm:tau={tau}"), TAUS[model])
        splits_of(model, losses, steps, options.splits, options.draws)


if __name__ == "__main__":
    main()
