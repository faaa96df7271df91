"""Comparing policies on a model that is not ours."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from haltkit.comparison import findings

WIDTH, LOOPS = 8, 12

FACTORY = """
import sys
sys.path.insert(0, {tests!r})
from test_trial import broken, functions, trial, wrong
"""


class Contracting(nn.Module):
    """``x -> x / 2``, so that the state after k loops is known: ``2^-k x``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.body.weight)
        self.body.weight.data.mul_(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LOOPS):
            x = self.body(x)
        return x


def trial(**changes: Any) -> haltkit.Trial:
    model = Contracting().eval()
    samples = [torch.full((3, WIDTH), 2.0**i) for i in range(4)]
    keys: dict[str, Any] = {"metric": lambda out, x: 1 + out.norm(dim=-1), "loop": haltkit.Loop(("body",)), **changes}
    return haltkit.Trial(model, model, samples, metric_name="size", item="row", **keys)


def wrong() -> int:
    return 3


def broken() -> haltkit.Trial:
    return trial(loop=haltkit.Loop(("bodi",)))


def functions() -> haltkit.Trial:
    return trial(loop=haltkit.Loop(("body",), initial=lambda args, kwargs: args[0]))


def test_every_row_is_what_the_closed_form_says() -> None:
    result = haltkit.compare(trial(), policies="norm,accel", taus=[0.01, 0.5], repeats=2)
    sizes = [2.0**i * math.sqrt(WIDTH) for i in range(4)]
    full = sum(size * 2.0**-LOOPS for size in sizes) / 4
    fixed = {row.spec: row for row in result.rows if row.policy == "fixed"}
    assert next(iter(fixed)) == f"fixed:steps={LOOPS}"
    for spec, row in fixed.items():
        k = int(spec.rpartition("=")[2])
        expected = [size * 2.0**-k for size in sizes]
        assert row.ce == pytest.approx(1 + sum(expected) / 4, rel=1e-5)
        assert row.delta_ce == pytest.approx(sum(expected) / 4 - full, rel=1e-4, abs=1e-6)
        assert row.steps["loop"] == k
        assert (row.ppl, row.agreement, row.kl_to_full) == (None, None, None)
    for row in result.rows:
        if row.policy == "fixed":
            continue
        # A step of norm: ||d_k|| = size 2^-k; an acceleration: ||d_k - d_{k-1}|| = size 2^-k, two hits.
        assert row.tau is not None
        steps = [max(1, math.floor(math.log2(size / row.tau)) + 1) for size in sizes]
        if row.policy == "accel":
            steps = [max(2, k) + 1 for k in steps]
        assert row.steps["loop"] == pytest.approx(sum(min(k, LOOPS) for k in steps) / 4)
        assert "granularity=batch" in row.spec
    assert (result.metric, result.item, result.tokens, result.sequences) == ("size", "row", 12, 12)
    found = findings(result.rows, (0.1, 1.0))
    assert {f.kind for f in found} == {"ce"}


def test_a_sample_that_goes_less_deep_counts_as_it_went() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Identity()

        def forward(self, depth: int) -> Tensor:
            x = torch.ones(1, 2)
            for _ in range(depth):
                x = self.body(x)
            return x

    model = Sometimes()
    result = haltkit.compare(
        model, lambda depth: model(depth).sum(-1), ["norm:tau=1e-9,min_steps=99"], samples=[12, 4, 4, 4],
        loop=haltkit.Loop(("body",), initial=0), repeats=1,
    )  # fmt: skip
    assert result.rows[0].steps["loop"] == 6


def test_thresholds_picked_from_scores_stop_at_their_targets() -> None:
    result = haltkit.compare(trial(), policies="norm", repeats=1)
    steps = sorted(row.steps["loop"] for row in result.rows if row.policy == "norm")
    assert len(steps) >= 3
    assert steps[0] < LOOPS / 2 < steps[-1]


