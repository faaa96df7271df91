"""``haltkit eval``: the loss of a model at any number of steps or under any policy."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from haltkit.cli.device import Device
from haltkit.cli.grid import Column, print_grid
from haltkit.cli.options import (
    MOST_STEPS,
    Data,
    JsonPath,
    Model,
    OldCheckpoint,
    Text,
    WithoutCertificate,
    check_waiver,
    chosen_model,
    read_policies,
)
from haltkit.cli.subjects import asked_options, resolve
from haltkit.cli.terminal import check_writable, make_console, progress, say_standing, write_results


def evaluate(
    context: typer.Context,
    model: Model = None,
    loops: Annotated[
        str, typer.Option(metavar="LIST", help="Numbers of steps, the same in every region; empty for none.")
    ] = "1,4,12,32",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="A policy with its tau, one per region as in '4=accel:tau=0.1;5-6=...', or the path of a saved "
            "choice; may be given several times.",
        ),
    ] = None,
    without_certificate: WithoutCertificate = False,
    max_loops: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="A policy's budget in each region.")] = 32,
    data: Data = None,
    split: Annotated[str, typer.Option(help="The split of --data.")] = "validation",
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to evaluate on.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 8,
    device: Device = "auto",
    json_path: JsonPath = None,
    checkpoint: OldCheckpoint = None,
) -> None:
    """The loss of a model at fixed numbers of steps and under halting policies."""
    from haltkit.comparison.evaluate import Evaluated
    from haltkit.comparison.evaluate import evaluate as measure
    from haltkit.setting import Setting

    named = chosen_model(model, checkpoint)
    json_path = check_writable(json_path)
    if data is not None and text is not None:
        raise ValueError(f"--data {data} and --text {text}: give one of them")
    counts = _counts(loops)
    check_waiver(without_certificate, policy or [])
    if not counts and not policy:
        raise ValueError("nothing to evaluate: give --loops or --policy")
    options = {
        "text": text,
        "data": data,
        "split": split,
        "max_loops": max_loops,
        "tokens": tokens,
        "batch": batch,
        "execution": "masked",
        "ragged": True,
    }
    with progress("loading the model"):
        subject = resolve(named, options, asked_options(context), device)
    regions = subject.regions
    if not regions and policy:
        raise ValueError(f"{named!r} is a model without looped regions: there is nothing to halt")
    settings = {f"{n} loop{'s' * (n > 1)}": Setting.of(n, regions) for n in counts}
    for spec in policy or []:
        read, standing = read_policies(spec, subject.model, regions, subject.full_depth, without_certificate)
        settings[standing.mark(spec)] = Setting.of(read, regions).named(spec, standing=standing)
    if not regions:
        settings = {"no loops": Setting.of(1, regions)}
    found: dict[str, Evaluated] = {}
    with progress("") as tick:
        # Policies first: one that cannot run on this model is refused before anything is measured.
        for label in sorted(settings, key=lambda label: settings[label].depth is not None):
            tick(description=label, completed=len(found), total=len(settings))
            found[label] = measure(subject, settings[label])
    found = {label: found[label] for label in settings}
    items = next(iter(found.values())).items
    about = subject.about
    shown = "bundled checkpoint" if str(about["model"]).startswith("bundled") else str(named)
    nats = subject.unit == "nats"
    losses = [one.loss for one in found.values()]
    columns = [
        Column("setting", list(found), left=True),
        Column(
            f"{subject.metric} ({subject.unit})" if nats else subject.metric,
            [f"{loss:.4f}" if nats else f"{loss:.4g}" for loss in losses],
        ),
    ]
    if nats:
        columns.append(Column("PPL", [f"{math.exp(loss):.1f}" for loss in losses]))
    columns += [Column(f"steps {name}", [f"{one.steps[name]:.1f}" for one in found.values()]) for name in regions]
    console = make_console(json_path)
    print_grid(console, columns, title=f"{shown}, {items:,} {subject.item}s of {about['text']}")
    said = {label: str(setting.standing) for label, setting in settings.items()}
    for label, setting in settings.items():
        say_standing(console, setting.sweep or label, setting.standing)
    results = [
        {"setting": label, "standing": said[label], "loss": one.loss, "steps": one.steps}
        for label, one in found.items()
    ]
    kept = {"checkpoint": named or "bundled", "text": about["text"], f"{subject.item}s": items, "max_loops": max_loops}
    extra = {"trained": about.get("trained"), "metric": subject.metric, "unit": subject.unit}
    write_results(console, json_path, {**kept, **extra, "results": results})


def _counts(loops: str) -> list[int]:
    counts = []
    for item in filter(None, loops.split(",")):
        if not item.strip().isdigit() or int(item) < 1:
            raise ValueError(f"--loops {loops}: {item!r} is not a positive number")
        counts.append(int(item))
    return counts
