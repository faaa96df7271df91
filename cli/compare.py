"""``haltkit compare``: which policy, at which threshold, and is it really faster than a fixed depth?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from haltkit.cli.conclusions import print_conclusion
from haltkit.cli.device import Device
from haltkit.cli.options import (
    JsonPath,
    MaxLoops,
    Model,
    OldCheckpoint,
    OldModel,
    Repeats,
    Text,
    WithoutCertificate,
    among,
    check_waiver,
    chosen_model,
    given_policies,
    have_weights,
    read_thresholds,
)
from haltkit.cli.oracles import print_headroom, print_regret
from haltkit.cli.subjects import asked_options, resolve
from haltkit.cli.tables import comparison_title, print_comparison
from haltkit.cli.terminal import check_writable, make_console, progress, say, write_results


def compare(
    context: typer.Context,
    model: Model = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated policies: specs, one of which may be per region as in '4=accel;5-6=norm', and paths "
            "of saved choices; without tau they are swept. \\[default: those that 'haltkit policies' marks as swept]",
            show_default=False,
        ),
    ] = None,
    taus: Annotated[
        str,
        among("paper|auto|both|LIST", "Thresholds: the paper's, picked from observed scores, or a list."),
    ] = "both",
    text: Text = None,
    max_loops: MaxLoops = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure quality on, in whole windows.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 1,
    granularity: Annotated[
        str | None,
        among(
            "token|sequence|batch",
            "Which rows decide together. \\[default: token, and batch where a model is halted from outside]",
        ),
    ] = None,
    mode: Annotated[
        str,
        among("forward|decode", "A pass over the text, or token by token with a cache (slow: few --tokens)."),
    ] = "forward",
    execution: Annotated[
        str, among("compact|masked", "Compute tokens still looping, or all at every step.")
    ] = "compact",
    repeats: Repeats = 3,
    without_certificate: WithoutCertificate = False,
    device: Device = "auto",
    json_path: JsonPath = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw frontier and sweeps (png, svg or pdf).")
    ] = None,
    save_path: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE|FOLDER",
            help="Write the winner as a card for haltkit.attach and --policy: YAML, or a folder (needed for probes).",
        ),
    ] = None,
    checkpoint: OldCheckpoint = None,
    old_model: OldModel = None,
) -> None:
    """Compare halting policies at equal quality with each other and with fixed depths.

    Runs on the bundled text model by default, or on any model with a loop. The conclusion comes from the
    frontier of quality against wall-clock time: policies at equal thresholds cannot be compared, because their
    signals' scales differ.
    """
    from haltkit.card import Card

    named = chosen_model(model, checkpoint, old_model)
    given = None if policies is None else given_policies(policies, without_certificate)
    if given is None:
        check_waiver(without_certificate, [])
    thresholds = read_thresholds(taus)
    json_path = check_writable(json_path)
    plot_path = check_writable(plot_path, ("png", "svg", "pdf"))
    if save_path is not None and not save_path.suffix:
        Card.check_folder(save_path)
    elif save_path is not None and have_weights(given or []):
        raise ValueError(
            f"--save {save_path}: a policy among these has weights, which stand beside its card: name a folder, as in "
            f"--save {save_path.with_suffix('')}"
        )
    else:
        save_path = check_writable(save_path, ("yaml", "yml"))
    places = [path.resolve() for path in (json_path, plot_path, save_path) if path is not None]
    if len(set(places)) < len(places):
        raise ValueError(f"--json, --plot and --save name the same file more than once: {', '.join(map(str, places))}")

    from haltkit.comparison import compare as compare_subject
    from haltkit.comparison.choice import save_winner, undescribed

    options = {
        "text": text,
        "max_loops": max_loops,
        "tokens": tokens,
        "batch": batch,
        "mode": mode,
        "execution": execution,
    }
    with progress("loading the model") as tick:
        subject = resolve(named, options, asked_options(context), device)
        tick(description=f"looking at {len(subject.samples)} samples")
        result = compare_subject(
            subject,
            policies=given,
            taus=thresholds,
            granularity=granularity,
            repeats=repeats,
            on_tick=lambda done, total: tick(completed=done, total=total),
            on_doing=lambda what: tick(description=what),
        )
    console = make_console(json_path)
    print_headroom(console, result)
    print_comparison(console, result)
    print_conclusion(console, result)
    print_regret(console, result)
    write_results(console, json_path, result.to_json())
    if plot_path is not None:
        from haltkit.files import atomic_path
        from haltkit.reporting.frontier import plot_comparison

        with atomic_path(plot_path) as partial:
            plot_comparison(result, partial, comparison_title(result), plot_path.suffix[1:].lower())
        say(console, f"plot: {plot_path}")
    if save_path is not None:
        save_winner(save_path, result, subject, comparison_title(result))
        say(console, f"choice: {save_path}")
        if missing := undescribed(subject):
            say(console, missing)
