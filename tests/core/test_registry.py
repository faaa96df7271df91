"""The spec language: what parses, what it builds, how it prints, and what it refuses."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import haltkit
from cases import Nervous, run_command
from haltkit import registry
from haltkit.card import Card
from haltkit.policies import Acceleration, Fixed, StepNorm
from haltkit.specs import (
    UnprintablePolicy,
    parse_choices,
    parse_spec,
    parse_spec_list,
    policy_for_regions,
    regions_named,
    spec_of,
)
from haltkit.weights import WeightsMisfit
from haltkit.wrappers import AllOf, AnyOf, CheckEvery, MinSteps, Patience, Pooled


def test_specs_build_what_they_say() -> None:
    assert haltkit.policy("norm:tau=1e-3") == StepNorm(1e-3)
    assert haltkit.policy("accel", tau=1e-3) == Patience(Acceleration(1e-3), 2)
    assert haltkit.policy("accel:tau=1e-3,patience=1") == Acceleration(1e-3)
    assert haltkit.policy("fixed:steps=8") == Fixed(8)
    assert haltkit.policy("norm:tau=1,granularity=sequence,pool=max") == Pooled(StepNorm(1.0), "sequence", "max")
    assert haltkit.policy("norm:tau=1,patience=3,min_steps=4,check_every=2") == MinSteps(
        CheckEvery(Patience(StepNorm(1.0), 3), 2), 4
    )
    assert haltkit.policy("any(norm:tau=1|fixed:steps=8)") == AnyOf((StepNorm(1.0), Fixed(8)))
    nested = haltkit.policy("all(norm:tau=1|any(norm:tau=2|fixed:steps=3)):patience=2")
    assert nested == Patience(AllOf((StepNorm(1.0), AnyOf((StepNorm(2.0), Fixed(3))))), 2)


def test_a_policy_for_one_region_is_none_for_all() -> None:
    with pytest.raises(ValueError, match="is for all of them"):
        parse_spec_list("4=accel:tau=1;5-6=norm:tau=1")
    with pytest.raises(ValueError, match="not a policy spec"):
        parse_spec("accel tau")


def test_a_class_of_ones_own_by_its_place() -> None:
    assert haltkit.policy("cases:Nervous") == Nervous()
    assert haltkit.policy("cases:Nervous:calm=true,mood=fine,min_steps=3") == MinSteps(Nervous(True, "fine"), 3)
    assert str(spec_of(Nervous(calm=True))) == "cases:Nervous:calm=True"


def test_a_class_of_ones_own_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [EntryPoint("nervous", "cases:Nervous", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    assert haltkit.policy("nervous:calm=true") == Nervous(calm=True)
    assert "nervous" in registry.known_names()


MODULE = """
from dataclasses import dataclass
import haltkit

@haltkit.register("{registered}")
@dataclass(frozen=True)
class Own:
    tau: float
    def init(self, x0): return None
    def update(self, state, step): raise NotImplementedError
"""


def test_a_policy_with_the_name_of_its_module_prints_as_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "twofold.py").write_text(MODULE.format(registered="twofold"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry._TABLE, "rows", dict(registry._TABLE.rows))
    policy = haltkit.policy("twofold:Own:tau=1")
    assert str(spec_of(policy)) == "twofold:Own:tau=1.0"
    assert haltkit.policy(str(spec_of(policy))) == haltkit.policy("twofold:tau=1") == policy


def test_a_name_that_haltkit_gives_hides_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "norm.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="key=value"):
        parse_spec("norm:Own")


@dataclass(frozen=True)
class Steady:
    """A learned policy: halts a row when a linear readout of its step is small."""

    tau: float
    weights: haltkit.Weights = field(compare=False, repr=False)

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
        score = (step.d @ self.weights.like(step.d)["w"]).abs()
        return None, haltkit.Verdict(score, score < self.tau)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry as it is, and afterwards again."""
    monkeypatch.setattr(registry, "_TABLE", registry._Table(dict(registry._TABLE.rows)))


