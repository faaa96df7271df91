"""``haltkit compare``: which policy, at which threshold, and is it really faster than a fixed depth?"""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from haltkit.cli.device import Device, choose_device, describe_device
from haltkit.cli.terminal import check_writable, make_console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from haltkit.attachment import Loop
    from haltkit.comparison import Comparison, Finding, Row
    from haltkit.registry import Spec


def compare(
    context: typer.Context,
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
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure quality on.")] = 1024,
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
    device: Device = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the measurements as JSON.")
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw frontier and sweeps (png, svg or pdf).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="pkg.mod:factory",
            help="A model of your own: a function that returns a haltkit.Trial.",
            show_default=False,
        ),
    ] = None,
    save_path: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Write the winning spec as YAML for haltkit.attach.")
    ] = None,
) -> None:
    """Compare halting policies at equal quality with each other and with fixed depths.

    Runs on the bundled checkpoint and text unless told otherwise, or on any model with a loop (--model), which it
    halts from outside. The conclusion comes from the frontier of quality
    against wall-clock time: policies at equal thresholds cannot be compared, because their signals' scales differ.
    """
    from haltkit.registry import parse_spec_list

    specs = parse_spec_list(policies)
    thresholds = _thresholds(taus)
    check_writable(json_path)
    check_writable(plot_path, ("png", "svg", "pdf"))
    check_writable(save_path, ("yaml", "yml"))
    places = [path.resolve() for path in (json_path, plot_path, save_path) if path is not None]
    if len(set(places)) < len(places):
        raise ValueError(f"--json, --plot and --save name the same file more than once: {', '.join(map(str, places))}")
    console = make_console()
    if model is not None:
        _refuse_with_model(context)
        result, about, levels, regions, loop = _own_model(
            console, model, specs, thresholds, granularity, repeats, save_path is not None
        )
    else:
        result, about, levels, regions, loop = _checkpoint(
            console,
            specs,
            thresholds,
            checkpoint,
            text,
            max_loops,
            tokens,
            batch,
            granularity,
            repeats,
            mode,
            execution,
            device,
        )
    from haltkit.comparison import findings

    found = findings(result.rows, levels)
    _print_table(console, result, regions, about)
    _print_findings(console, result, found, levels)
    if json_path is not None:
        from haltkit.models.files import write_json

        write_json(json_path, _finite(result.to_dict(**about)))
        console.print(f"measurements: {json_path}", soft_wrap=True, highlight=False)
    if plot_path is not None:
        from haltkit.models.files import atomic_path
        from haltkit.plots import plot_comparison

        with atomic_path(plot_path) as partial:
            plot_comparison(
                result.rows,
                partial,
                _title(result, about),
                plot_path.suffix[1:].lower(),
                result.metric,
                result.item,
                levels[1],
            )
        console.print(f"plot: {plot_path}", soft_wrap=True, highlight=False)
    if save_path is not None:
        _save(console, save_path, found, levels, about, result.item, loop)


def _checkpoint(
    console: Console,
    specs: Sequence[Spec],
    thresholds: str | list[float],
    checkpoint: Path | None,
    text: Path | None,
    max_loops: int,
    tokens: int,
    batch: int,
    granularity: str | None,
    repeats: int,
    mode: str,
    execution: str,
    device: str,
) -> tuple[Comparison, dict[str, Any], Sequence[float], list[str], Loop | None]:
    """The comparison on a checkpoint of the bundled architecture."""
    from haltkit.comparison import CE_LEVELS
    from haltkit.models import comparing
    from haltkit.models.checkpoint import BUNDLED, load_checkpoint

    comparing.check_mode(mode, execution)
    loaded = load_checkpoint(checkpoint or BUNDLED, device=choose_device(device))
    if not loaded.model.regions:
        raise ValueError(f"{str(checkpoint)!r} is a model without looped regions: there is nothing to halt")
    windows = comparing.text_windows(loaded, text or comparing.SAMPLE, tokens)
    settings = comparing.choose_settings(loaded, specs, thresholds, max_loops, windows[:2], granularity)
    with _progress(console, f"{len(settings)} settings, {len(windows)} windows") as tick:
        result = comparing.compare_checkpoint(
            loaded, settings, windows, batch=batch, max_loops=max_loops, repeats=repeats,
            mode=cast("Any", mode), execution=cast("Any", execution), on_tick=tick,
        )  # fmt: skip
    about = {
        "model": f"{checkpoint or 'bundled'} checkpoint",
        "trained": loaded.trained,
        "text": str(text) if text else "bundled sample",
        "device": describe_device(loaded.model.wte.weight.device),
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "max_loops": max_loops,
        "batch": batch,
        "mode": mode,
        "execution": execution,
    }
    return result, about, CE_LEVELS, list(loaded.model.regions), None


