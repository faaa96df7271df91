"""Check haltkit's preset for Ouro against the model's public source, on a tiny model with random weights.

    git clone https://github.com/LoopedLMs/ouro_rl
    python examples/check_ouro.py ouro_rl/ouro_rl/modeling

The folder holds ``modeling_ouro.py`` and ``configuration_ouro.py``, as the page of ByteDance/Ouro-1.4B does. They
are written for transformers 4: transformers 4.57.6 was tried.
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
from haltkit.attachment.presets import preset_for

STEPS, LAYERS = 6, 2


def build(folder: Path) -> Any:
    """The model, whose gate exits at many different steps."""
    package = types.ModuleType("ouro")
    package.__path__ = [str(folder)]
    sys.modules["ouro"] = package
    modeling = importlib.import_module("ouro.modeling_ouro")
    config = importlib.import_module("ouro.configuration_ouro")
    torch.manual_seed(0)
    model = modeling.OuroForCausalLM(
        config.OuroConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            total_ut_steps=STEPS,
            initializer_range=0.3,
        )
    )
    torch.nn.init.normal_(model.model.early_exit_gate.weight, std=0.4)
    torch.nn.init.constant_(model.model.early_exit_gate.bias, -0.7)
    return model.eval()


def own_steps(gates: list[Tensor], q: float) -> Tensor:
    """The published rule: the first step, from 1, at which the exit distribution adds up to ``q``; else the last."""
    going = torch.stack([1 - torch.sigmoid(gate.squeeze(-1)) for gate in gates[:-1]]).cumprod(0)
    passed = torch.cat([1 - going, torch.ones_like(going[:1])])
    return (passed >= q).int().argmax(0) + 1


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    model = build(parser.parse_args().folder)
    base, ids = model.model, torch.randint(0, 50, (3, 9))

    def run() -> Tensor:
        return model(ids, use_cache=False).logits

    def at(k: int, call: Any = run) -> Any:
        base.total_ut_steps = k
        try:
            return call()
        finally:
            base.total_ut_steps = STEPS

    for k in range(1, STEPS):
        with haltkit.attach(model, f"fixed:steps={k}") as session:
            assert torch.equal(run(), at_detached(session, lambda k=k: at(k))), k
            assert session.skipped == STEPS - k
    print(f"a halt at k equals total_ut_steps=k, to the bit, for k = 1 to {STEPS - 1}")

    _, _, gates = base(ids, use_cache=False)
    with haltkit.attach(model, f"fixed:steps={STEPS}", observer=(recorder := haltkit.Recorder())):
        run()
    readout = preset_for(model)[1]
    for q in (0.2, 0.4, 0.6, 0.8):
        policy = f"gate:tau={1 - q:.1f},rule=cumulative"
        taken = haltkit.replay(policy, recorder.trajectory["loop"], readout=readout).steps
        assert torch.equal(taken, own_steps(gates, q)), q
        print(f"{policy}: {taken.min()} to {taken.max()} steps, those of the model's own exit_threshold={q}")

    for token in range(50):
        one, q = torch.tensor([[token]]), 0.6
        expected = model(one, use_cache=False, exit_threshold=q).logits
        with haltkit.attach(model, f"gate:tau={1 - q:.1f},rule=cumulative"):
            assert torch.equal(model(one, use_cache=False).logits, expected)
    print("one token alone gets the logits that exit_threshold gives it, to the bit")

    keys: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    keys["output_logits"] = True
    for kv in ("refuse", "uniform", "freeze", "copy"):
        for k in (3, STEPS):
            halting = haltkit.generation(f"fixed:steps={k}", kv=kv)
            out = model.generate(ids, custom_generate=halting, **keys)
            if kv in ("refuse", "uniform"):
                expected = at(k, lambda: model.generate(ids, **keys))
                assert torch.equal(out.sequences, expected.sequences)
                assert all(torch.equal(a, b) for a, b in zip(out.logits, expected.logits, strict=True))
            assert out.steps.eq(k).all()
    print("generate with a cache, halted at k, equals the model with total_ut_steps=k, tokens and logits to the bit")
    for kv in ("uniform", "freeze", "copy"):
        halting = haltkit.generation("gate:tau=0.4,rule=cumulative", kv=kv, kv_stride=LAYERS if kv == "copy" else None)
        out = model.generate(ids, custom_generate=halting, **keys)
        print(f"generate by the gate, kv={kv!r}: {out.steps.min()} to {out.steps.max()} steps per token")


def at_detached(session: haltkit.Session, run: Any) -> Tensor:
    with session.detached():
        return run()


if __name__ == "__main__":
    main()