@pytest.mark.usefixtures("table")
def test_a_policy_registered_in_one_place_is_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    from cases import example_specs
    from haltkit.cli.policies import policies
    from haltkit.comparison.settings import candidates
    from haltkit.models.gpt.bench import policy_cost

    haltkit.register(
        "half", formula="|x_k| / 2", scale="[0, inf)", patience=3, swept=True, examples=("tau=0.5",), cost="tau=1e-30"
    )(Half)
    # In specs, with its default patience; printed by its place, which another process finds without the name.
    assert haltkit.policy("half:tau=2") == Patience(Half(2.0), 3)
    assert str(spec_of(Patience(Half(2.0), 3))) == f"{__name__}:Half:tau=2.0"
    assert haltkit.policy(str(spec_of(Patience(Half(2.0), 3)))) == Patience(Half(2.0), 3)
    with pytest.raises(ValueError, match="did you mean half"):
        haltkit.policy("haf:tau=1")
    # In the laws' table, the bench, the listing and a comparison's default policies.
    assert example_specs()["half"] == "half:tau=0.5"
    [row] = policy_cost((64,), (8,), 100, seconds=0.001, dtypes=[torch.float32])
    assert row["relative"]["half"] > 0
    policies()
    shown = capsys.readouterr().out
    for word in ("half", "|x_k| / 2", "patience (3)", "swept by haltkit compare"):
        assert word in shown, word
    subject = haltkit.Subject.of_modules(torch.nn.Identity(), lambda x, n: x, {"loop": ""})
    assert [one.name for one in candidates(None, subject)] == ["accel", "half", "norm"]  # no readout, so no kl
    with_readout = replace(subject, readout=lambda x: x)
    assert [one.name for one in candidates(None, with_readout)] == ["accel", "half", "kl", "norm"]


@dataclass(frozen=True)
class Half:
    """Halts when the state is short."""

    tau: float

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
        score = step.x.norm(dim=-1) / 2
        return None, haltkit.Verdict(score, score < self.tau)


@pytest.mark.usefixtures("table")
def test_what_a_policy_is_registered_with_is_its_record() -> None:
    given: dict[str, Any] = {
        "formula": "f",
        "scale": "s",
        "patience": 3,
        "needs_readout": True,
        "wrapped": False,
        "swept": True,
        "examples": ("tau=1",),
        "cost": "tau=2",
        "sweep": ("times", (1, 2)),
        "greatest_tau": 7.0,
        "source": "a paper",
    }
    haltkit.register("half", **given)(Half)
    assert vars(registry.record_of("half")) == {"name": "half", "policy": Half, **given}
    assert set(inspect.signature(haltkit.register).parameters) == {"name", *given}


def test_every_formula_has_its_source_where_it_is_listed_and_where_it_is_implemented() -> None:
    """The papers in the listing are those of the class's docstring: a source that is corrected is corrected in both."""
    for record in registry.records():
        if record.policy is Fixed or not record.policy.__module__.startswith("haltkit."):
            continue
        assert record.source, record.name
        papers = set(re.findall(r"\d{4}\.\d{5}", record.source))
        assert papers or record.source == "haltkit's own", record.name
        assert papers <= set(re.findall(r"\d{4}\.\d{5}", inspect.getdoc(record.policy) or "")), record.name


@pytest.mark.usefixtures("table")
def test_a_name_belongs_to_one_class() -> None:
    haltkit.register("half")(Half)
    haltkit.register("half", patience=2)(Half)  # its module was loaded anew
    assert registry.record_of(Half).patience == 2
    with pytest.raises(ValueError, match="choose another"):
        haltkit.register("half")(Nervous)
    for name in ("any", "two words", "a:b", ""):
        with pytest.raises(ValueError, match="cannot name a policy"):
            haltkit.register(name)(Nervous)
    with pytest.raises(ValueError, match="not a dataclass"):
        haltkit.register("plain")(type("Plain", (), {}))