def test_other_ways_to_say_it() -> None:
    one = trial()
    direct = haltkit.compare(
        one.model,
        lambda x: 1 + one.model(x).norm(dim=-1),
        ["norm:tau=0.1"],
        samples=one.samples,
        body=["body"],
        repeats=1,
    )
    assert direct.rows[-1].ce == haltkit.compare(one, policies="norm:tau=0.1", repeats=1).rows[-1].ce
    token = haltkit.compare(one, policies="norm:tau=0.1,granularity=token", repeats=1).rows[-1]
    assert token.causal
    with_logits = haltkit.compare(trial(logits=lambda out: out.unsqueeze(0)), policies="norm:tau=0.1", repeats=1)
    assert with_logits.rows[0].agreement == 1
    number = haltkit.compare(trial(metric=lambda out, x: float(out.sum())), policies="norm:tau=0.1", repeats=1)
    assert (number.tokens, number.sequences) == (4, 4)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        haltkit.compare(Contracting(), lambda x: x)
    for changes, message in (
        ({"samples": []}, "at least one sample"),
        ({"model": 3}, "needs a model"),
        ({"run": None}, "run, a function of one sample"),
    ):
        one = trial()
        fields = {"model": one.model, "run": one.run, "samples": one.samples, **changes}
        with pytest.raises(ValueError, match=message):
            haltkit.Trial(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not finite"):
        haltkit.compare(trial(metric=lambda out, x: out * float("nan")), policies="norm:tau=1", repeats=1)
    with pytest.raises(ValueError, match=r"\(B, T, V\) or more"):
        haltkit.compare(trial(logits=lambda out: out), policies="norm:tau=1", repeats=1)
    one = trial()
    twice = haltkit.Trial(one.model, lambda x: one.model(one.model(x)), one.samples, one.metric, one.loop)
    with pytest.raises(ValueError, match="went through the loop 2 times"):
        haltkit.compare(twice, policies="norm:tau=1", repeats=1)
    with pytest.raises(ValueError, match="a number or a tensor"):
        haltkit.compare(trial(metric=lambda out, x: "good"), policies="norm:tau=1", repeats=1)
    with pytest.raises(ValueError, match="positive"):
        haltkit.compare(trial(), policies="norm", taus=[-1.0])
    with pytest.raises(ValueError, match="allowed are paper, auto, both"):
        haltkit.compare(trial(), policies="norm", taus="many")
    with pytest.raises(haltkit.attachment.errors.AttachError, match="no preset"):
        haltkit.compare(trial(loop=None), policies="norm:tau=1")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The console entry point, in a folder that holds the user's module."""
    from haltkit.cli.main import run

    (tmp_path / "mine.py").write_text(FACTORY.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["haltkit", "compare", *arguments])
        with pytest.raises(SystemExit) as ended:
            run()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_command_on_a_model_of_ones_own(command: Any, tmp_path: Path) -> None:
    code, out, err = command(
        "--model", "mine:trial", "--policies", "norm,accel", "--taus", "0.003,0.5", "--json", "out.json",
        "--plot", "out.png", "--save", "choice.yaml",
    )  # fmt: skip
    assert code == 0, err
    assert "ms/row" in out
    assert "within 0.01 of size" in out
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["model"] == "mine:trial"
    assert saved["rows"][0]["agreement"] is None
    assert (tmp_path / "out.png").stat().st_size > 10_000
    model, x = Contracting().eval(), torch.ones(3, WIDTH)
    with torch.no_grad(), haltkit.attach(model, tmp_path / "choice.yaml") as session:
        model(x)
    assert session.computed < LOOPS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mine"], "write it as pkg.mod:function"),
        (["--model", "nowhere:trial"], "No module named 'nowhere'"),
        (["--model", ".:x"], "relative import"),
        (["--model", "mine:nothing"], "has no function 'nothing'"),
        (["--model", "mine:wrong"], "must return a haltkit.trial.Trial, not a int"),
        (["--model", "mine:broken"], "no module 'bodi' in Contracting"),
        (["--model", "mine:functions", "--save", "c.yaml"], "holds functions (initial)"),
        (["--model", "mine:trial", "--tokens", "5"], "--tokens is for checkpoints"),
        (["--model", "mine:trial", "--save", "choice.txt"], "must end in .yaml, .yml"),
        (["--json", "a.json", "--save", "a.json"], "must end in"),
        (["--model", "mine:trial", "--policies", "norm:tau=2", "--save", "c.yaml"], "so 'c.yaml' was not written"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], message: str, command: Any, tmp_path: Path) -> None:
    code, _, err = command(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.yaml"))
