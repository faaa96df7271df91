"""``haltkit diagnose``: the geometry of a model's loops, and which of the papers' claims it bears out."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haltkit.cli.terminal import make_console

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console
    from torch import Tensor

    from haltkit.diagnostics.claims import Finding, Value
    from haltkit.diagnostics.plan import Case, Plan
    from haltkit.models.checkpoint import Checkpoint
    from haltkit.models.diagnosing import Snapshot

RESULTS, CLAIMS, COMPARISON = "diagnose.json", "claims.md", "compare.json"
FORMAT = "haltkit-diagnose-2"


def diagnose(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, run folder, or pkg.mod:function returning a haltkit.diagnostics.Case. "
            "[default: the bundled checkpoint]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results, figures and claims.")] = Path(
        "diagnosis"
    ),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens for the geometry.")] = 2048,
    loops: Annotated[int, typer.Option(min=2, help="Depth of the geometry.")] = 32,
    deep_tokens: Annotated[int, typer.Option(min=0, help="Tokens for the long run; 0 leaves it out.")] = 512,
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
        str | None, typer.Option(help="Policies with thresholds whose steps the page shows.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the untrained control's weights.")] = 0,
    figures: Annotated[str, typer.Option(metavar="png|svg|pdf", help="Format of the figures.")] = "png",
) -> None:
    """Look into the loops of a model: figures, numbers as JSON, and a table of claims.

    An untrained model of the same shape runs beside it. Ctrl-C keeps what is done so far and marks it partial. A
    comparison written by 'haltkit compare --json DIR/compare.json' beforehand joins in.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from haltkit.diagnostics.plan import Plan

    if figures not in ("png", "svg", "pdf"):
        raise ValueError(f"--figures {figures}: allowed are png, svg, pdf")
    specs = _policies(policies)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is not a folder")
    plan = Plan(loops, deep_tokens, deep_loops, policies=specs or Plan.policies)
    case, extra = _case(model, text, tokens, seed)
    if extra.windows is None:  # not our model: it may run no deeper than it is asked to
        plan = replace(plan, attention_loops=min(plan.attention_loops, loops))
    snapshots = snapshots or extra.snapshots
    beside = _beside(extra, snapshots, control, plan.loops)
    results: dict[str, Any] = {
        "format": FORMAT,
        "partial": True,
        "about": case.about,
        "models": {},
        "checkpoints": [],
        "control": None,
        "grid": None,
        "comparison": _comparison(out / COMPARISON),
    }
    out.mkdir(parents=True, exist_ok=True)
    console = make_console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    interrupted = False
    with Progress(*columns, console=console, transient=True) as bar:
        try:
            interrupted = not _gather(results, case, plan, beside, grid, out, bar)
        except KeyboardInterrupt:
            interrupted = True
    results["partial"] = interrupted
    _finish(results, out, figures, console)
    if interrupted:
        console.print("interrupted: what was done is kept, marked partial", highlight=False)
        raise typer.Exit(130)


class _Extra:
    """What only a checkpoint has: windows of text for other checkpoints, and snapshots of its run."""

    def __init__(self, windows: Callable[[Checkpoint], Tensor] | None = None, snapshots: Path | None = None) -> None:
        self.windows, self.snapshots = windows, snapshots


@dataclass(frozen=True)
class _Beside:
    """What else is looked at: checked, so that a mistake is found before anything is run."""

    windows: Callable[[Checkpoint], Tensor] | None
    snapshots: Sequence[Snapshot]
    control: Path | None


def _beside(extra: _Extra, snapshots: Path | None, control: Path | None, loops: int) -> _Beside:
    if extra.windows is None:
        if snapshots or control:
            raise ValueError("--snapshots and --control are for checkpoints of the bundled model's kind")
        return _Beside(None, (), None)
    from haltkit.models import diagnosing

    found = diagnosing.find_snapshots(snapshots, loops) if snapshots is not None else ()
    return _Beside(extra.windows, found, None if control is None else diagnosing.find_control(control))