def test_weights_are_neither_compared_nor_printed_nor_gathered(tmp_path: Path) -> None:
    ones, twos = (haltkit.Weights({"w": torch.full((6,), float(n))}) for n in (1, 2))
    policy = Steady(0.5, weights=ones)
    assert policy == Steady(0.5, weights=twos)
    assert "weights" not in repr(policy)
    x0 = torch.randn(5, 6, dtype=torch.float64)
    result = haltkit.run_loop(lambda x: 0.5 * x, x0, policy)
    # The state is None, so that nothing of the weights can be gathered by rows, and they follow the state's dtype.
    assert policy.init(x0) is None
    assert ones.like(x0)["w"].dtype == torch.float64
    assert ones.like(x0)["w"] is ones.like(x0 + 1)["w"]
    expected = [next(k for k in range(1, 99) if float((x0[i] * 0.5**k).sum().abs()) < 0.5) for i in range(5)]
    assert result.steps.tolist() == expected
    with pytest.raises(UnprintablePolicy, match="in no file"):
        spec_of(policy)
    kept = Steady(0.5, weights=ones.save(tmp_path / "w.safetensors"))
    spec = str(spec_of(kept))
    assert spec == f"{Steady.__module__}:Steady:tau=0.5,weights={tmp_path / 'w.safetensors'}"
    again: Any = haltkit.policy(spec)
    assert torch.equal(again.weights.like(x0)["w"], ones.like(x0)["w"])
    with pytest.raises(ValueError, match="no file"):
        haltkit.policy(spec.replace("w.safetensors", "x.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(ValueError, match="cannot be read"):
        haltkit.Weights.load(tmp_path / "bad.safetensors")
    not_weights: list[Any] = [{}, {3: torch.ones(2)}, {"w": 1.0}, [torch.ones(2)], None]
    for tensors in not_weights:
        with pytest.raises(ValueError, match="at least one tensor"):
            haltkit.Weights(tensors)
    with pytest.raises(ValueError, match="complex64"):
        haltkit.Weights({"w": torch.ones(1) * 1j})


def test_weights_that_share_memory_are_saved_each_whole(tmp_path: Path) -> None:
    w = torch.arange(6.0).view(2, 3)
    given = {"w": w, "row": w[1], "turned": w.T}
    haltkit.Weights(given).save(tmp_path / "w.safetensors")
    found = haltkit.Weights.load(tmp_path / "w.safetensors").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("rows", [5, 2**22 // 6 + 1])  # many rows are judged in parts
def test_weights_of_another_width_are_named(execution: Any, rows: int) -> None:
    policy = AnyOf((StepNorm(1e-9), Patience(Steady(0.5, haltkit.Weights({"w": torch.ones(3)})), 2)))
    with pytest.raises(WeightsMisfit, match=r"w: \(3,\)"):
        haltkit.run_loop(lambda x: 0.5 * x, torch.ones(rows, 6), policy, execution=execution)


def test_an_error_of_a_policy_without_weights_is_its_own() -> None:
    with pytest.raises(RuntimeError, match="size"):
        haltkit.run_loop(lambda x: 0.5 * x, torch.ones(5, 6), Unsound())


def test_combinations_nest_to_a_limit_and_what_is_no_spec_is_named() -> None:
    def nested(depth: int) -> str:
        return "any(norm:tau=1|" * depth + "norm:tau=2" + ")" * depth

    assert str(spec_of(haltkit.policy(nested(32)))) == nested(32).replace("tau=1", "tau=1.0").replace("=2", "=2.0")
    for text in (nested(33), nested(3000), "any(" * 2000, "a=" + nested(3000)):
        with pytest.raises(ValueError, match="nested") as caught:
            haltkit.Setting.of(text, ("a",))
        assert len(str(caught.value)) < 200
    not_specs: list[Any] = [None, 3, StepNorm(1.0)]
    for one in not_specs:
        with pytest.raises(ValueError, match="a spec is expected"):
            haltkit.policy(one)


@dataclass(frozen=True)
class Unsound:
    """Multiplies what does not fit."""

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
        score = step.d @ torch.ones(3)
        return None, haltkit.Verdict(score, score < 1)


def test_weights_moved_in_inference_mode_serve_gradients_later() -> None:
    weights = haltkit.Weights({"w": torch.ones(6)})
    with torch.inference_mode():
        weights.like(torch.ones(6, dtype=torch.float64))
    x = torch.ones(6, dtype=torch.float64, requires_grad=True)
    (x @ weights.like(x)["w"]).backward()
    assert x.grad is not None


@dataclass(frozen=True)
class Worded:
    words: str = ""
    places: tuple[int, ...] = ()

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
        raise NotImplementedError


def test_what_a_spec_cannot_say_is_refused_by_name() -> None:
    @dataclass(frozen=True)
    class Inner(Worded):
        pass

    policies: list[Any] = [
        Worded("a,b"),
        Worded("a=b"),
        Worded(""),
        Worded("x y"),
        Worded(places=(1,)),
        Inner(),
        object(),
        Patience(MinSteps(StepNorm(1.0), 2), 2),
        Pooled(StepNorm(1.0), "batch"),
        MinSteps(Fixed(2), 3),
    ]
    printable = [policy for policy in policies if _prints(policy)]
    assert printable == [Worded(""), Pooled(StepNorm(1.0), "batch")]


def _prints(policy: Any) -> bool:
    try:
        return spec_of(policy).build() == policy
    except UnprintablePolicy:
        return False


@pytest.mark.parametrize("kind", ["any", "all"])
def test_a_combination_is_as_causal_as_its_worst_part(kind: str) -> None:
    for parts, causal in (
        ("accel:tau=1,granularity=token|norm:tau=1,granularity=batch", False),
        ("accel:tau=1,granularity=sequence|norm:tau=1", False),
        ("norm:tau=1|any(norm:tau=1|kl:tau=1,granularity=batch):min_steps=2", False),
        ("accel:tau=1,granularity=token|norm:tau=1", True),
        ("accel:tau=1|fixed:steps=3", True),
    ):
        assert haltkit.Setting.of(f"{kind}({parts})", ["4", "7"]).causal is causal, parts
    assert not haltkit.Setting.of("4=norm:tau=1;7=norm:tau=1,granularity=batch", ["4", "7"]).causal
    assert haltkit.Setting.of(3, ["4", "7"]).causal


def test_fixed_policies_in_every_region_are_a_depth() -> None:
    regions = ["4", "7"]
    assert haltkit.Setting.of("fixed:steps=3", regions) == haltkit.Setting.of(3, regions)
    differing = haltkit.Setting.of("7=fixed:steps=5;4=fixed:steps=3", regions)
    assert differing.how == haltkit.Depth({"4": 3, "7": 5})
    assert (differing.text, differing.label) == ("4=fixed:steps=3;7=fixed:steps=5", "fixed 3 5")
    assert differing.depth is not None
    assert differing.depth.same is None
    mixed = haltkit.Setting.of("4=fixed:steps=3;7=norm:tau=1", regions)
    assert mixed.depth is None
    assert mixed.policies == {"4": Fixed(3), "7": StepNorm(1.0)}
    with pytest.raises(ValueError, match="the model's are 4, 7"):
        haltkit.Setting.of(haltkit.Depth({"4": 1}), regions)
    with pytest.raises(ValueError, match="at least 1 step"):
        haltkit.Setting.of(0, regions)


tau = st.floats(1e-9, 1e3).map(lambda v: float(f"{v:.3g}"))
leaves = st.builds(
    lambda name, tau, keys: f"{name}:tau={tau!r}" + "".join(f",{k}={v}" for k, v in keys.items()),
    st.sampled_from(["norm", "norm-rel", "kl", "accel", "accel-rel", "speed"]),
    tau,
    st.fixed_dictionaries(
        {},
        optional={
            "patience": st.integers(1, 4),
            "min_steps": st.integers(0, 9),
            "check_every": st.integers(1, 5),
            "granularity": st.sampled_from(["token", "sequence", "batch", "world"]),
            "pool": st.sampled_from(["mean", "max"]),
        },
    ),
)
specs = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda kind, parts: f"{kind}({'|'.join(parts)})",
        st.sampled_from(["any", "all"]),
        st.lists(inner, min_size=2, max_size=3),
    ),
    max_leaves=5,
)


@given(specs)
def test_the_spec_of_a_policy_builds_it_again(spec: str) -> None:
    built = haltkit.policy(spec)
    assert spec_of(built).build() == built
    assert parse_spec(str(parse_spec(spec))) == parse_spec(spec)


@given(st.lists(specs, min_size=1, max_size=4))
def test_a_list_of_specs_splits_where_specs_begin(many: list[str]) -> None:
    assert [spec.build() for spec in parse_spec_list(",".join(many))] == [haltkit.policy(spec) for spec in many]


def test_lists() -> None:
    assert [str(s) for s in parse_spec_list("accel, kl ,norm")] == ["accel", "kl", "norm"]
    assert [str(s) for s in parse_spec_list("accel,patience=3,any(norm:tau=1|kl:tau=2),min_steps=2,fixed:steps=3")] == [
        "accel:patience=3",
        "any(norm:tau=1|kl:tau=2):min_steps=2",
        "fixed:steps=3",
    ]


def test_lists_with_a_policy_for_each_region() -> None:
    assert parse_choices("accel,4=accel:tau=1,patience=3;5-6=norm,tau=2,min_steps=2,kl") == [
        "accel",
        "4=accel:tau=1,patience=3;5-6=norm:tau=2,min_steps=2",
        "kl",
    ]
    assert parse_choices("kl:tau=1,core=accel;refine=norm,choice.yaml") == [
        "kl:tau=1",
        "core=accel;refine=norm",
        "choice.yaml",
    ]
    assert regions_named("core=accel:tau=1;refine=norm:tau=2") == ("core", "refine")
    assert regions_named("accel:tau=1") == ()


def test_a_policy_for_each_region() -> None:
    both = policy_for_regions("4=accel:tau=1e-3,patience=3;5-6=norm:tau=1", ["4", "5-6"])
    assert both == {"4": Patience(Acceleration(1e-3), 3), "5-6": StepNorm(1.0)}
    assert policy_for_regions("norm:tau=1", ["4", "7"]) == {"4": StepNorm(1.0), "7": StepNorm(1.0)}
    with pytest.raises(ValueError, match="the model's regions are 4, 7"):
        policy_for_regions("4=norm:tau=1", ["4", "7"])
    with pytest.raises(ValueError, match="given twice"):
        policy_for_regions("4=norm:tau=1;4=norm:tau=2", ["4"])
    with pytest.raises(ValueError, match="not region=spec"):
        policy_for_regions("4=norm:tau=1;kl", ["4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acel:tau=1", "did you mean accel"),
        (
            "wobble",
            "known: norm, norm-rel, kl, accel, accel-rel, speed, settle, cosine, entropy, margin, stable, probe, gate, table, fixed",
        ),
        ("norm:tua=1", "did you mean tau"),
        ("norm", "needs tau"),
        ("norm:tau", "not key=value"),
        ("norm:tau=", "not key=value"),
        ("norm:tau=1,tau=2", "given twice"),
        ("norm:tau=small", "a number is expected"),
        ("fixed:steps=2.5", "a whole number is expected"),
        ("fixed:steps=0", "at least 1"),
        ("fixed:steps=3,patience=2", "fixed has no key 'patience'"),
        ("norm:tau=1,patience=0", "at least 1"),
        ("norm:tau=1,granularity=word", "allowed are token, sequence, batch, world"),
        ("kl:tau=1,direction=sideways", "allowed are current_previous, previous_current"),
        ("any(norm:tau=1)", "two or more"),
        ("any(norm:tau=1|kl:tau=1", "not closed"),
        ("any(norm:tau=1|kl:tau=1)x", "after the closing parenthesis"),
        ("any(norm:tau=1|kl:tau=1):pool=max", "any has no key 'pool'"),
        ("", "not a policy spec"),
        ("no.such.module:Policy", "cannot be loaded"),
        ("haltkit.registry:COMBINATIONS", "is not a class"),
        ("cases:Nervous:calm=perhaps", "true or false"),
    ],
)
def test_bad_specs_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        haltkit.policy(text)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="contradicts"):
        haltkit.policy("norm:tau=1", tau=2)
    assert haltkit.policy("norm:tau=1", tau="1") == StepNorm(1.0)
    with pytest.raises(ValueError, match="an empty item"):
        parse_spec_list("accel,,kl")


def test_weights_that_cannot_be_written_whole_leave_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    haltkit.Weights({"w": torch.ones(2)}).save(path)
    before = path.read_bytes()

    def full_disk(partial: Path, content: bytes) -> None:
        partial.touch()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="space"):
            haltkit.Weights({"w": torch.zeros(2)}).save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="folder"):
        haltkit.Weights({"w": torch.ones(2)}).save(tmp_path)


def test_a_card_names_each_region_once_and_says_of_a_misfit_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("policy: norm:tau=1\nregions: [loop, loop]\n")
    with pytest.raises(ValueError, match="more than once"):
        Card.load(path)
    path.write_text("policy: norm:tau=1\nmodel: Other\n")
    with pytest.raises(ValueError, match="made for Other, and this is a Linear with regions loop") as caught:
        Card.load(path).check(torch.nn.Linear(1, 1), ["loop"])
    assert "?" not in str(caught.value)
    path.write_text("policy: norm:tau=1\nloop: {body: [core], wobble: 3}\n")
    for arguments in (["solve", "chase", "0>1 1>1 0?", "--policy", path], ["compare", "chase", "--policies", path]):
        assert run_command(*arguments) == 2
        assert "wobble" in capsys.readouterr().err
