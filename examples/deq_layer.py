"""Halt the solver of a DEQ layer from outside, and ask which policy and threshold serve it.

python examples/deq_layer.py
haltkit compare deq_layer:subject --policies norm,accel    (inside examples/)

A deep equilibrium layer iterates ``z = f(z, x)`` to a fixed point. With torchdeq instead of the loop written here, the
description is ``haltkit.attachment.presets.torchdeq.describe(model, body=["f"])``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import haltkit


class Map(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.state, self.input = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.orthogonal_(self.state.weight, 0.8)  # a contraction: there is one fixed point

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.state(z) + self.input(x))


class DEQ(nn.Module):
    def __init__(self, width: int = 512, iterations: int = 40) -> None:
        super().__init__()
        self.f, self.iterations = Map(width), iterations

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(self.iterations):
            z = self.f(z, x)
        return z


def subject() -> haltkit.Subject:
    """What the comparison needs to know: the model, how to run it, on what, and what is lost."""
    torch.manual_seed(0)
    model = DEQ().eval()
    samples = list(torch.randn(6, 256, 512))

    def residual(z: Tensor, x: Tensor) -> Tensor:
        return (model.f(z, x) - z).norm(dim=-1)  # how far from the fixed point each row was left

    return haltkit.Subject.attached(
        model,
        loop=haltkit.Loop(("f",)),
        samples=samples,
        loss=residual,
        metric="residual",
        item="row",
        levels=(1e-4, 1e-3, 1e-2),
    )


@torch.no_grad()
def main() -> None:
    own = subject()
    x = own.samples[0]
    with haltkit.attach(own.model, "norm:tau=1e-3,granularity=batch", own.described["loop"]) as session:
        z = own.model(x)
        print(session.summary())
    print(f"residual {float(own.losses(z, x).max()):.1e}")
    result = haltkit.compare(own, policies="norm,accel", taus=[1e-4, 1e-3, 1e-2], repeats=2)
    for row in result.rows:
        print(f"{row.label:16} {row.steps['loop']:5.1f} steps  residual {row.loss:.1e}  {row.speedup:5.2f}x")
    if (winner := result.winner()) is not None:
        print(f"fastest policy within {result.conclusion().level:g}: {winner.spec}")


if __name__ == "__main__":
    main()
