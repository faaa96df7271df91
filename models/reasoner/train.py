"""Training a reasoner: a run folder that can be resumed, and what a run would cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from haltkit.files import write_text
from haltkit.folders import atomic_folder, settle, sweep
from haltkit.locks import hold
from haltkit.models.reasoner.checkpoint import save_reasoner
from haltkit.models.reasoner.config import ReasonerConfig, plain
from haltkit.models.reasoner.step import CHECKPOINT, ReasonerRun, settle_precision, take_step
from haltkit.models.training.logs import end_at_a_whole_line
from haltkit.models.training.precision import Choice
from haltkit.models.training.runs import RunError, writing

__all__ = ["Forecast", "Start", "forecast_reasoner", "has_run", "train_reasoner"]

CONFIG_FILE, FINAL, LOG = "config.yaml", "final", "log.jsonl"


@dataclass(frozen=True)
class Start:
    """What is known when a run starts.

    Attributes:
        step: the optimizer step it goes on from.
        parameters: of the model.
        choice: the precision, and why.
        locked: whether the folder could be locked.
    """

    step: int
    parameters: int
    choice: Choice
    locked: bool


def has_run(folder: Path) -> bool:
    """Whether a folder has a reasoner's checkpoint to resume from."""
    settle(folder / CHECKPOINT)
    return (folder / CHECKPOINT).is_dir()


def train_reasoner(
    config: ReasonerConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_start: Callable[[Start], None] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> bool:
    """Train until ``max_steps``, or until asked to stop, which saves first.

    The folder then has ``checkpoint`` (everything that changes), ``log.jsonl`` and, at the end, ``final``: the averaged
    weights, to be loaded by :func:`~haltkit.models.reasoner.checkpoint.load_reasoner`.

    Args:
        config: used as given, also when resuming (so that the length can be changed).
        folder: the run folder; created, or with ``resume`` continued from its last checkpoint.
        resume: continue; without it a folder that has a run already is refused.
        on_start: is called once with the parameters, the precision and its reason, and whether the folder is locked.
        on_event: told of every ``log_every``-th step what is logged: ``step``, ``loss``, ``grad_norm``, ``lr``,
            ``level``, ``depth``, ``deepest_right``, ``seconds`` of work so far, and ``seconds_left`` if the rest goes
            as fast as the last steps (deeper levels are slower).
        should_stop: asked after every step.

    Returns:
        True when the run reached ``max_steps``.

    Raises:
        RunError: the folder has a run and ``resume`` is off, or the other way round; or a damaged checkpoint.
        FolderInUse: another run is being trained in the folder.
        Diverged: a loss that is not finite.
        WriteFailed: a full or read-only disk; the checkpoint before is whole.
    """
    folder = Path(folder)
    there = has_run(folder)
    if there and not resume:
        raise RunError(f"{str(folder)!r} has a run already: resume it, or choose another folder")
    if resume and not there:
        raise RunError(f"{str(folder)!r} has no checkpoint to resume from")
    with hold(folder, "haltkit train") as locked:
        run = ReasonerRun(config)
        if resume:
            sweep(folder)
            run.restore(folder)
        choice = settle_precision(run)
        if on_start is not None:
            on_start(Start(run.moving.step, sum(p.numel() for p in run.parameters), choice, locked))
        with _writing(folder, CONFIG_FILE):
            _write_config(folder, config)
        with _writing(folder, LOG):
            end_at_a_whole_line(folder / LOG)
        return _train(run, folder, on_event, should_stop)


def _train(
    run: ReasonerRun,
    folder: Path,
    on_event: Callable[[dict[str, Any]], None] | None,
    should_stop: Callable[[], bool] | None,
) -> bool:
    config = run.config
    recipe, moving = config.train, run.moving
    stopped = False
    since, steps_since = time.perf_counter(), moving.step
    while moving.step < recipe.max_steps and not stopped:
        begun = time.perf_counter()
        logged = take_step(run)
        moving.seconds += time.perf_counter() - begun
        if moving.step % recipe.log_every == 0 or moving.step == recipe.max_steps:
            now = time.perf_counter()
            pace = (now - since) / max(1, moving.step - steps_since)
            since, steps_since = now, moving.step
            logged["seconds"] = round(moving.seconds, 1)
            logged["seconds_left"] = round(pace * (recipe.max_steps - moving.step), 1)
            with _writing(folder, LOG), (folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(logged) + "\n")
            if on_event is not None:
                on_event(logged)
        stopped = should_stop is not None and should_stop()
        if stopped or moving.step % recipe.save_every == 0 or moving.step == recipe.max_steps:
            with _writing(folder, CHECKPOINT):
                run.save(folder)
    if moving.step < recipe.max_steps:
        return False
    with _writing(folder, FINAL), atomic_folder(folder / FINAL) as partial:
        trained = {"steps": moving.step, "rows": moving.rows, "seconds": round(moving.seconds, 1)}
        trained["depth"] = run.task.levels[moving.level].depth
        save_reasoner(partial, run.average.state_dict(), config, trained)
    return True


@dataclass(frozen=True)
class Forecast:
    """What a run would cost, from a few real steps on this machine.

    Attributes:
        parameters: of the model.
        choice: the precision, and why.
        first, last: seconds per optimizer step at the first and at the last level.
        depths: of these two levels.
    """

    parameters: int
    choice: Choice
    first: float
    last: float
    depths: tuple[int, int]


def forecast_reasoner(config: ReasonerConfig, steps: int = 3) -> Forecast:
    """Take ``steps`` optimizer steps at the first level and at the last one, in memory only."""
    run = ReasonerRun(config)
    choice = settle_precision(run)
    seconds = []
    for level in (0, len(run.task.levels) - 1):
        run.moving.level = level
        take_step(run)  # warms up
        started = time.perf_counter()
        for _ in range(steps):
            take_step(run)
        seconds.append((time.perf_counter() - started) / steps)
    depths = (run.task.levels[0].depth, run.task.levels[-1].depth)
    first, last = seconds
    return Forecast(sum(p.numel() for p in run.parameters), choice, first, last, depths)


def _writing(folder: Path, what: str) -> AbstractContextManager[None]:
    """What fails inside says whether the run's one checkpoint is there."""
    return writing(folder, what, lambda of: [of / CHECKPOINT] if has_run(of) else [])


def _write_config(folder: Path, config: ReasonerConfig) -> None:
    import yaml

    write_text(folder / CONFIG_FILE, yaml.safe_dump(plain(asdict(config)), sort_keys=False))
