"""Look into the loop of a model that is not ours: numbers here, and with one command everything else.

python examples/diagnose_your_model.py
cd examples && haltkit diagnose diagnose_your_model:subject --out universal && haltkit report universal
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haltkit.attachment import Loop
from haltkit.diagnostics import survey_geometry, survey_limits
from haltkit.subject import Subject


class Universal(nn.Module):
    """Somebody else's model: two transformer layers, applied again and again."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 100)

    def forward(self, tokens: Tensor, loops: int = 24) -> Tensor:
        x = self.embed(tokens)
        for _ in range(loops):
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


TOKENS = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(0))


def subject() -> Subject:
    torch.manual_seed(0)
    model = Universal().eval()
    loop = Loop(body=("layers.0", "layers.1"))
    return Subject.attached(model, loop=loop, run_at=model, name="universal", samples=[TOKENS])


def main() -> None:
    looked_at = subject()
    for name, region in survey_geometry(looked_at, TOKENS, loops=32).regions.items():
        if region.contraction is not None:
            print(f"region {name}: steps shrink by {region.contraction.mean} each, float floor {region.floor}")
    for end in survey_limits(looked_at, TOKENS).regions.values():
        print(f"after 128 loop steps: {end.limits['cosine']}")
        if end.least_cosine is not None:
            print(f"least cosine between layers: {end.least_cosine.mean}")
            print(f"share of rows whose layers rest at distinct points: {end.distinct}")


if __name__ == "__main__":
    main()
