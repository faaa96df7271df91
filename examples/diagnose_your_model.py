"""Look into the loop of a model that is not ours: numbers here, and with one command everything else.

python examples/diagnose_your_model.py
cd examples && haltkit diagnose diagnose_your_model:case --out universal && haltkit report universal
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haltkit.attachment import Loop
from haltkit.diagnostics import Case, Subject, survey_geometry, survey_limits


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
        return self.head(x)  # type: ignore[no-any-return]


def case() -> Case:
    torch.manual_seed(0)
    model = Universal().eval()
    subject = Subject.attached(model, model, Loop(body=("layers.0", "layers.1")), name="universal")
    return Case(subject, torch.randint(0, 100, (4, 16)))


def main() -> None:
    made = case()
    for name, region in survey_geometry(made.subject, made.inputs, loops=32)["regions"].items():
        print(f"region {name}: steps shrink by {region['contraction']['mean']} a loop, float floor {region['floor']}")
    for region in survey_limits(made.subject, made.inputs)["regions"].values():
        print(f"after 128 loops: {region['limits']['cosine']}; least cosine between layers {region['distinct']}")


if __name__ == "__main__":
    main()
