"""From a card to a watched model in use: spot checks, stored from day to day, until other data raise the alarm.

python examples/watch_a_foreign_model.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import haltkit
from haltkit.calibration import SpotChecks
from haltkit.calibration.monitor import checks_until_alarm
from haltkit.comparison.certify import certify
from haltkit.comparison.choice import save_certified
from haltkit.subject import Subject


class Pull(nn.Module):
    """Pulls a state part of the way to its goal."""

    def forward(self, x: Tensor, goal: Tensor) -> Tensor:
        return x + 0.3 * (goal - x)


class Solver(nn.Module):
    """Somebody else's model: from a learned start, one block pulls a state to a goal; a head names one of 8 answers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.goal, self.head = nn.Linear(4, width, bias=False), nn.Linear(width, 8, bias=False)
        self.start, self.block = nn.Parameter(torch.randn(width)), Pull()

    def forward(self, inputs: Tensor, loops: int = 32) -> Tensor:
        goal = self.goal(inputs)
        x = self.start.expand_as(goal)
        for _ in range(loops):
            x = self.block(x, goal)
        logits: Tensor = self.head(x)
        return logits


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Solver().eval()
    subject = Subject.attached(
        model,
        loop=haltkit.Loop(["block"]),
        run_at=model,
        samples=list(torch.randn(301, 1, 4)),
        logits=lambda out: out,
        loss=lambda out, sample: 0.0,  # agreement with full depth needs no labels
    )
    taus = (0.005, 0.02, 0.05, 0.1)
    found = certify(subject, "norm:granularity=batch", epsilon=0.05, delta=0.01, taus=taus)
    assert found.setting is not None
    print(f"{found.setting.text}: {found.certificate.promise}")
    with tempfile.TemporaryDirectory() as work:
        card, state = Path(work) / "card", Path(work) / "checks.json"
        save_certified(card, found, subject, "inputs drawn at random")

        # Monday: inputs like those of the calibration. Two lines are added to the serving loop.
        with haltkit.attach(model, card) as session:
            run = haltkit.watch(session, rate=0.2)
            for inputs in torch.randn(400, 1, 4):
                run(inputs)  # instead of model(inputs)
        state.write_text(run.checks.to_json())
        tell("Monday", run.checks)

        # Tuesday: a sensor has become far quieter, so that the differences that count are smaller.
        with haltkit.attach(model, card) as session:
            go_on = SpotChecks.from_json(state.read_text())
            run = haltkit.watch(session, resume=go_on, on_alarm=lambda checks: session.detach())
            for inputs in 0.02 * torch.randn(400, 1, 4):
                run(inputs)  # after the alarm nothing is attached: full depth
        tell("Tuesday", run.checks)


def tell(day: str, checks: SpotChecks) -> None:
    monitor = checks.monitor
    low, high = monitor.interval()
    print(
        f"{day}: {checks.units} calls, {monitor.checks} checked, risk {monitor.risk:.3f} ({low:.3f} to {high:.3f}), "
        f"{'ALARM' if checks.alarm else 'no alarm'}"
    )
    print(f"  {checks.mean_steps:.1f} steps per call; spot checks add {checks.cost:.1f}")
    if not checks.alarm:
        expected = checks_until_alarm(0.15, monitor.epsilon, monitor.delta)
        print(f"  at a risk of 0.15 the alarm would take about {expected:.0f} spot checks")


if __name__ == "__main__":
    main()
