"""``haltkit compare``: which policy, at which threshold, and is it really faster than a fixed depth?"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from haltkit.comparison import Comparison, Finding, Row


def compare(
    policies: Annotated[
        str, typer.Option(help="Comma-separated policies; one without tau is swept (see 'haltkit policies').")
    ] = "accel,kl,norm",
    taus: Annotated[
        str,
        typer.Option(
            metavar="paper|auto|both|LIST", help="Thresholds: the paper's, picked from observed scores, or a list."
        ),
    ] = "both",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder. [default: the bundled one]", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file. [default: the bundled held-out sample]", show_default=False)
    ] = None,
    max_loops: Annotated[int, typer.Option(min=1, help="Full depth: the budget of each region.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure quality on.")] = 1536,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a batch.")] = 1,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar="token|sequence|batch", help="Which rows decide together. [default: token]", show_default=False
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="forward|decode", help="A pass over the text, or token by token with a cache (slow: few --tokens)."
        ),
    ] = "forward",
    execution: Annotated[
        str,
        typer.Option(metavar="compact|masked", help="Compute tokens still looping, or all at every step."),
    ] = "compact",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved timing repeats.")] = 3,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the measurements as JSON.")
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw frontier and sweeps (png, svg or pdf).")
    ] = None,
) -> None:
    """Compare halting policies at equal quality with each other and with fixed depths.

    Runs on the bundled checkpoint and text unless told otherwise. The conclusion comes from the frontier of quality
    against wall-clock time: policies at equal thresholds cannot be compared, because their signals' scales differ.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from haltkit.registry import parse_spec_list

    specs = parse_spec_list(policies)
    thresholds = _thresholds(taus)
    _writable(json_path)
    _writable(plot_path, ("png", "svg", "pdf"))
    if json_path is not None and plot_path is not None and json_path.resolve() == plot_path.resolve():
        raise ValueError(f"--json and --plot name the same file, {str(json_path)!r}")

    import torch

    from haltkit.comparison import findings
    from haltkit.models import comparing
    from haltkit.models.checkpoint import BUNDLED, load_checkpoint

    comparing.check_mode(mode, execution)
    loaded = load_checkpoint(checkpoint or BUNDLED)
    if not loaded.model.regions:
        raise ValueError(f"{str(checkpoint)!r} is a model without looped regions: there is nothing to halt")
    windows = comparing.text_windows(loaded, text or comparing.SAMPLE, tokens)
    settings = comparing.choose_settings(loaded, specs, thresholds, max_loops, windows[:2], granularity)

    console = _console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{len(settings)} settings, {len(windows)} windows", total=None)
        result = comparing.compare_checkpoint(
            loaded, settings, windows, batch=batch, max_loops=max_loops, repeats=repeats,
            mode=cast("Any", mode), execution=cast("Any", execution),
            on_tick=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    about = {
        "model": str(checkpoint) if checkpoint else "bundled",
        "trained": loaded.trained,
        "text": str(text) if text else "bundled sample",
        "device": f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "max_loops": max_loops,
        "batch": batch,
        "mode": mode,
        "execution": execution,
    }
    found = findings(result.rows)
    _print_table(console, result, list(loaded.model.regions), about)
    _print_findings(console, result, found)
    if json_path is not None:
        from haltkit.models.files import write_json

        write_json(json_path, _finite(result.to_dict(**about)))
        console.print(f"measurements: {json_path}", soft_wrap=True, highlight=False)
    if plot_path is not None:
        from haltkit.models.files import atomic_path
        from haltkit.plots import plot_comparison

        with atomic_path(plot_path) as partial:
            plot_comparison(
                result.rows, partial, f"{about['model']} checkpoint, {result.tokens:,} tokens of {about['text']}",
                plot_path.suffix[1:].lower(),
            )  # fmt: skip
        console.print(f"plot: {plot_path}", soft_wrap=True, highlight=False)


def _console() -> Console:
    """A console as wide as the terminal; a pipe or a file has room for every column."""
    import sys

    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)


def _thresholds(taus: str) -> str | list[float]:
    if taus in ("paper", "auto", "both"):
        return taus
    from haltkit.protocol import check_tau

    values = []
    for item in taus.split(","):
        try:
            values.append(float(item))
        except ValueError:
            raise ValueError(f"--taus {taus}: {item!r} is neither a number nor one of paper, auto, both") from None
        check_tau(values[-1])
    return values


def _writable(path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse a place that cannot be written to before minutes are spent on measuring."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ValueError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"cannot write {str(path)!r}: it is a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {str(path)!r}: it is not a regular file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"cannot write {str(path)!r}: permission denied")
    if suffixes and path.suffix[1:].lower() not in suffixes:
        raise ValueError(f"cannot draw {str(path)!r}: the name must end in .{', .'.join(suffixes)}")