def _own_model(
    console: Console,
    path: str,
    specs: Sequence[Spec],
    thresholds: str | list[float],
    granularity: str | None,
    repeats: int,
    save: bool,
) -> tuple[Comparison, dict[str, Any], Sequence[float], list[str], Loop | None]:
    """The comparison on a model that a function of the user's returns."""
    from haltkit.cli.factories import call_factory
    from haltkit.trial import Trial
    from haltkit.trial import compare as compare_own

    trial: Trial = call_factory(path, Trial, f"--model {path}")
    if save and trial.loop is not None:
        from haltkit.attachment.saved import check_savable

        check_savable(trial.loop)  # before minutes are spent on measuring
    if granularity is not None:
        specs = [spec.with_key("granularity", granularity) if spec.takes("granularity") else spec for spec in specs]
    with _progress(console, f"{len(trial.samples)} samples") as tick:
        result = compare_own(trial, policies=specs, taus=thresholds, repeats=repeats, on_tick=tick)
    parameter = next(trial.model.parameters(), None)
    about: dict[str, Any] = {
        "model": path,
        "text": f"{len(trial.samples)} samples",
        "device": "cpu" if parameter is None else str(parameter.device),
        "dtype": "" if parameter is None else str(parameter.dtype).removeprefix("torch."),
    }
    full = abs(result.rows[0].ce)
    levels = trial.levels or tuple(float(f"{full * share:.2g}") for share in (0.001, 0.01, 0.05))
    return result, about, levels, ["loop"], trial.loop


def _refuse_with_model(context: typer.Context) -> None:
    """Options that say what a checkpoint is compared on have no meaning for a model that brings its own samples."""
    for name in ("checkpoint", "text", "max_loops", "tokens", "batch", "mode", "execution", "device"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} is for checkpoints; a --model brings its own samples")


