"""Check haltkit's preset for Huginn against the model's public source, on a tiny model with random weights.

    git clone https://github.com/seal-rg/recurrent-pretraining
    python examples/check_huginn.py recurrent-pretraining/recpre

The folder holds ``raven_modeling_minimal.py`` and ``raven_config_minimal.py``; needs transformers.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import haltkit

STEPS = 8


def load(folder: Path) -> tuple[Any, Any]:
    """The two files as a package of their own: the rest of the repository needs much more to import."""
    package = types.ModuleType("raven")
    package.__path__ = [str(folder)]
    sys.modules["raven"] = package
    model = importlib.import_module("raven.raven_modeling_minimal")
    return model, importlib.import_module("raven.raven_config_minimal")


def build(folder: Path) -> tuple[Any, Any]:
    modeling, config = load(folder)
    torch.manual_seed(0)
    model = modeling.RavenForCausalLM(
        config.RavenConfig(
            n_embd=64,
            n_heads=4,
            n_layers=4,
            block_size=32,
            vocab_size=50,
            padding_multiple=2,
            intermediate_size=128,
            n_layers_in_recurrent_block=4,
            n_layers_in_prelude=2,
            n_layers_in_coda=1,
            mean_recurrence=STEPS,
            tie_embeddings=False,  # tying is done in a way that transformers 5 does not know
        )
    )
    return model.eval(), modeling


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    model, modeling = build(parser.parse_args().folder)
    ids = torch.randint(0, 50, (2, 7))
    states = torch.randn(2, 7, 64)

    def run_at(k: int, **keys: Any) -> Tensor:
        return model(ids, input_states=states, num_steps=torch.tensor([k, 0]), **keys).logits

    for k in range(1, STEPS):
        with haltkit.attach(model, f"fixed:steps={k}") as session:
            assert torch.equal(run_at(STEPS), run_at_detached(session, run_at, k)), k
            assert session.skipped == STEPS - k
    print(f"a halt at k equals num_steps=k, to the bit, for k = 1 to {STEPS - 1}")

    with haltkit.attach(model, "norm-rel:tau=0.5") as session:
        out = run_at(STEPS)
        taken = session.steps["loop"]
    x, embeds = states, embedded(model, ids)
    for k in range(1, STEPS + 1):
        new, _, _ = model.iterate_one_step(embeds, x, block_idx=torch.tensor(1), current_step=k)
        x = torch.where((taken >= k).unsqueeze(-1), new, x)
    assert torch.equal(out, model.predict_from_latents(x).logits)
    print(f"token by token ({taken.min()} to {taken.max()} steps): equal to a loop over iterate_one_step, to the bit")

    with haltkit.attach(model, "kl:tau=0.02,granularity=batch") as session:
        out = run_at(STEPS)
        depth = int(session.steps["loop"].max())
    assert depth < STEPS
    assert torch.equal(out, run_at(depth))
    print(f"kl through the coda halts the batch at {depth}, to the bit")

    copied, looked_up = (
        decode(model, modeling.HuginnDynamicCache(strategy), ids, policy)
        for strategy, policy in (("full", "copy"), ("latest-m4", None))
    )
    assert torch.equal(copied, looked_up)
    print("kv='copy' equals the model's own 'latest-m4' cache, to the bit")


def run_at_detached(session: haltkit.Session, run_at: Any, k: int) -> Tensor:
    with session.detached():
        return run_at(k)


def embedded(model: Any, ids: Tensor) -> Tensor:
    embeds, _ = model.embed_inputs(ids)
    return embeds


def decode(model: Any, cache: Any, ids: Tensor, policy: str | None) -> Tensor:
    """Logits of the last of three calls of depth 4, 2 and 4, by halting (``copy``) or by asking for the depth."""
    out = torch.empty(0)
    for piece, depth, start in ((ids[:, :5], 4, 0), (ids[:, 5:6], 2, 5), (ids[:, 6:], 4, 6)):
        keys: dict[str, Any] = {
            "past_key_values": cache,
            "use_cache": True,
            "input_states": torch.ones(2, piece.shape[1], 64),
            "cache_position": torch.arange(start, start + piece.shape[1]),
        }
        if policy is None:
            out = model(piece, num_steps=torch.tensor([depth, 0]), **keys).logits
        else:
            with haltkit.attach(model, f"fixed:steps={depth}", kv="copy"):
                out = model(piece, num_steps=torch.tensor([4, 0]), **keys).logits
    return out


if __name__ == "__main__":
    main()