def _finite(value: Any) -> Any:
    """JSON has no infinity: a standard error from one sequence alone is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_table(console: Console, result: Comparison, regions: Sequence[str], about: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from haltkit.comparison import within

    wide = console.width >= 110
    dropped: tuple[str, ...] = () if wide else ("PPL", "KL to full", "halted", "within 0.01")
    if console.width < 80:
        dropped += ("CE", "agree")
    table = Table(
        title=f"{about['model']} checkpoint, {result.tokens:,} tokens of {about['text']}, batch {about['batch']}, "
        f"{about['mode']}, {about['execution']}, {about['device']}, {about['dtype']}",
        caption="ms/token: median of the repeats and half their range, wall clock; delta: cross-entropy above full "
        "depth with its standard error; agree: top token as at full depth; steps: mean by region; halted: by the "
        "policy, not by the budget",
        box=None, pad_edge=False, padding=(0, 1),
    )  # fmt: skip
    table.add_column("setting", overflow="fold", min_width=16)
    headings = (
        "CE", "PPL", "delta (nats)", "KL to full", "agree", "steps", "halted", "ms/token", "speed", "within 0.01",
    )  # fmt: skip
    for heading in headings:
        if heading not in dropped:
            table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in result.rows:
        if previous is not None and row.policy != previous:
            table.add_section()
            table.add_row()
        previous = row.policy
        se = f"{row.delta_ce_se:.4f}" if math.isfinite(row.delta_ce_se) else "?"
        spread = (row.ms_spread[1] - row.ms_spread[0]) / 2
        cells = {
            "CE": f"{row.ce:.4f}",
            "PPL": f"{row.ppl:.1f}",
            "delta (nats)": f"{row.delta_ce:+.4f} ±{se}" if wide else f"{row.delta_ce:+.4f}",
            "KL to full": f"{row.kl_to_full:.1e}",
            "agree": f"{row.agreement:.1%}",
            "steps": " ".join(f"{row.steps[name]:.1f}" for name in regions),
            "halted": f"{row.outcomes['CONVERGED']:.0%}" if row.outcomes else "",
            "ms/token": f"{row.ms_per_token:.3f} ±{spread:.3f}" if wide else f"{row.ms_per_token:.3f}",
            "speed": f"{row.speedup:.2f}x",
            "within 0.01": within(row, 0.01),
        }
        table.add_row(Text(_label(row)), *(cells[heading] for heading in headings if heading not in dropped))
    console.print(table)


def _label(row: Row) -> str:
    """What tells this row from its neighbours."""
    if row.policy == "fixed":
        return f"fixed {row.spec.removeprefix('fixed:steps=')}"
    return f"{row.policy} tau={row.tau:g}" if row.tau is not None else row.spec


def _cost(row: Row) -> str:
    return f"{_label(row)}: {row.ms_per_token:.3f} ms/token, {row.speedup:.2f}x full depth"


def _print_findings(console: Console, result: Comparison, found: Sequence[Finding]) -> None:
    from rich.text import Text

    from haltkit.comparison import sweep_spread

    def say(line: str = "") -> None:
        console.print(Text(line), soft_wrap=False)

    if not all(row.causal for row in result.rows):
        say()
        say(
            "Non-causal: policies here decide for a whole sequence or batch, so when a token stops depends on later "
            "ones. Their quality is not what decoding token by token would give."
        )
    say()
    if not found:
        return
    say("Conclusion, from the frontier (fastest setting of at least this quality, against the best fixed depth)")
    level = None
    for finding in found:
        if (finding.kind, finding.level) != level:
            level = (finding.kind, finding.level)
            goal = f"within {finding.level:g} nats" if finding.kind == "ce" else f"agreement {finding.level:g}"
            best = finding.fixed
            reference = (
                f"{_label(best)}, {best.ms_per_token:.3f} ms/token" if best else "no fixed depth is that good for sure"
            )
            say(f"  {goal}: {reference}")
        if finding.best is None:
            say(f"    {finding.policy}: no setting is that good for sure on so few tokens")
        else:
            say(f"    {_cost(finding.best)}{f', {finding.verdict}' if finding.verdict else ''}")
    spreads = {name: sweep_spread(result.rows, name) for name in dict.fromkeys(f.policy for f in found)}
    swept = [f"{name} {spread:.4f}" for name, spread in spreads.items() if spread is not None]
    if swept:
        say("Cross-entropy, greatest minus least over a policy's thresholds (how much tuning it needs):")
        say("  " + ", ".join(swept))
    winners = [f.best for f in found if f.kind == "ce" and f.level == 0.01 and f.best is not None]
    good = [f for f in found if f.kind == "ce" and f.level == 0.01]
    if good and good[0].fixed is not None and all(f.verdict in (None, "slower") for f in good):
        say(f"Within 0.01 nats a fixed depth serves best here: {good[0].fixed.spec}")
    if winners:
        winner = min(winners, key=lambda row: row.ms_per_token)
        console.print(Text(f"Fastest policy within 0.01 nats, ready to paste: {winner.spec}"), soft_wrap=True)
