"""``haltkit fit``: learn when a model's rows have settled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from haltkit.cli.device import Device
from haltkit.cli.options import Data, JsonPath, MaxLoops, Model, Text, seed_option
from haltkit.cli.oracles import describe_auc
from haltkit.cli.subjects import asked_options, resolve
from haltkit.cli.terminal import check_writable, make_console, progress, say, write_results


def fit(
    context: typer.Context,
    model: Model = None,
    level: Annotated[
        float,
        typer.Option(
            help="Share of positions whose prediction must be full depth's; of boards that must not halt early."
        ),
    ] = 0.995,
    margin: Annotated[
        bool, typer.Option(help="Let the probe see the margin of the prediction: the readout runs at every step.")
    ] = True,
    seed: Annotated[int, seed_option("Of the split into samples to learn, choose and report on.")] = 0,
    save: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write a card with the fitted weights.")] = None,
    max_loops: MaxLoops = 32,
    sequences: Annotated[
        int | None, typer.Option(min=4, max=10_000_000, help="Sequences to record. \\[default: 512]")
    ] = None,
    text: Text = None,
    data: Data = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 8,
    device: Device = "auto",
    json_path: JsonPath = None,
) -> None:
    """Fit a probe per region that halts a row once its prediction will not change any more."""
    from haltkit.card import Card
    from haltkit.comparison.choice import save_fitted
    from haltkit.comparison.fitting import fit_probe

    json_path = check_writable(json_path)
    if save is not None:
        Card.check_folder(save)
    options = {"text": text, "data": data, "max_loops": max_loops, "batch": batch, "sequences": sequences or 512}
    passes = {"split": "validation", "execution": "masked", "ragged": True}
    with progress("loading the model") as tick:
        subject = resolve(model, options | passes, asked_options(context), device)
        tick(description=f"fitting on {len(subject.samples)} samples")
        found = fit_probe(subject, level=level, margin=margin, seed=seed)
    row, console = found.row, make_console(json_path)
    say(
        console,
        f"Agreement with full depth {row.agreement:.4f} ± {row.agreement_se:.4f}, on sequences that were not fitted on",
    )
    for name, tau in found.taus.items():
        known, missed, area = found.headroom[name].headroom, row.regret.get(name), found.aucs[name]
        say(console, f"Region {name}: probe tau={tau:g}, learned from {found.learned[name]:,} steps of rows")
        say(console, f"  AUC at step {found.headroom[name].step}: {describe_auc(area, 3)}")
        say(
            console,
            f"  oracle {known.mean_depth:.2f} steps; fixed depth {known.fixed_depth(level)} for agreement {level:g}",
        )
        if missed is not None:
            say(
                console,
                f"  {missed.steps:.2f} steps, {missed.wasted:.2f} wasted, {missed.early:.1%} of rows halted early",
            )
    depths = {name: one.headroom.fixed_depth(level) for name, one in found.headroom.items()}
    measured = {"aucs": found.aucs, "headroom": {name: one.to_json() for name, one in found.headroom.items()}}
    chosen = {"level": level, "taus": found.taus, "learned": found.learned, "fixed_depths": depths}
    write_results(
        console, json_path, {**chosen, "full_depth": found.full_depth, "row": replace(row, setting=None), **measured}
    )
    if save is not None:
        save_fitted(save, found, subject, str(subject.about.get("text", subject.name)))
        say(console, f"Saved {save}")
