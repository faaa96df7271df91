"""A diagnosis, as JSON, of a model that does everything as the two papers say; tests spoil it and look at the claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from haltkit.comparison import table as comparison_table
from haltkit.diagnostics import Diagnosis, judge
from haltkit.diagnostics.diagnosis import FORMAT
from haltkit.diagnostics.stages import resample

YES, NO, UNKNOWN = "reproduced", "not reproduced", "cannot tell at this scale"
K = 32
Spoil = Callable[[dict[str, Any]], object]


def region(
    rate: float = 0.5,
    cosine: float = 0.55,
    curvature: float = 2.0,
    spread: float = 0.1,
    least: float = 0.0,
    nonfinite: int = 0,
) -> dict[str, Any]:
    """A loop whose steps shrink by ``rate`` down to ``least``, at a constant angle and curvature."""
    return {
        "step_norm_mean": [max(10 * rate**k, least) for k in range(K)],
        "state_norm_mean": [16.0] * K,
        "cosine_mean": [None, *[cosine] * (K - 1)],
        "cosine_std": [None, *[spread] * (K - 1)],
        "curvature_mean": [None, *[curvature] * (K - 1)],
        "floor": 1e-6,
        "nonfinite": nonfinite,
    }


def dlr(value: float) -> dict[str, Any]:
    names = ("noise", "injected", "net", "net without d_1")
    return {"a -> b": {name: {"mean": value, "std": 0.1, "median": value} for name in names}}


def row(policy: str, tau: float, loss: float, ms: float, steps: float = 8.0) -> dict[str, Any]:
    return {
        "policy": policy,
        "spec": f"{policy}:tau={tau}",
        "label": "",
        "tau": tau,
        "depth": None,
        "loss": loss,
        "unit": "nats",
        "delta": loss - 5.0,
        "delta_se": 0.001,
        "agreement": None,
        "agreement_se": None,
        "kl_to_full": None,
        "steps": {"a": steps},
        "ms": ms,
        "ms_spread": [ms, ms],
        "ms_repeats": [],
        "speedup": 1.0,
        "outcomes": {},
        "causal": True,
    }


def comparison() -> dict[str, Any]:
    """As the paper tells it: accel gets faster and stays good, kl is slow, norm breaks at 1e-2."""
    taus = (1e-5, 1e-4, 1e-3, 1e-2)
    rows = [{**row("fixed", 1.0, 5.0, 10.0), "tau": None}]
    rows += [row("accel", tau, 5.0 + 0.0005 * i, 6 - 0.7 * i) for i, tau in enumerate(taus)]
    rows += [row("kl", tau, 5.0 + 0.001 * i, 8 - 0.5 * i) for i, tau in enumerate(taus)]
    rows += [row("norm", tau, 5.0 + 0.02 * i, 7 - 0.5 * i) for i, tau in enumerate(taus)]
    return compared(rows)


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A comparison with these rows, as JSON."""
    return {
        "format": comparison_table.FORMAT,
        "version": comparison_table.VERSION,
        "items": 64,
        "sequences": 4,
        "timed_items": 16,
        "metric": "CE",
        "item": "token",
        "levels": [0.001, 0.01, 0.05],
        "agreement_levels": [0.95, 0.99],
        "about": {},
        "unit": "nats",
        "rows": rows,
    }


def layer_counts(fixed: int = 100) -> dict[str, int]:
    return {"fixed point": fixed, "orbit": 100 - fixed, "slider": 0, "unknown": 0}


def limits(layers: int = 4, ratio: float = 50.0) -> dict[str, Any]:
    return {
        "limits": {"cosine": layer_counts()},
        "least_cosine": {"mean": 0.97, "std": 0.01} if layers > 1 else None,
        "distinct": 1.0 if layers > 1 else None,
        "layers": {f"layer {i}": {} for i in range(layers)},
        "layer_limits": {f"layer {i}": layer_counts() for i in range(layers)},
        "distance_over_small_step": {"mean": ratio, "std": 1.0},
    }


