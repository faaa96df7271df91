"""``haltkit headroom``: what halting could save on a model at best, before any policy is tried."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haltkit.cli.device import Device
from haltkit.cli.options import JsonPath, MaxLoops, Model, Text
from haltkit.cli.oracles import ORACLES, describe_auc, describe_headroom, oracle_of
from haltkit.cli.subjects import asked_options, resolve
from haltkit.cli.terminal import check_writable, make_console, progress, say, tell, write_results
from haltkit.measured import LEVEL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from torch import Tensor

    from haltkit.comparison.kept import Kept
    from haltkit.comparison.oracle import Oracle
    from haltkit.comparison.possible import Possible

LIVE_ROWS = 1024  # that the model is run on with the oracle's depths


def headroom(
    context: typer.Context,
    model: Model = None,
    level: Annotated[float, typer.Option(help="Share of rows on which the fixed depth may lose nothing.")] = LEVEL,
    oracle: Annotated[
        str, typer.Option(metavar="|".join(ORACLES), help="What an oracle waits for; see cli/README.md.")
    ] = "stable",
    epsilon: Annotated[float | None, typer.Option(min=0, help="Of eps-loss, in nats. \\[default: 0.01]")] = None,
    max_loops: MaxLoops = 32,
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to record.")] = 1536,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 2,
    device: Device = "auto",
    json_path: JsonPath = None,
) -> None:
    """How much halting could save on a model at best, and whether signals can see it."""
    from haltkit.comparison.kept import kept_live
    from haltkit.comparison.oracle import EPSILON
    from haltkit.comparison.possible import possible

    if not 0 < level <= 1:
        raise ValueError(f"--level {level} is outside (0, 1]: it is a share of rows")
    chosen = oracle_of(oracle, epsilon).or_epsilon(EPSILON)
    json_path = check_writable(json_path)
    options = {"text": text, "max_loops": max_loops, "tokens": tokens, "batch": batch}
    passes = {"data": None, "split": "validation", "execution": "masked", "ragged": True}
    with progress("loading the model") as tick:
        subject = resolve(model, options | passes, asked_options(context), device)
        tick(description="recording at full depth", total=len(subject.samples))
        oracles: list[Mapping[str, Tensor]] = []

        def recorded(depths: Mapping[str, Tensor]) -> None:
            oracles.append(depths)
            tick(advance=1)

        found = possible(subject, chosen, probe=True, on_sample=recorded)
        tick(description="running the model with the oracle's depths")
        subject = replace(subject, full_depth=next(iter(found.values())).headroom.full_depth)
        kept = kept_live(subject, found, oracles, level, LIVE_ROWS) if chosen.definition == "stable" else None
    if kept is not None:
        found = {name: replace(one, live=kept.late) for name, one in found.items()}
    console = make_console(json_path)
    for name, region in found.items():
        _print(console, name, region, level, chosen)
    if kept is not None:
        _print_kept(console, kept)
    regions = {name: _values(one, level) for name, one in found.items()}
    told = None if kept is None else asdict(kept)
    write_results(console, json_path, {"level": level, "epsilon": chosen.epsilon, "regions": regions, "live": told})


def _print(console: Console, name: str, region: Possible, level: float, oracle: Oracle) -> None:
    known = region.headroom
    within = "" if oracle.epsilon is None else f" within {oracle.epsilon:g} nats"
    seen = f"{known.rows:,} rows of {known.sequences} sequences at full depth {known.full_depth}"
    tell(console, f"Region {name}: {seen}, {known.definition} oracle{within}")
    most = max(known.histogram)
    for k, rows in enumerate(known.histogram, 1):
        if rows:
            say(console, f"  step {k:>3} {rows / known.rows:6.1%} {'#' * math.ceil(30 * rows / most)}")
    areas = {signal: by_step[region.step - 1] for signal, by_step in region.aucs.items()}
    if not all(math.isnan(area.value) for area in areas.values()):
        tell(console, f"  AUC at step {region.step}: {', '.join(f'{s} {describe_auc(a)}' for s, a in areas.items())}")
    for line in describe_headroom(name, region, level):
        tell(console, f"  {line}")
    say(console)


def _print_kept(console: Console, kept: Kept) -> None:
    first, *later = kept.late
    told = "".join(f", {lag} step{'s' * (lag > 1)} later on {share:.1%}" for lag, share in enumerate(later, 1))
    say(console, f"Run live, rows that leave at the oracle's step agree with full depth on {first:.1%}{told}")
    depths = " ".join(map(str, kept.depths.values()))
    several = " in " + ", ".join(kept.depths) if len(kept.depths) > 1 else ""
    tell(console, f"A fixed depth of {depths}{several} agrees on {kept.agreement:.1%}; haltkit compare looks for less")


def _values(region: Possible, level: float) -> dict[str, Any]:
    known = region.headroom
    summary = {"fixed_depth": known.fixed_depth(level), "headroom": known.headroom(level)}
    shares = [rows / known.rows for rows in known.histogram]
    return {**region.to_json(), **summary, "shares": shares, "conclusion": region.conclusion(level)}
