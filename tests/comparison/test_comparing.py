"""Comparing policies on a model that is not ours."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from haltkit.attachment.errors import AttachError
from haltkit.comparison import conclude

WIDTH, LOOPS = 8, 12

FACTORY = """
import sys
sys.path.insert(0, {tests!r})
from test_comparing import broken, functions, subject, wrong
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


def subject(**changes: Any) -> haltkit.Subject:
    samples = [torch.full((3, WIDTH), 2.0**i) for i in range(4)]
    keys: dict[str, Any] = {
        "samples": samples,
        "loss": lambda out, x: 1 + out.norm(dim=-1),
        "loop": haltkit.Loop(("body",)),
        "metric": "size",
        "item": "row",
        **changes,
    }
    return haltkit.Subject.attached(Contracting().eval(), **keys)


def wrong() -> int:
    return 3


def broken() -> haltkit.Subject:
    return subject(loop=haltkit.Loop(("bodi",)))


def functions() -> haltkit.Subject:
    return subject(loop=haltkit.Loop(("body",), initial=lambda args, kwargs: args[0]))


def test_every_row_is_what_the_closed_form_says() -> None:
    result = haltkit.compare(subject(), policies="norm,accel", taus=[0.01, 0.5], repeats=2)
    sizes = [2.0**i * math.sqrt(WIDTH) for i in range(4)]
    full = sum(size * 2.0**-LOOPS for size in sizes) / 4
    fixed = {str(row.spec): row for row in result.rows if row.fixed}
    assert next(iter(fixed)) == f"fixed:steps={LOOPS}"
    for spec, row in fixed.items():
        k = int(spec.rpartition("=")[2])
        expected = [size * 2.0**-k for size in sizes]
        assert row.loss == pytest.approx(1 + sum(expected) / 4, rel=1e-5)
        assert row.delta == pytest.approx(sum(expected) / 4 - full, rel=1e-4, abs=1e-6)
        assert row.steps["loop"] == k
        assert row.depth == {"loop": k}
        assert (row.perplexity, row.agreement, row.kl_to_full) == (None, None, None)
    for row in result.rows:
        if row.fixed:
            continue
        # A step of norm: ||d_k|| = size 2^-k; an acceleration: ||d_k - d_{k-1}|| = size 2^-k, two hits.
        assert row.tau is not None
        steps = [max(1, math.floor(math.log2(size / row.tau)) + 1) for size in sizes]
        if row.policy == "accel":
            steps = [max(2, k) + 1 for k in steps]
        assert row.steps["loop"] == pytest.approx(sum(min(k, LOOPS) for k in steps) / 4)
        assert "granularity=batch" in str(row.spec)
    assert (result.metric, result.item, result.items, result.sequences) == ("size", "row", 12, 12)
    assert {f.kind for f in conclude(result.rows, (0.1, 1.0)).findings} == {"loss"}


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
        model,
        lambda depth: model(depth).sum(-1),
        ["norm:tau=1e-9,min_steps=99"],
        samples=[12, 4, 4, 4],
        loop=haltkit.Loop(("body",), initial=0),
        repeats=1,
    )
    assert result.rows[0].steps["loop"] == 6


def test_thresholds_picked_from_scores_stop_at_their_targets() -> None:
    result = haltkit.compare(subject(), policies="norm", taus="auto", repeats=1)
    steps = sorted(row.steps["loop"] for row in result.rows if row.policy == "norm")
    assert len(steps) >= 3
    assert steps[0] < LOOPS / 2 < steps[-1]