CONTROL = [0.1, 0.5, 0.9, 1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1, 0.3, 0.9]


def attention(profile: list[float], layers: int = 4) -> dict[str, Any]:
    return {
        "layers": [f"layer {i}" for i in range(layers)],
        "moved": [[3.0 * 0.4**t] * 4 for t in range(15)],
        "successive": [[1.0 * 0.5**t] * 4 for t in range(15)],
        "profiles": {"concentration": [profile] * 16},
    }


def cell_of(kind: str) -> dict[str, Any]:
    share = float("fixed" in kind)
    return {"limit": kind, "fixed": {"cosine": share, "distance": share}, "seeds": [{"limit": kind}] * 3}


def grid() -> list[dict[str, Any]]:
    """As [M] has it: injection settles all but Ouro's, without it only pre-norm rests, at one point."""
    cells = []
    for norm in ("pre", "branch", "residual", "branch+state"):
        for injection in ("every_step", "never"):
            for layers in (1, 2, 4):
                settled = norm == "pre" or (injection == "every_step" and norm != "branch+state")
                several = (
                    "cyclic fixed points" if injection == "every_step" and layers == 4 else "degenerate fixed point"
                )
                kind = "slider" if not settled else "fixed point" if layers == 1 else several
                cells.append({"norm": norm, "injection": injection, "layers": layers, **cell_of(kind)})
    return cells


def results() -> dict[str, Any]:
    """A model that does everything as the papers say."""
    snapshots = [
        {
            "tokens_seen": 10**i,
            "loops": K,
            "dlr": dlr(5.0),
            "regions": {"a": region(0.9 - 0.05 * i, 0.9 - 0.05 * i, spread=0.5 - 0.05 * i)},
        }
        for i in range(4, 9)
    ]
    trained = {
        "geometry": {"regions": {"a": region(0.6, least=1e-3)}, "dlr": dlr(5.0)},
        "limits": {"regions": {"a": limits()}},
        "attention": {"regions": {"a": attention(resample(CONTROL, 4))}},
    }
    untrained = {
        "geometry": {"regions": {"a": region(0.9, cosine=-0.3)}, "dlr": dlr(1.5)},
        "limits": {"regions": {"a": {**limits(ratio=0.4), "distinct": 0.0}}},
        "attention": {"regions": {"a": {**attention([0.5, 0.1, 0.6, 0.9]), "successive": [[1.0] * 4] * 15}}},
    }
    untrained["geometry"]["regions"]["a"]["curvature_mean"] = [None, *[1.3**k for k in range(31)]]
    return {
        "format": FORMAT,
        "about": {"tokens_seen": 3e8},
        "models": {"trained": trained, "untrained": untrained},
        "snapshots": snapshots,
        "comparison": comparison(),
        "grid": grid(),
        "control": {"tokens_seen": 300_000_000, "layers": [], "profiles": {"concentration": CONTROL}},
    }


def regions(found: dict[str, Any], part: str = "geometry") -> dict[str, Any]:
    inner: dict[str, Any] = found["models"]["trained"][part]["regions"]
    return inner


def rows(found: dict[str, Any], policy: str) -> list[dict[str, Any]]:
    return [r for r in found["comparison"]["rows"] if r["policy"] == policy]


def change(**values: Any) -> Spoil:
    """Let the trained model's steps be others."""
    return lambda found: regions(found)["a"].update(region(**values))


def two_layers(found: dict[str, Any]) -> None:
    regions(found, "limits")["a"] = limits(layers=2)
    regions(found, "attention")["a"]["layers"] = ["layer 0", "layer 1"]


def rulings(found: dict[str, Any]) -> dict[str, str]:
    """What every claim comes to, by its name."""
    return {judgement.name: judgement.ruling for judgement in judge(Diagnosis.from_json(found))}
