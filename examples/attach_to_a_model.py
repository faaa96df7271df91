"""Halt the loop inside a model without editing it: discover, attach, verify.

python examples/attach_to_a_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import haltkit


class Universal(nn.Module):
    """Somebody else's model: one transformer layer, applied again and again."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 100)

    def forward(self, tokens: Tensor, loops: int = 24) -> Tensor:
        x = self.embed(tokens)
        for _ in range(loops):
            x = self.layer(x)
        return self.head(x)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, tokens = Universal().eval(), torch.randint(0, 100, (2, 8))

    print(haltkit.discover(model, lambda: model(tokens)), end="\n\n")

    with haltkit.attach(model, "norm-rel:tau=0.1,granularity=batch", body=["layer"]) as session:
        print(session.verify(lambda: model(tokens), 6, lambda k: model(tokens, k)), end="\n\n")
        model(tokens)
        print(session.summary())


if __name__ == "__main__":
    main()
