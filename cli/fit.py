"""``haltkit fit``: learn when a model's rows have settled, or how deep each kind of row goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haltkit.cli.device import Device
from haltkit.cli.options import Data, JsonPath, MaxLoops, Model, Text, seed_option
from haltkit.cli.oracles import ORACLES, describe_auc, oracle_of
from haltkit.cli.subjects import asked_options, resolve
from haltkit.cli.terminal import check_writable, make_console, progress, say, tell, write_results

if TYPE_CHECKING:
    from haltkit.comparison.fitting import Fitted
    from haltkit.comparison.oracle import Oracle
    from haltkit.subject import Subject


POLICIES = ("probe", "gate", "table")


def fit(
    context: typer.Context,
    model: Model = None,
    policy: Annotated[
        str, typer.Option(metavar="probe|gate|table", help="When to halt, an exit head, or a depth per kind of row.")
    ] = "probe",
    target: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(ORACLES),
            help="What counts as settled. \\[default: stable; of a gate eps-loss]",
            show_default=False,
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(min=0, help="Of eps-loss, in nats. \\[default: keeps 99% of the gain; of a table 0.01]"),
    ] = None,
    level: Annotated[
        float,
        typer.Option(
            help="Share of positions whose prediction must be full depth's; of boards that must not halt early. Chosen "
            "with one standard error to spare."
        ),
    ] = 0.995,
    margin: Annotated[
        bool, typer.Option(help="Let a probe see the margin of the prediction: the readout runs at every step.")
    ] = True,
    lag: Annotated[
        int,
        typer.Option(
            min=0, help="Teach that a row settles so many steps later: where rows read each other, 1 is worth trying."
        ),
    ] = 0,
    hidden: Annotated[
        int, typer.Option(min=0, max=4096, help="Units of a probe's hidden layer. \\[default: 0, without one]")
    ] = 0,
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
    """Fit a policy per region that halts a row once its prediction will not change any more, or gains no more."""
    from haltkit.card import Card
    from haltkit.comparison.choice import save_fitted, undescribed

    if policy not in POLICIES:
        raise ValueError(f"--policy {policy}: allowed are {', '.join(POLICIES)}")
    if not margin and policy != "probe":
        raise ValueError(f"--no-margin is for a probe: a {policy} does not see the margin")
    if hidden and policy != "probe":
        raise ValueError(f"--hidden is for a probe: a {policy} has no hidden layer")
    if lag and policy == "table":
        raise ValueError("--lag is for a probe or a gate: a table is not taught step by step")
    oracle = oracle_of(target or ("eps-loss" if policy == "gate" else "stable"), epsilon)
    json_path = check_writable(json_path)
    if save is not None:
        Card.check_folder(save)
    options = {"text": text, "data": data, "max_loops": max_loops, "batch": batch, "sequences": sequences or 512}
    passes = {"split": "validation", "execution": "compact", "ragged": True}
    with progress("loading the model"):
        subject = resolve(model, options | passes, asked_options(context), device)
    console = make_console(json_path)
    there = subject.about.get("sequences", sequences)
    if sequences is not None and there < sequences:
        say(console, f"The text has {there} sequences, not {sequences}: half of them are learned from")
    with progress(f"fitting on {len(subject.samples)} samples"):
        found = _fitted(subject, policy, level, oracle, seed, margin=margin, lag=lag, hidden=hidden)
    row = found.row
    tell(
        console,
        f"Agreement with full depth {row.agreement:.4f} ± {row.agreement_se:.4f}, where {level:g} was asked for, on "
        "sequences that were not fitted on",
    )
    cut = "" if found.target.epsilon is None else f" of {found.target.epsilon:.3g} nats"
    late = f", {found.lag} step{'s' * (found.lag > 1)} late" if found.lag else ""
    tell(console, f"Taught {found.target.definition}{cut}{late}")
    for name, chosen in found.policies().items():
        known, missed = found.headroom[name].headroom, row.regret.get(name)
        tell(console, f"Region {name}: {_described(found, name, chosen)}")
        if found.aucs:
            tell(console, f"  AUC at step {found.headroom[name].step}: {describe_auc(found.aucs[name], 3)}")
        tell(
            console,
            f"  oracle {known.mean_depth:.2f} steps; fixed depth {known.fixed_depth(level)} for agreement {level:g}",
        )
        if missed is not None:
            tell(
                console,
                f"  {missed.steps:.2f} steps, {missed.wasted:.2f} wasted, {missed.early:.1%} of rows halted early",
            )
    depths = {name: one.headroom.fixed_depth(level) for name, one in found.headroom.items()}
    measured = {"aucs": found.aucs, "headroom": {name: one.to_json() for name, one in found.headroom.items()}}
    made = {"policy": found.kind, "target": found.target, "lag": found.lag, "hidden": found.hidden}
    made |= {"taus": found.taus, "learned": found.learned}
    write_results(
        console,
        json_path,
        {
            "level": level,
            **made,
            "fixed_depths": depths,
            "full_depth": found.full_depth,
            "row": replace(row, setting=None),
            **measured,
        },
    )
    if save is not None:
        save_fitted(save, found, subject, str(subject.about.get("text", subject.name)))
        say(console, f"Saved {save}")
        if missing := undescribed(subject):
            tell(console, missing)


def _fitted(
    subject: Subject, policy: str, level: float, target: Oracle, seed: int, *, margin: bool, lag: int, hidden: int
) -> Fitted:
    from haltkit.comparison.fitting import fit_gate, fit_probe, fit_table

    if policy == "probe":
        return fit_probe(subject, level=level, margin=margin, target=target, lag=lag, hidden=hidden, seed=seed)
    if policy == "gate":
        return fit_gate(subject, level=level, target=target, lag=lag, seed=seed)
    return fit_table(subject, level=level, target=target, seed=seed)


def _described(found: Fitted, region: str, chosen: object) -> str:
    from haltkit.policies import Table

    learned = f"learned from {found.learned[region]:,}"
    if not isinstance(chosen, Table):
        return f"{found.kind} tau={found.taus[region]:g}, {learned} steps of rows"
    depths = chosen.weights.tensors[f"{region}/depths"]
    return f"table of {len(depths):,} kinds, {int(depths.min())} to {chosen.deepest(region)} steps, {learned} rows"