class Twice(nn.Module):
    """Two loops one after the other: ``core`` halves the state, ``refine`` takes it to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.refine = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        nn.init.eye_(self.core.weight).mul_(1 / 2)
        nn.init.eye_(self.refine.weight).mul_(1 / 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LOOPS):
            x = self.core(x)
        for _ in range(LOOPS // 2):
            x = self.refine(x)
        return x


def test_several_loops_of_a_foreign_model_are_compared_with_a_policy_for_each() -> None:
    with torch.no_grad():
        model = Twice()
    samples = [torch.full((3, WIDTH), 2.0**i) for i in range(3)]
    loops = {name: haltkit.Loop((name,)) for name in ("core", "refine")}
    result = haltkit.compare(
        model,
        policies="core=norm:tau=0.1;refine=fixed:steps=2",
        samples=samples,
        loss=lambda out, x: out.norm(dim=-1),
        loops=loops,
        repeats=1,
    )
    full, *_, row = result.rows
    assert (full.depth, full.steps) == ({"core": 12, "refine": 12}, {"core": 12.0, "refine": 6.0})
    assert row.spec == "core=norm:tau=0.1,granularity=batch;refine=fixed:steps=2"
    norms = [float(x[0].norm()) for x in samples]
    expected = [next(k for k in range(1, LOOPS + 1) if norm * 2.0**-k < 0.1) for norm in norms]
    losses = [norm * 2.0**-k * 3.0**-2 for norm, k in zip(norms, expected, strict=True)]
    assert row.steps == {"core": sum(expected) / 3, "refine": 2.0}
    assert row.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert "_haltkit" not in vars(type(model.core))


class Inside(nn.Module):
    """An inner loop of three steps within each step of an outer one, which halves the state."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        nn.init.eye_(self.low.weight)
        nn.init.eye_(self.high.weight)
        self.high.weight.data.mul_(1 / 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LOOPS):
            for _ in range(3):
                x = self.low(x)
            x = self.high(x)
        return x


def test_of_nested_loops_the_outer_one_is_compared_and_both_together_are_refused() -> None:
    low = haltkit.Loop(("low",), initial=None, reset_on=("high",))
    outer = haltkit.Loop(("low", "high"), initial=None)
    about: dict[str, Any] = {
        "samples": [torch.full((3, WIDTH), 2.0**i) for i in range(2)],
        "loss": lambda out, x: out.norm(dim=-1),
        "policies": "norm:tau=0.1",
        "repeats": 1,
    }
    with pytest.raises(ValueError, match="loop 'low' ran 12 times"):
        haltkit.compare(Inside().eval(), loops={"low": low, "high": outer}, **about)
    rows = haltkit.compare(Inside().eval(), loop=outer, **about).rows
    assert rows[0].steps == {"loop": LOOPS}
    for row in rows:
        if row.depth is not None:
            expected = sum(math.sqrt(WIDTH) * 2.0 ** (i - row.depth["loop"]) for i in range(2)) / 2
            assert row.loss == pytest.approx(expected, rel=1e-5)
    assert rows[-1].steps["loop"] < LOOPS


def test_full_depth_is_the_model_as_it_is_and_all_else_halts_it_from_outside() -> None:
    model = Contracting().eval()
    attached: list[bool] = []

    def run(x: Tensor) -> Tensor:
        attached.append("_haltkit" in vars(type(model.body)))
        out: Tensor = model(x)
        return out

    one = haltkit.Subject.attached(model, run, haltkit.Loop(("body",)), samples=[torch.ones(3, WIDTH)])
    one = replace(one, full_depth=LOOPS, loss=lambda out, x: out.norm(dim=-1))
    for setting, expected in ((LOOPS, False), (LOOPS + 1, False), (LOOPS - 1, True), ("norm:tau=0.1", True)):
        attached.clear()
        one.run(one.samples[0], setting)
        assert attached == [expected], setting


