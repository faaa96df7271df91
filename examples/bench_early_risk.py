"""What halts early: its risk under one threshold, and under thresholds by step, each certified on the same data.

    python examples/bench_early_risk.py [sudoku] [--policy norm] [--epsilon 0.05] [--sequences 2048] [--fresh 1024]

`haltkit calibrate` promises a risk over all sequences; `--by step` promises it among what halts by step t, for every t.
Both are calibrated on the same sequences of a bundled reasoner, then run live on fresh ones. For each step: how many
boards or queries have halted by it, and the share of them whose answer is another than at full depth.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from haltkit.comparison.certify import Certified, certify
from haltkit.comparison.live import Live
from haltkit.models.reasoner.subject import checkpoint_subject
from haltkit.models.weights import BUNDLED
from haltkit.subject import Subject


def by_step(subject: Subject, found: Certified) -> None:
    """Print the risk by step of a certified setting on the subject's samples."""
    if found.setting is None:
        print(f"  nothing is certified: {found.certificate.reason}")
        return
    live = Live.of(subject, subject.samples, found.full_depth, "disagreement", 1.0)
    granularity = subject.granularity
    ran = live.run(found.setting)
    steps, losses = live.steps(ran, granularity), live.losses(ran, granularity)
    print(f"  {found.certificate.setting}: {steps.mean():.2f} steps, risk {losses.mean():.4f}")
    for step in np.unique(steps):
        halted = steps <= step
        risk = losses[halted].mean()
        error = np.sqrt(risk * (1 - risk) / halted.sum())
        print(f"    by step {step:3d}: {halted.sum():6d}, risk {risk:.4f} +- {error:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="sudoku", choices=["sudoku", "chase"])
    parser.add_argument("--policy", default="norm")
    parser.add_argument("--epsilon", type=float, default=0.05)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--method", default="binomial")
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--fresh", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--full-depth", type=int, default=28)
    asked = parser.parse_args()
    subject = checkpoint_subject(
        BUNDLED / asked.model,
        name=asked.model,
        max_loops=asked.full_depth,
        batch=asked.batch,
        sequences=asked.sequences + asked.fresh,
    )
    own = asked.sequences // asked.batch
    data, fresh = (replace(subject, samples=part) for part in (subject.samples[:own], subject.samples[own:]))
    for by in (None, "step"):
        found = certify(data, asked.policy, epsilon=asked.epsilon, delta=asked.delta, method=asked.method, by=by)
        what = "one threshold" if by is None else "thresholds by step"
        print(f"{what}, from {found.certificate.units} of unit {found.certificate.unit}")
        by_step(fresh, found)


if __name__ == "__main__":
    main()
