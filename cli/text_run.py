"""What ``haltkit train`` shows of a text model's run: what it would cost, and how it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from haltkit.cli.terminal import progress, say

if TYPE_CHECKING:
    from haltkit.models.training.config import RunConfig
    from haltkit.models.training.logs import Event

__all__ = ["NOT_LOCKED", "TextProgress", "duration", "forecast_text", "say_precision"]

NOT_LOCKED = "Warning: this file system knows no locks: see to it that no second run is started in this folder"


def forecast_text(console: Any, config: RunConfig) -> dict[str, Any]:
    """Print what a run would be.

    Returns:
        The same as plain values and dataclasses.
    """
    from rich.table import Table
    from rich.text import Text

    from haltkit.models.gpt.config import region_span
    from haltkit.models.training.distributed import join
    from haltkit.models.training.forecast import Stage, forecast
    from haltkit.models.training.start import settle_precision

    with progress("opening the data") as tick:
        told = False

        def show(stage: Stage) -> None:
            nonlocal told
            tick(description=stage.doing, completed=stage.done, total=stage.of)
            if stage.seconds is not None and not told:
                told = True
                total = duration(stage.seconds * config.train.max_steps)
                say(
                    console,
                    f"At first sight {stage.seconds:.3g} s a step, {total} in all (from one row of the batch, not "
                    "compiled). Real steps follow.",
                )

        with join() as processes:
            config, choice = settle_precision(config, processes)
            say(console, say_precision(choice.precision, choice.reason, choice.warning))
            found = forecast(config, on_stage=show)
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
        "operations per token": f"{found.flops.forward / 1e6:.3g} MFLOP forward, {found.flops.backward / 1e6:.3g} "
        f"backward (through the last {train.backprop_depth} loops)",
        "run": f"{train.max_steps:,} steps of {found.tokens_per_step:,} tokens: {found.tokens:,} tokens, "
        f"{found.tokens * found.flops.total:.2e} FLOP",
        "memory": f"{_size(found.state)} weights, gradients and moments, {_size(found.activations)} activations of a "
        f"micro-step; {_size(found.peak)} at the peak of the probe, all included",
        "a checkpoint": f"{_size(found.checkpoint)} on disk; {train.keep_checkpoints} newest and the best are kept",
        "time": f"{found.seconds:.3g} s a step, {tokens_per_second:,.0f} tokens/s; {duration(total)} in all, "
        "evaluations and snapshots not counted",
    }.items():
        grid.add_row(Text(name), Text(value))
    console.print(grid)
    console.print("Estimated from three steps on this machine and the run's own loop draws. Nothing was written.")
    return {"steps": train.max_steps, "total_seconds": total, "precision": choice, "model": model, "forecast": found}


def say_precision(precision: str, reason: str, warning: bool) -> str:
    return f"{'Warning: ' if warning else ''}precision {precision}: {reason}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class TextProgress:
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

    def __enter__(self) -> TextProgress:
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
            self.console.print(
                say_precision(event["precision"], event["precision_reason"], event["precision_warning"]),
                highlight=False,
                soft_wrap=True,
            )
            if not event["locked"]:
                self.console.print(NOT_LOCKED, highlight=False, soft_wrap=True)
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
