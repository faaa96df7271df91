"""Halt ALBERT (transformers), whose one layer runs again and again: found by its class name, proved, then used.

python examples/attach_to_albert.py    (needs transformers; weights are random, nothing is downloaded)
"""

from __future__ import annotations

import torch
from transformers import AlbertConfig, AlbertForMaskedLM

import haltkit


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=100,
        embedding_size=16,
        hidden_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=128,
    )
    model, tokens = AlbertForMaskedLM(config).eval(), torch.randint(0, 100, (2, 16))

    def run_at(k: int) -> torch.Tensor:
        model.config.num_hidden_layers = k
        try:
            return model(tokens).logits
        finally:
            model.config.num_hidden_layers = 12

    with haltkit.attach(model, "norm-rel:tau=0.1,granularity=batch") as session:
        print(session.verify(lambda: model(tokens).logits, 5, run_at), end="\n\n")
        model(tokens)
        print(session.summary())
        (region,) = session.trajectory.regions.values()
        print("mean step norms:", [round(float(n), 3) for n in region.step_norms().mean((1, 2))])


if __name__ == "__main__":
    main()