@contextmanager
def _progress(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _save(
    console: Console,
    path: Path,
    found: Sequence[Finding],
    levels: Sequence[float],
    about: dict[str, Any],
    item: str,
    loop: Loop | None,
) -> None:
    """The fastest policy of the middle quality, for ``attach``; nothing is written where none is that good."""
    from haltkit.attachment.saved import save
    from haltkit.models.files import atomic_path

    winner = _winner(found, levels)
    if winner is None:
        raise ValueError(f"--save: no policy is within {levels[1]:g} for sure, so {str(path)!r} was not written")
    with atomic_path(path) as partial:
        save(
            partial, winner.spec, loop,
            f"chosen by haltkit compare on {about['model']}, {about['text']}: {_cost(winner, item)}",
        )  # fmt: skip
    console.print(f"choice: {path}", soft_wrap=True, highlight=False)


def _winner(found: Sequence[Finding], levels: Sequence[float]) -> Row | None:
    """The fastest policy within the middle level of the metric."""
    rows = [f.best for f in found if f.kind == "ce" and f.level == levels[1] and f.best is not None]
    return min(rows, key=lambda row: row.ms_per_token, default=None)


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
    if result.rows[0].kl_to_full is None:
        dropped += ("PPL", "KL to full", "agree")
    if result.metric != "CE":
        dropped += ("within 0.01",)
    nats = "delta (nats)" if result.metric == "CE" else "delta"
    titles = {"CE": result.metric, "ms/token": f"ms/{result.item}", "delta (nats)": nats}
    agree = "" if result.rows[0].agreement is None else "agree: top token as at full depth; "
    batch = [f"batch {about['batch']}", about["mode"], about["execution"]] if "batch" in about else []
    table = Table(
        title=", ".join([_title(result, about), *batch, about["device"], about["dtype"]]),
        caption=f"ms/{result.item}: median of the repeats and half their range, wall clock; delta: {result.metric} "
        f"above full depth with its standard error; {agree}steps: mean by region; halted: by the policy, not by the "
        "budget",
        box=None, pad_edge=False, padding=(0, 1),
    )  # fmt: skip
    table.add_column("setting", overflow="fold", min_width=16)
    headings = (
        "CE", "PPL", "delta (nats)", "KL to full", "agree", "steps", "halted", "ms/token", "speed", "within 0.01",
    )  # fmt: skip
    for heading in headings:
        if heading not in dropped:
            table.add_column(titles.get(heading, heading), justify="right", no_wrap=True)

    def number(value: float, sign: str = "") -> str:
        return f"{value:{sign}.4f}" if result.metric == "CE" else f"{value:{sign}.3g}"

    previous = None
    for row in result.rows:
        if previous is not None and row.policy != previous:
            table.add_section()
            table.add_row()
        previous = row.policy
        se = number(row.delta_ce_se) if math.isfinite(row.delta_ce_se) else "?"
        spread = (row.ms_spread[1] - row.ms_spread[0]) / 2
        cells = {
            "CE": number(row.ce),
            "PPL": "" if row.ppl is None else f"{row.ppl:.1f}",
            "delta (nats)": f"{number(row.delta_ce, '+')} ±{se}" if wide else number(row.delta_ce, "+"),
            "KL to full": "" if row.kl_to_full is None else f"{row.kl_to_full:.1e}",
            "agree": "" if row.agreement is None else f"{row.agreement:.1%}",
            "steps": " ".join(f"{row.steps[name]:.1f}" for name in regions),
            "halted": f"{row.outcomes['CONVERGED']:.0%}" if row.outcomes else "",
            "ms/token": f"{row.ms_per_token:.3f} ±{spread:.3f}" if wide else f"{row.ms_per_token:.3f}",
            "speed": f"{row.speedup:.2f}x",
            "within 0.01": within(row, 0.01),
        }
        table.add_row(Text(_label(row)), *(cells[heading] for heading in headings if heading not in dropped))
    console.print(table)


def _title(result: Comparison, about: dict[str, Any]) -> str:
    return f"{about['model']}, {result.tokens:,} {result.item}s of {about['text']}"


def _label(row: Row) -> str:
    """What tells this row from its neighbours."""
    from haltkit.comparison import depth_label

    if row.policy == "fixed":
        return f"fixed {depth_label(row.spec)}"
    return f"{row.policy} tau={row.tau:g}" if row.tau is not None else row.spec


def _cost(row: Row, item: str = "token") -> str:
    return f"{_label(row)}: {row.ms_per_token:.3f} ms/{item}, {row.speedup:.2f}x full depth"


def _print_findings(console: Console, result: Comparison, found: Sequence[Finding], levels: Sequence[float]) -> None:
    from rich.text import Text

    from haltkit.comparison import sweep_spread

    def say(line: str = "") -> None:
        console.print(Text(line), soft_wrap=False)

    unit, item = (" nats" if result.metric == "CE" else f" of {result.metric}"), result.item
    if result.metric == "CE" and not all(row.causal for row in result.rows):
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
            goal = f"within {finding.level:g}{unit}" if finding.kind == "ce" else f"agreement {finding.level:g}"
            best = finding.fixed
            reference = (
                f"{_label(best)}, {best.ms_per_token:.3f} ms/{item}" if best else "no fixed depth is that good for sure"
            )
            say(f"  {goal}: {reference}")
        if finding.best is None:
            say(f"    {finding.policy}: no setting is that good for sure on so few {item}s")
        else:
            say(f"    {_cost(finding.best, item)}{f', {finding.verdict}' if finding.verdict else ''}")
    spreads = {name: sweep_spread(result.rows, name) for name in dict.fromkeys(f.policy for f in found)}
    swept = [
        f"{name} {spread:.4f}" if result.metric == "CE" else f"{name} {spread:.3g}"
        for name, spread in spreads.items()
        if spread is not None
    ]
    if swept:
        name = "Cross-entropy" if result.metric == "CE" else result.metric
        say(f"{name}, greatest minus least over a policy's thresholds (how much tuning it needs):")
        say("  " + ", ".join(swept))
    good = [f for f in found if f.kind == "ce" and f.level == levels[1]]
    if good and good[0].fixed is not None and all(f.verdict in (None, "slower") for f in good):
        say(f"Within {levels[1]:g}{unit} a fixed depth serves best here: {good[0].fixed.spec}")
    winner = _winner(found, levels)
    if winner is not None:
        line = f"Fastest policy within {levels[1]:g}{unit}, ready to paste: {winner.spec}"
        console.print(Text(line), soft_wrap=True)
