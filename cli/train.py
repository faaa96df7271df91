"""``haltkit train``: train the bundled model from a config."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from haltkit.models.config import RunConfig
    from haltkit.models.train import Event

# Exit codes besides 0 (done) and 2 (bad input): the run was asked to stop and has saved itself (128 + the signal's
# number, as shells count), or it stopped by itself and its last checkpoint is from before.
STOPPED = {"SIGINT": 130, "SIGTERM": 143}
FAILED = 1


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file, or the name of one that ships with haltkit: paper, small, tiny, ...", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, logs, snapshots.")] = Path("runs/train"),
    data: Annotated[Path | None, typer.Option(help="Folder made by 'haltkit prepare'; overrides data.path.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in --out; CONFIG may then be left out.")] = False,
    auto_resume: Annotated[
        bool, typer.Option(help="Continue if --out holds a checkpoint, else start: for schedulers that run it again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would cost, from three real steps; write nothing.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Overrides train.max_steps.")] = None,
    anneal_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Anneal a copy of this run's last checkpoint into --out.")
    ] = None,
    anneal_steps: Annotated[int, typer.Option(min=1, help="Length of the anneal.")] = 500,
    init_from: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Go on from these weights with a fresh optimizer and a new warmup."),
    ] = None,
) -> None:
    """Train the bundled model. Ctrl-C and SIGTERM save; --resume goes on bit for bit as if never interrupted.

    Several processes: torchrun --nproc-per-node 8 -m haltkit.cli train CONFIG ...; the batch is that of all together.

    Exit codes: 0 done; 130 (Ctrl-C) and 143 (SIGTERM) stopped and saved; 1 diverged, or the disk is full; 2 bad input.
    """
    from rich.console import Console

    from haltkit.models import train as training
    from haltkit.models.config import load_config
    from haltkit.models.distributed import join

    # Under torchrun one process talks for all.
    first = int(os.environ.get("RANK", "0")) == 0
    console = Console(quiet=not first)
    if anneal_from is not None:
        if config is not None or resume or steps is not None or init_from is not None:
            raise ValueError(
                "--anneal-from takes its config from the run: leave out CONFIG, --resume, --steps and --init-from"
            )
        run_config = training.annealing(anneal_from, anneal_steps, data)
    elif config is not None:
        run_config = load_config(config)
        if init_from is not None and resume:
            raise ValueError("--init-from begins a run folder; once it exists, --resume alone goes on with it")
    elif init_from is not None:
        raise ValueError("--init-from needs the CONFIG that the checkpoint was trained with")
    elif resume or (auto_resume and training.checkpoints(out)):
        run_config = training.read_run_config(out)
    else:
        raise ValueError("no config: name a YAML file or a shipped config (paper, small, tiny), or add --resume")
    if data is not None:
        run_config = replace(run_config, data=replace(run_config.data, path=str(data)))
    if steps is not None:
        run_config = replace(run_config, train=replace(run_config.train, max_steps=steps))
    if dry_run:
        _forecast(console, run_config)
        return
    resume = resume or (auto_resume and bool(training.checkpoints(out)))
    try:
        with join():  # one group of processes for making the folder and for training in it
            if anneal_from is not None:
                run_config, resume = training.anneal(anneal_from, out, anneal_steps, data), True
            elif init_from is not None and not resume:
                run_config, resume = training.continue_from(init_from, run_config, out), True
            with _Progress(run_config, console) as progress:
                finished = training.train(run_config, out, resume=resume, on_event=progress.show)
    except (training.TrainingDiverged, training.WriteFailed) as error:
        print(f"haltkit: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if not finished:
        console.print(f"Stopped and saved. Go on with: haltkit train --resume --out {out}", soft_wrap=True)
        raise typer.Exit(STOPPED[progress.signal])
    console.print(f"Done: {out / 'final'} is a checkpoint for haltkit compare --checkpoint", soft_wrap=True)


def _forecast(console: Any, config: RunConfig) -> None:
    """Print what a run would be."""
    from rich.table import Table
    from rich.text import Text

    from haltkit.models.config import region_span
    from haltkit.models.train import forecast

    found = forecast(config)
    train, model = config.train, config.model
    total = found.seconds * train.max_steps
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    looped = sum(last - first + 1 for first, last in map(region_span, model.regions))
    tokens_per_second = found.tokens_per_step / found.seconds
    for name, value in {
        "parameters": f"{found.parameters / 1e6:.1f}M",
        "effective depth": f"{found.effective_depth} layers ({model.n_layer} in all, {looped} of them "
        f"{model.mean_loops} times)",
        "operations a token": f"{found.flops.forward / 1e6:.3g} MFLOP forward, {found.flops.backward / 1e6:.3g} "
        f"backward (through the last {train.backprop_depth} loops)",
        "run": f"{train.max_steps:,} steps of {found.tokens_per_step:,} tokens: {found.tokens:,} tokens, "
        f"{found.tokens * found.flops.total:.2e} FLOP",
        "memory": f"{_size(found.state)} weights, gradients and moments, {_size(found.activations)} activations of a "
        f"micro-step; {_size(found.peak)} at the peak of the probe, all included",
        "a checkpoint": f"{_size(found.checkpoint)} on disk; {train.keep_checkpoints} newest and the best are kept",
        "time": f"{found.seconds:.3g} s a step, {tokens_per_second:,.0f} tokens/s; {_duration(total)} in all, "
        "evaluations and snapshots not counted",
    }.items():
        grid.add_row(Text(name), Text(value))
    console.print(grid)
    console.print("Estimated from three steps on this machine and the run's own loop draws. Nothing was written.")


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _Progress:
    """A progress bar fed by training events; evaluations are printed above it."""

    def __init__(self, config: RunConfig, console: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console, self.max_steps = console, config.train.max_steps
        self.signal = "SIGTERM"  # under torchrun only the first process is told; schedulers send this one
        self.bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=300,
        )

    def __enter__(self) -> _Progress:
        self.bar.__enter__()
        self.task = self.bar.add_task("compiling", total=self.max_steps)
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def show(self, event: Event) -> None:
        kind, step = event["kind"], event["step"]
        if kind == "start":
            self.console.print(
                f"{event['parameters'] / 1e6:.1f}M parameters, from step {step} to {event['max_steps']}",
                highlight=False,
            )
            self.bar.reset(self.task, completed=step, total=self.max_steps, description="first step")
        elif kind == "step":
            text = f"loss {event['loss']:.3f}  {event['tokens_per_second']:,.0f} tokens/s"
            self.bar.update(self.task, completed=step, description=text)
        elif kind == "eval":
            losses = ", ".join(f"{loss:.3f} at {count}" for count, loss in event["losses"].items())
            self.console.print(
                f"step {step}, {event['tokens']:,} tokens: held-out loss {losses} loops", highlight=False
            )
        elif kind == "fault":
            self.console.print(
                f"step {step}: {event['fault']}, loss {event['loss']}: {event['action']}", highlight=False
            )
        elif kind == "end":
            self.signal = event.get("signal", self.signal)
        elif kind == "snapshot":
            self.console.print(f"step {step}: wrote {event['path']}", highlight=False)