def _policies(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    from haltkit.registry import parse_spec_list

    specs = parse_spec_list(text)
    for spec in specs:
        spec.build()
    return tuple(str(spec) for spec in specs)


def _case(model: str | None, text: Path | None, tokens: int, seed: int) -> tuple[Case, _Extra]:
    if model is not None and ":" in model and not Path(model).exists():
        return _foreign(model), _Extra()
    import torch

    from haltkit.diagnostics.plan import Case
    from haltkit.models import comparing, diagnosing
    from haltkit.models.checkpoint import BUNDLED, load_checkpoint

    target = diagnosing.find_target(Path(model) if model else BUNDLED)
    loaded = load_checkpoint(target.checkpoint)
    if not loaded.model.regions:
        raise ValueError(f"{str(target.checkpoint)!r} is a model without looped regions: there is no loop to look at")

    def windows(checkpoint: Checkpoint) -> Tensor:
        return comparing.text_windows(checkpoint, text or comparing.SAMPLE, tokens)[:, :-1]

    about = {
        "model": model or "bundled",
        "regions": list(loaded.model.regions),
        "tokens_seen": loaded.trained.get("tokens"),
        "held_out_loss": loaded.trained.get("held_out_loss"),
        "text": str(text) if text else "bundled sample",
        "dtype": "float32",
        "torch": torch.__version__,
    }
    subject = diagnosing.subject_of(loaded.model, str(about["model"]), loaded.tokenizer)
    untrained = diagnosing.untrained_subject(loaded.config, seed)
    return Case(subject, windows(loaded), untrained, about), _Extra(windows, target.snapshots)


def _foreign(name: str) -> Case:
    from haltkit.cli.factories import call_factory
    from haltkit.diagnostics.plan import Case

    case: Case = call_factory(name, Case, f"{name!r} is no folder, and as pkg.mod:function")
    case.about.setdefault("model", case.subject.name)
    try:
        json.dumps(case.about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the 'about' of {name!r} goes into JSON, so give plain values: {error}") from None
    return case


def _comparison(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found["rows"]
        assert rows
        assert {"policy", "tau", "ce", "ms_per_token", "steps", "delta_ce"} <= rows[0].keys()
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise ValueError(f"{str(path)!r} is not what 'haltkit compare --json' writes: remove it") from None
    return dict(found)


def _gather(
    results: dict[str, Any],
    case: Case,
    plan: Plan,
    beside: _Beside,
    grid: bool,
    out: Path,
    bar: Any,
) -> bool:
    """Fill in the results part by part, each saved when it is done; False if one was cut short."""
    from haltkit.diagnostics.plan import run_plan

    subjects = {"trained": case.subject, **({} if case.untrained is None else {"untrained": case.untrained})}
    task = bar.add_task("", total=plan.ticks(case.inputs) * len(subjects))
    iterators = {
        name: run_plan(subject, case.inputs, plan, lambda: bar.advance(task)) for name, subject in subjects.items()
    }
    # Part by part, both models: an early end leaves every part that is there with its control.
    done = False
    while not done:
        for name, parts in iterators.items():
            step = next(parts, None)
            if step is None:
                done = True
                continue
            part, found = step
            bar.update(task, description=f"{part} of {name}")
            if not (name == "untrained" and part == "tokens"):
                results["models"].setdefault(name, {})[part] = found
            _save(results, out)
            if found.get("partial"):
                return False
    if beside.windows is not None:
        from haltkit.models import diagnosing

        windows = beside.windows
        bar.update(task, description="snapshots", completed=0, total=len(beside.snapshots) or None)
        for snapshot in beside.snapshots:
            results["checkpoints"].append(diagnosing.snapshot_statistics(snapshot, windows, plan.loops))
            bar.advance(task)
            _save(results, out)
        if beside.control is not None:
            from haltkit.diagnostics.stages import stage_numbers

            profile = diagnosing.control_profile(beside.control, lambda one: windows(one)[: plan.attention_windows])
            results["control"] = profile
            for survey in results["models"].values():
                survey["stages"] = stage_numbers(survey["attention"]["regions"], profile["profiles"])
            _save(results, out)
    if grid:
        from haltkit.models.cyclic import INJECTIONS, LAYERS, NORMS, cyclic_grid

        total = len(NORMS) * len(INJECTIONS) * len(LAYERS)
        bar.update(task, description="untrained blocks", completed=0, total=total)
        results["grid"] = []
        for cell in cyclic_grid():
            results["grid"].append(cell)
            bar.advance(task)
    return True


def _save(results: Mapping[str, Any], out: Path) -> None:
    """Compact JSON: most of it is rows of numbers."""
    from haltkit.models.files import atomic_path

    with atomic_path(out / RESULTS) as partial:
        partial.write_text(json.dumps(results, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def _finish(results: dict[str, Any], out: Path, fmt: str, console: Console) -> None:
    """Claims, figures and files, from whatever results there are."""
    from haltkit.diagnostics.claims import judge
    from haltkit.figures import draw_figures

    found = judge(results)
    results["claims"] = [finding.to_dict() for finding in found]
    _save(results, out)
    (out / CLAIMS).write_text(_markdown(results, found), encoding="utf-8")
    written = draw_figures(results, out, fmt)
    if results["comparison"] is not None:
        from haltkit.plots import plot_comparison

        path = out / f"figure4-policies.{fmt}"
        plot_comparison(_comparison_rows(results["comparison"]), path, "policies against fixed depths", fmt)
        written.append(path)
    _print_claims(console, results, found)
    regions = (results["models"].get("trained", {}).get("geometry") or {}).get("regions") or {}
    floors = ", ".join(f"{name}: {region['floor']:.1e}" for name, region in regions.items() if region["floor"])
    if floors:
        console.print(f"\nFloat floor of a step; a threshold near or below it says nothing: {floors}", highlight=False)
    console.print(f"\nresults: {out / RESULTS}\nclaims: {out / CLAIMS}", soft_wrap=True, highlight=False)
    names = ", ".join(path.name for path in sorted(written))
    console.print(f"figures in {out}: {names}", soft_wrap=True, highlight=False)
    console.print(f"a page of it: haltkit report {out}", soft_wrap=True, highlight=False)


def _comparison_rows(comparison: Mapping[str, Any]) -> list[Any]:
    from haltkit.comparison import Row

    known = {f.name for f in fields(Row)}
    rows = []
    for row in comparison["rows"]:
        values = {key: value for key, value in row.items() if key in known}
        values |= {key: float("inf") for key in ("delta_ce_se", "agreement_se") if values.get(key) is None}
        rows.append(Row(**values))
    return rows


def _show(values: Mapping[str, Value]) -> str:
    return "; ".join(
        f"{label}: {v.value:.3g}" + (f" ± {v.spread:.2g}" if v.spread is not None else "")
        for label, v in values.items()
    )


def _heading(results: Mapping[str, Any]) -> str:
    about = results["about"]
    seen = f", {about['tokens_seen']:,} tokens seen" if about.get("tokens_seen") else ""
    return f"{about['model']}{seen}" + (" (partial: interrupted)" if results["partial"] else "")


def _markdown(results: Mapping[str, Any], found: Sequence[Finding]) -> str:
    """The table of claims, as a document."""
    geometry = results["models"].get("trained", {}).get("geometry", {})
    limits = results["models"].get("trained", {}).get("limits", {})
    lines = [
        f"# Claims, judged on {_heading(results)}",
        "",
        f"Measured on {geometry.get('tokens', 0):,} tokens at {geometry.get('loops', 0)} loops and "
        f"{limits.get('tokens', 0):,} at {limits.get('loops', 0)}, {results['about'].get('dtype', 'its own dtype')}. "
        "± is one standard deviation over tokens. *Untrained* is the same shape with fresh weights. Rules stand in "
        "`haltkit/diagnostics/claims.py`. [P] is arXiv 2509.23314, [M] arXiv 2604.11791.",
        "",
        "| | claim | quantity and rule | measured | untrained | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        verdict = f"**{one.verdict}**" + (f": {one.reason}" if one.reason else "")
        cells = (
            one.name, f"{one.text} {one.paper}", f"{one.quantity}; *{one.rule}*", _show(one.measured),
            _show(one.untrained), verdict,
        )  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _print_claims(console: Console, results: Mapping[str, Any], found: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Claims, judged on {_heading(results)}", box=None, pad_edge=False, padding=(0, 1, 1, 0))
    wide = console.width >= 110
    if not wide:
        table.caption = f"what the untrained model measures, and every rule: {CLAIMS}"
    table.add_column("", no_wrap=True)
    table.add_column("claim", ratio=4)
    table.add_column("measured", ratio=4)
    if wide:
        table.add_column("untrained", ratio=4)
    table.add_column("verdict", ratio=3)
    for one in found:
        verdict = Text(one.verdict, style={"reproduced": "green", "not reproduced": "red"}.get(one.verdict, "yellow"))
        if one.reason:
            verdict.append(f" ({one.reason})", style="default")
        cells = [Text(one.name), Text(f"{one.text} {one.paper}"), Text(_show(one.measured))]
        table.add_row(*cells, *([Text(_show(one.untrained))] if wide else []), verdict)
    console.print(table)
