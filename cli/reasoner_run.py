"""What ``haltkit train`` does for a reasoner: what a run would cost, and the run with its progress."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haltkit.cli.terminal import progress
from haltkit.cli.text_run import NOT_LOCKED, duration, say_precision

if TYPE_CHECKING:
    from rich.console import Console

    from haltkit.models.reasoner.config import ReasonerConfig
    from haltkit.models.reasoner.train import Start

__all__ = ["forecast", "run"]


def forecast(console: Console, config: ReasonerConfig) -> dict[str, Any]:
    """Print what a run would be.

    Returns:
        The same as plain values and dataclasses.
    """
    from haltkit.models.reasoner.train import forecast_reasoner

    with progress("taking real steps"):
        found, steps = forecast_reasoner(config), config.train.max_steps
    choice, (shallow, deep) = found.choice, found.depths
    console.print(say_precision(choice.precision, choice.reason, choice.warning), highlight=False, soft_wrap=True)
    console.print(f"{found.parameters / 1e6:.2f}M parameters, {steps:,} steps", highlight=False)
    if shallow == deep:
        console.print(f"{found.last:.3g} s a step, {duration(found.last * steps)} in all", highlight=False)
    else:
        console.print(
            f"{found.first:.3g} s a step at the first level (depth {shallow}), {found.last:.3g} s at the last (depth "
            f"{deep}): between {duration(found.first * steps)} and {duration(found.last * steps)} in all",
            highlight=False,
        )
    console.print("Estimated from real steps on this machine. Nothing was written.")
    totals = [found.first * steps, found.last * steps]
    return {"steps": steps, "total_seconds": totals, "forecast": found}


def run(console: Console, config: ReasonerConfig, out: Path, resume: bool) -> signal.Signals | None:
    """Train, and show how it goes.

    Returns:
        The signal that asked it to stop, or None: it is done.
    """
    from rich.progress import BarColumn, Progress, TextColumn

    from haltkit.models.reasoner.train import train_reasoner
    from haltkit.models.training.stopping import stop_requests

    bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    with stop_requests() as stop, ExitStack() as shown:
        task = bar.add_task("first steps", total=config.train.max_steps)
        depth = -1

        def on_start(start: Start) -> None:
            choice = start.choice
            console.print(
                f"{start.parameters / 1e6:.2f}M parameters, from step {start.step} to {config.train.max_steps}",
                highlight=False,
            )
            said = say_precision(choice.precision, choice.reason, choice.warning)
            console.print(said, highlight=False, soft_wrap=True)
            if not start.locked:
                console.print(NOT_LOCKED, highlight=False, soft_wrap=True)
            shown.enter_context(bar)  # not before the folder has been looked at: a refusal is one line
            bar.reset(task, completed=start.step, total=config.train.max_steps, description="first steps")

        def on_event(event: dict[str, Any]) -> None:
            nonlocal depth
            step, left = event["step"] + 1, duration(event["seconds_left"])
            text = f"loss {event['loss']:.3f}, depth {event['depth']}, {event['deepest_right']:.0%} right, {left} left"
            bar.update(task, completed=step, description=text)
            if event["depth"] > depth >= 0:
                console.print(
                    f"step {step}: depth {event['depth']} after {duration(event['seconds'])}", highlight=False
                )
            depth = event["depth"]

        done = train_reasoner(config, out, resume=resume, on_start=on_start, on_event=on_event, should_stop=stop.is_set)
    return None if done else signal.Signals(stop.number)