def test_other_ways_to_say_it() -> None:
    one = subject()
    direct = haltkit.compare(
        one.model,
        lambda x: 1 + one.model(x).norm(dim=-1),
        ["norm:tau=0.1"],
        samples=one.samples,
        body=["body"],
        repeats=1,
    )
    assert direct.rows[-1].loss == haltkit.compare(one, policies="norm:tau=0.1", repeats=1).rows[-1].loss
    token = haltkit.compare(one, policies="norm:tau=0.1,granularity=token", repeats=1).rows[-1]
    assert token.causal
    with_logits = haltkit.compare(subject(logits=lambda out: out.unsqueeze(0)), policies="norm:tau=0.1", repeats=1)
    assert with_logits.rows[0].agreement == 1
    number = haltkit.compare(subject(loss=lambda out, x: float(out.sum())), policies="norm:tau=0.1", repeats=1)
    assert (number.items, number.sequences) == (4, 4)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        haltkit.compare(Contracting(), lambda x: x)
    with pytest.raises(ValueError, match="at least one sample"):
        haltkit.compare(subject(samples=[]))
    model: Any = 3
    with pytest.raises(ValueError, match="needs a model"):
        haltkit.Subject.attached(model, loop=haltkit.Loop(("body",)))
    with pytest.raises(ValueError, match="run, a function of one sample"):
        subject(run=3)
    with pytest.raises(ValueError, match="says samples itself"):
        haltkit.compare(subject(), samples=[torch.ones(1)])
    with pytest.raises(ValueError, match="not finite"):
        haltkit.compare(subject(loss=lambda out, x: out * float("nan")), policies="norm:tau=1", repeats=1)
    with pytest.raises(ValueError, match=r"\(B, T, V\) or more"):
        haltkit.compare(subject(logits=lambda out: out), policies="norm:tau=1", repeats=1)
    model = Contracting()
    twice = haltkit.Subject.attached(
        model, lambda x: model(model(x)), haltkit.Loop(("body",)), samples=[torch.ones(3, WIDTH)]
    )
    with pytest.raises(ValueError, match="ran 2 times"):
        haltkit.compare(twice, policies="norm:tau=1", repeats=1)
    with pytest.raises(ValueError, match="a number or a tensor"):
        haltkit.compare(subject(loss=lambda out, x: "good"), policies="norm:tau=1", repeats=1)
    with pytest.raises(ValueError, match="positive"):
        haltkit.compare(subject(), policies="norm", taus=[-1.0])
    with pytest.raises(ValueError, match="allowed are paper, auto, both"):
        haltkit.compare(subject(), policies="norm", taus="many")
    with pytest.raises(haltkit.attachment.errors.AttachError, match="no preset"):
        subject(loop=None)


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
        "mine:subject",
        "--policies",
        "norm,accel",
        "--taus",
        "0.003,0.5",
        "--json",
        "out.json",
        "--plot",
        "out.png",
        "--save",
        "choice.yaml",
    )
    assert code == 0, err
    assert "ms/row" in out
    assert "within 0.01 of size" in out
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["about"]["model"] == "mine:subject"
    assert saved["rows"][0]["agreement"] is None
    assert (tmp_path / "out.png").stat().st_size > 10_000
    model, x = Contracting().eval(), torch.ones(3, WIDTH)
    with torch.no_grad(), haltkit.attach(model, tmp_path / "choice.yaml") as session:
        model(x)
    assert session.computed < LOOPS


def test_a_card_leaves_out_a_description_with_functions_and_attach_takes_it_beside_the_card(
    command: Any, tmp_path: Path
) -> None:
    """Functions are code, which no file contains; the threshold is worth saving all the same."""
    code, out, err = command(
        "mine:functions", "--policies", "norm", "--repeats", "1", "--taus", "0.003,0.5", "--save", "c.yaml"
    )
    assert code == 0, err
    assert "functions (initial): give it to attach beside the card, as loop=" in out
    assert "body" not in (tmp_path / "c.yaml").read_text()
    model, x = Contracting().eval(), torch.ones(3, WIDTH)
    with pytest.raises(AttachError, match="describe its loop"):
        haltkit.attach(model, tmp_path / "c.yaml")
    with torch.no_grad(), haltkit.attach(model, tmp_path / "c.yaml", body=["body"]) as session:
        model(x)
    assert session.computed < LOOPS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mine"], "is written pkg.mod:function"),
        (["nowhere:trial"], "No module named 'nowhere'"),
        (["--model", ".:x"], "relative import"),
        (["--model", "mine:nothing"], "has no function 'nothing'"),
        (["--model", "mine:wrong"], "must return a haltkit.subject.Subject, not a int"),
        (["--model", "mine:broken"], "no module 'bodi' in Contracting"),
        (["--model", "mine:subject", "--tokens", "5"], "--tokens is for checkpoints"),
        (["mine:subject", "--save", "choice.txt"], "must end in .yaml, .yml"),
        (["--json", "a.json", "--save", "a.json"], "must end in"),
        (["mine:subject", "mine:subject"], "unexpected extra argument"),
        (["mine:subject", "--model", "mine:subject"], "both name the model"),
        (["mine:subject", "--policies", "norm:tau=2", "--save", "c.yaml"], "so 'c.yaml' was not written"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], message: str, command: Any, tmp_path: Path) -> None:
    code, _, err = command(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.yaml"))
