"""``haltkit diagnose``: the geometry of a model's loops, and which of the papers' claims it bears out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haltkit.cli.options import (
    JsonPath,
    WithoutCertificate,
    among,
    bundled_names,
    check_waiver,
    given_policies,
    seed_option,
)
from haltkit.cli.subjects import asked_options, is_function, resolve_case
from haltkit.cli.tables import print_claims
from haltkit.cli.terminal import check_writable, make_console, progress, say, say_standing, write_results

if TYPE_CHECKING:
    from rich.console import Console

    from haltkit.card import Card
    from haltkit.diagnostics import Diagnosis
    from haltkit.diagnostics.results import Cell
    from haltkit.specs import Policies


def diagnose(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A bundled model by name (text, chase, sudoku), a checkpoint or run folder, or pkg.mod:function "
            "returning a Subject (or a haltkit.diagnostics.Case, with an untrained control). \\[default: text]",
            show_default=False,
            autocompletion=bundled_names,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results, figures and claims.")] = Path(
        "diagnosis"
    ),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens for the geometry.")] = 2048,
    loops: Annotated[int, typer.Option(min=2, help="Depth of the geometry.")] = 32,
    deep_tokens: Annotated[int, typer.Option(min=0, help="Tokens for the long run; 0: no long run.")] = 512,
    deep_loops: Annotated[int, typer.Option(min=16, help="Depth of the long run, whose last state is x*.")] = 128,
    text: Annotated[
        Path | None, typer.Option(help="Text file. [default: the bundled held-out sample]", show_default=False)
    ] = None,
    snapshots: Annotated[
        Path | None,
        typer.Option(help="Snapshots, or their statistics, across training. [default: the run's]", show_default=False),
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="A loops-off model, for stages of inference.", show_default=False)
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also untrained blocks by norm, injection and layers (a minute).")
    ] = False,
    policies: Annotated[
        str | None,
        typer.Option(help="Policies with thresholds, or cards, whose steps the page shows.", show_default=False),
    ] = None,
    without_certificate: WithoutCertificate = False,
    seed: Annotated[int, seed_option("Seed of the untrained control's weights.")] = 0,
    figures: Annotated[str, among("png|svg|pdf", "Format of the figures.")] = "png",
    json_path: JsonPath = None,
) -> None:
    """Look into the loops of a model: figures, numbers as JSON, and a table of claims.

    An untrained model of the same shape runs beside it. Ctrl-C keeps what is done so far and marks it partial. A
    comparison written by 'haltkit compare --json DIR/compare.json' beforehand joins in.
    """
    if figures not in ("png", "svg", "pdf"):
        raise ValueError(f"--figures {figures}: allowed are png, svg, pdf")

    json_path = check_writable(json_path)

    from haltkit import diagnostics
    from haltkit.diagnostics.diagnosis import RESULTS_FILE
    from haltkit.locks import hold
    from haltkit.reporting.folder import check_folder, write_diagnosis
    from haltkit.specs import parse_spec

    comparison = check_folder(out)
    given = _policies(policies, without_certificate)
    plan = diagnostics.Plan(loops, deep_tokens, deep_loops)
    # A model that is not ours may run no deeper than it is asked to.
    if is_function(model):
        plan = replace(plan, attention_loops=min(plan.attention_loops, loops))
    told = {"text": text, "tokens": tokens, "seed": seed, "snapshots": snapshots, "control": control}
    depths = {"snapshot_loops": loops, "control_windows": plan.attention_windows}
    with progress("loading the model"):
        case = resolve_case(model, {**told, **depths}, asked_options(context))
    standing: dict[str, str] = {}
    if given is not None:
        shown: dict[str, Policies] = {}
        for one in given:
            if isinstance(one, str):
                shown[str(parse_spec(one))] = one
                continue
            found = one.check(case.subject.model, case.subject.regions, loops)
            shown[found.mark(one.policy)] = one.policies(case.subject.regions)
            standing |= {one.policy: str(found)} if str(found) else {}
        plan = replace(plan, policies=shown)
    blocks: Iterable[Cell] = ()
    if grid:
        from haltkit.models.gpt.grid import Grid

        blocks = Grid()
    diagnostics.Diagnosis(case.about)  # refuses what cannot be written, before anything is run
    with hold(out, "haltkit diagnose"), progress("") as tick:
        diagnosis = diagnostics.diagnose(
            case.subject,
            case.inputs,
            plan,
            untrained=case.untrained,
            snapshots=case.snapshots,
            control=case.control,
            grid=blocks,
            unfolding=case.unfolding,
            comparison=comparison,
            about=case.about,
            on_progress=lambda at: tick(description=at.what, completed=at.done, total=at.total),
            on_part=lambda part: part.save(out / RESULTS_FILE),
        )
        tick(description="drawing")
        written = write_diagnosis(diagnosis, out, figures)
    console = make_console(json_path)
    regions = diagnosis.trained.geometry.regions
    floors = {name: region.floor for name, region in regions.items() if region.floor}
    _report(console, diagnosis, floors, out, written)
    for spec, said in standing.items():
        say_standing(console, spec, said)
    results = {"heading": diagnosis.heading, "partial": diagnosis.partial, "claims": diagnosis.claims}
    results |= {"floors": floors, "standing": standing}
    write_results(console, json_path, results)
    if diagnosis.partial:
        say(console, "interrupted: what was done is kept, marked partial")
        raise typer.Exit(130)


def _policies(text: str | None, without_certificate: bool) -> list[str | Card] | None:
    """The policies to show; specs are built once, so that a missing threshold is said before a model is read."""
    from haltkit.specs import policy

    if text is None:
        check_waiver(without_certificate, [])
        return None
    given = given_policies(text, without_certificate)
    for one in given:
        if isinstance(one, str):
            policy(one)
    return given


def _report(console: Console, diagnosis: Diagnosis, floors: dict[str, float], out: Path, figures: list[Path]) -> None:
    from haltkit.diagnostics.diagnosis import RESULTS_FILE
    from haltkit.reporting.folder import CLAIMS_FILE

    print_claims(console, diagnosis)
    if floors:
        listed = ", ".join(f"{name}: {floor:.1e}" for name, floor in floors.items())
        say(console, f"\nFloat floor of a step; a threshold near or below it says nothing: {listed}")
    say(console, f"\nresults: {out / RESULTS_FILE}\nclaims: {out / CLAIMS_FILE}")
    say(console, f"figures in {out}: {', '.join(path.name for path in sorted(figures))}")
    say(console, f"a page of it: haltkit report {out}")
