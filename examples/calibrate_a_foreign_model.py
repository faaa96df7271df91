"""From somebody else's model to a card with a certificate: calibrate its halting on live runs, save it, attach it.

python examples/calibrate_a_foreign_model.py
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import haltkit
from haltkit.comparison.certify import certify
from haltkit.comparison.choice import save_certified
from haltkit.subject import Subject


class Refiner(nn.Module):
    """Somebody else's model: one block pulls a state towards an answer, again and again; a head names one of 8."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, 8)
        with torch.no_grad():
            nn.init.orthogonal_(self.block.weight)
            self.block.weight *= 0.7

    def forward(self, inputs: Tensor, loops: int = 32) -> Tensor:
        x = self.embed(inputs)
        for _ in range(loops):
            x = self.block(x)
        logits: Tensor = self.head(x)
        return logits


def main() -> None:
    torch.manual_seed(0)
    model = Refiner().eval()
    # From outside, only a halt of all rows saves time, so one problem is one sample. The first chooses thresholds.
    samples = list(torch.randn(401, 1, 4))
    subject = Subject.attached(
        model, loop=haltkit.Loop(["block"]), run_at=model, samples=samples, logits=lambda out: out, loss=_not_used
    )
    policy = "norm:granularity=batch"
    few = certify(replace(subject, samples=samples[:50]), policy, epsilon=0.01, delta=0.05)
    print("50 problems:", few.certificate.reason)
    found = certify(subject, policy, epsilon=0.01, delta=0.05)
    print(f"{found.certificate.units} problems:", found.certificate.reason)
    print(found.certificate.promise)
    if found.setting is None:
        return
    print(f"{found.setting.text}: {found.steps['loop']:.1f} of {found.full_depth} steps")

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "card"
        save_certified(folder, found, subject, "problems drawn at random")
        print((folder / "card.yaml").read_text(encoding="utf-8"))
        with haltkit.attach(model, folder) as session:
            model(torch.randn(1, 4))
            print(session.summary())
        other, card = Refiner().eval(), haltkit.Card.load(folder)
        try:
            haltkit.attach(other, card)
        except ValueError as error:
            print(error)
        # Asked for, the policy is used all the same, without what is promised of it on its own model.
        with haltkit.attach(other, card.without_certificate()) as session:
            other(torch.randn(1, 4))
            print(session.standing)


def _not_used(output: Tensor, sample: Tensor) -> float:
    """Agreement with full depth needs no labels, so nothing is lost here."""
    return 0.0


if __name__ == "__main__":
    main()
