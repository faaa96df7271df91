"""The same answers on a CUDA device as on the CPU, and times that wait for it; skipped where there is none."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import events, last_tensors, with_train
from haltkit.cli import main as entry
from haltkit.cli.device import choose_device
from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.draws import EvaluationNoise, TrainingNoise
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.training.config import RunConfig, load_config
from haltkit.models.training.loop import train
from haltkit.timing import settled

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# What compiling warns of in some versions is not ours.
INDUCTOR = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
SPECS = ["accel:tau=0.05", "norm-rel:tau=0.01", "kl:tau=1e-5", "norm:tau=0.05,granularity=sequence", "norm:tau=1e-30"]


@pytest.fixture(scope="module")
def both(tiny_config: ModelConfig) -> tuple[LoopedGPT, LoopedGPT]:
    """One model twice, in float64: on the CPU and on the device."""
    torch.manual_seed(0)
    model = build_model(tiny_config).eval().double()
    again = build_model(tiny_config).eval().double()
    again.load_state_dict(model.state_dict())
    return model, again.cuda()


@pytest.fixture
def config(data_folder: Path) -> RunConfig:
    loaded = load_config("tiny")
    return replace(loaded, data=replace(loaded.data, path=str(data_folder)))


@needs_cuda
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_halting_is_the_same_function_on_both(both: Any, spec: str, execution: Any) -> None:
    cpu, cuda = both
    ids = torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(0))
    here = cpu.forward_adaptive(ids, spec, max_loops=10)
    there = cuda.forward_adaptive(ids.cuda(), spec, max_loops=10, execution=execution)
    for name in cpu.regions:
        assert torch.equal(here.steps[name], there.steps[name].cpu())
        assert torch.equal(here.outcome[name], there.outcome[name].cpu())
    torch.testing.assert_close(here.logits, there.logits.cpu(), rtol=0, atol=1e-9)


@needs_cuda
def test_decoding_with_the_cache_is_the_whole_pass(both: Any) -> None:
    _, cuda = both
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1)).cuda()
    whole = cuda.forward_adaptive(ids, "accel:tau=0.05", max_loops=10)
    decoder = Decoder(cuda, "accel:tau=0.05", max_loops=10)
    decoder.prefill(ids[:, :8])
    for i in range(8, 20):
        at = decoder.step(ids[:, i])
        for name in cuda.regions:
            assert torch.equal(whole.steps[name][:, i], at.steps[name])
        torch.testing.assert_close(whole.logits[:, i], at.logits, rtol=0, atol=1e-9)


@needs_cuda
def test_noise_depends_on_its_sample_alone_there_too() -> None:
    like = torch.empty(2, 32, 64, device="cuda")
    both = TrainingNoise(0, [7, 9])("4", 0, like)
    assert both.device.type == "cuda"
    assert torch.equal(TrainingNoise(0, [9])("4", 0, like[:1])[0], both[1])
    assert not torch.equal(both, TrainingNoise(0, [7, 9])("4", 1, like))
    assert float(both.std()) == pytest.approx((2 / 5) ** 0.5 * 0.9866, rel=0.03)  # cut at three deviations
    table = EvaluationNoise(0, 16, 8)
    assert torch.equal(table("4", 0, like).cpu(), table("4", 0, torch.empty(16, 8)))


@needs_cuda
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=INDUCTOR)])
def test_training_there_is_training_here(config: RunConfig, tmp_path: Path, compiled: bool) -> None:
    """From one initial state, so that nothing is drawn by the device: only the order of sums differs."""
    config = with_train(replace(config, model=replace(config.model, initial_state="zero")), max_steps=6, eval_every=3)
    assert train(with_train(config, compile=compiled), tmp_path / "there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert train(config, tmp_path / "here")
    for kind in ("step", "eval"):
        here, there = events(tmp_path / "here", kind), events(tmp_path / "there", kind)
        for a, b in zip(here, there, strict=True):
            if kind == "step":
                assert b["loss"] == pytest.approx(a["loss"], abs=2e-4)
            else:
                assert list(b["losses"].values()) == pytest.approx(list(a["losses"].values()), abs=2e-4)


@needs_cuda
def test_a_run_there_goes_on_where_it_stopped(config: RunConfig, tmp_path: Path) -> None:
    config = with_train(config, precision="bf16")
    assert train(with_train(config, max_steps=12), tmp_path / "straight")

    def interrupt(event: Any) -> None:
        if event["kind"] == "step" and event["step"] == 7:
            signal.raise_signal(signal.SIGINT)

    assert not train(with_train(config, max_steps=12), tmp_path / "resumed", on_event=interrupt)
    assert train(with_train(config, max_steps=12), tmp_path / "resumed", resume=True)
    straight, resumed = last_tensors(tmp_path / "straight"), last_tensors(tmp_path / "resumed")
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-5)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * torch.tanh(self.core(x))


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Tensor, loops: int = 8) -> Tensor:
        for _ in range(loops):
            x = self.body(x)
        return x


@needs_cuda
def test_attaching_halts_there() -> None:
    torch.manual_seed(0)
    model, x = Looped().cuda(), torch.randn(4, 64, device="cuda")
    for k in range(1, 8):
        fewer = model(x, k)
        with haltkit.attach(model, f"fixed:steps={k}", body=["body"]) as session:
            assert torch.equal(model(x), fewer)
        assert session.steps["loop"].tolist() == [k] * 4
    sample = torch.randn(4, 64, device="cuda")
    result = haltkit.compare(
        model,
        model,
        "norm,kl",
        samples=[x, sample],
        metric=lambda y, _: y.mean(-1),
        body=["body"],
        readout=nn.Linear(64, 32).cuda(),
    )
    assert {row.policy for row in result.rows} == {"fixed", "norm", "kl"}


@needs_cuda
def test_the_clock_waits_for_the_device() -> None:
    a = torch.randn(8192, 8192, device="cuda")
    torch.mm(a, a)
    settled()
    started = time.perf_counter()
    for _ in range(10):
        torch.mm(a, a)
    handed_over = time.perf_counter() - started
    waited = settled() - started
    assert waited > 4 * handed_over  # 10 products of 1.1 TFLOP


@needs_cuda
def test_the_commands_run_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*args: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["haltkit", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            entry.run()
        assert not stop.value.code, args

    out = tmp_path / "c.json"
    quick = ("--tokens", 512, "--max-loops", 8, "--repeats", 1)
    run("compare", "--policies", "norm,kl", *quick, "--json", out)
    result = json.loads(out.read_text())
    assert result["device"].startswith("cuda")
    run("compare", "--policies", "norm,kl", *quick, "--device", "cpu", "--json", out)
    on_cpu = {row["spec"]: row["ce"] for row in json.loads(out.read_text())["rows"]}
    fixed = [row for row in result["rows"] if row["policy"] == "fixed"]
    assert [row["ce"] for row in fixed] == pytest.approx([on_cpu[row["spec"]] for row in fixed], abs=1e-4)
    run("eval", "--loops", "1,4", "--policy", "norm:tau=0.1", "--tokens", 512)
    run("generate", "Once upon a time", "--max-new-tokens", 8, "--policy", "norm:tau=0.1", "--max-loops", 8)
    run("bench", "--only", "overhead,decode,break-even", "--repeats", 1, "--max-loops", 8)


def test_devices_that_are_not_there_are_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:", "cpu:1", "cuda:x", "meta", ""):
        with pytest.raises(ValueError, match="--device"):
            choose_device(name)
    with pytest.raises(ValueError, match="there are|no CUDA"):
        choose_device("cuda:99")
