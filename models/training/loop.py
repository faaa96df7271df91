"""The training loop: steps until the run is done or asked to stop, and what happens between them.

Every random draw is keyed by the run's seed and the step or sample (see :mod:`haltkit.models.gpt.draws`), so the
numbers of step and sample are the whole random state, and a resumed run continues bit for bit as if never interrupted.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from haltkit.files import write_json
from haltkit.locks import hold
from haltkit.models.config import ConfigError
from haltkit.models.text.data import TokenData
from haltkit.models.training.config import RunConfig, TrainConfig
from haltkit.models.training.distributed import Processes, full_weights, join, shared_folder
from haltkit.models.training.evaluation import STATISTICS_FILE, evaluate, snapshot_statistics
from haltkit.models.training.export import write_export
from haltkit.models.training.logs import Event, log_to, versions
from haltkit.models.training.memory import check_memory
from haltkit.models.training.runs import (
    Run,
    RunError,
    check_stored,
    checkpoints,
    clean,
    latest,
    progress_of,
    restore,
    save,
    writing,
)
from haltkit.models.training.start import check_data, new_run, open_feed, settle_precision, write_config
from haltkit.models.training.step import find_fault, take_step, weights_are_finite
from haltkit.models.training.stopping import Stop, stop_requests
from haltkit.timing import settled

__all__ = ["TrainingDiverged", "train"]


class TrainingDiverged(RuntimeError):
    """The loss is not finite any more, or too many faults in a row; the run's last checkpoint is from before."""


@contextmanager
def _alone_in(folder: Path, processes: Processes) -> Iterator[bool]:
    """Collective: lock the run folder, so that no second run writes in it; see :func:`haltkit.locks.hold`."""
    with ExitStack() as stack:
        yield processes.once(lambda: stack.enter_context(hold(folder, "haltkit train")))


def train(
    config: RunConfig, folder: Path, *, resume: bool = False, on_event: Callable[[Event], None] | None = None
) -> bool:
    """Train until ``max_steps`` or until asked to stop (Ctrl-C, SIGTERM), which saves first.

    Under torchrun, or in any initialized process group, all processes call this with the same arguments.

    Args:
        config: used as given, also when resuming (so that evaluation or length can be changed).
        folder: the run folder; created, or with ``resume`` continued from its last complete checkpoint.
        resume: continue; without it a folder that has a run already is refused.
        on_event: is called with every step, evaluation, checkpoint, snapshot and fault; in the first process only.

    Returns:
        True when the run reached ``max_steps``.

    Raises:
        RunError: the folder has a run and ``resume`` is off, or the other way round; or a damaged checkpoint.
        FolderInUse: another run is being trained in the folder.
        DataError: the token data is missing, damaged, not what the run began with, or does not fit the model.
        TrainingDiverged: a loss or gradient norm that is not finite, if the config says to stop there.
        WriteFailed: a full or read-only disk; the checkpoints before are whole.
    """
    if not config.data.path:
        raise ConfigError("data.path is empty: name a folder made by 'haltkit prepare'")
    held_out = TokenData(Path(config.data.path).expanduser(), config.data.eval_split, config.model.block_size)
    check_data(config, held_out)
    if not resume and checkpoints(folder):
        raise RunError(f"{str(folder)!r} has a run already: add --resume, or choose another folder")
    with join() as processes, _alone_in(folder, processes) as locked:
        return _train(config, folder, held_out, resume, on_event, processes, locked)


def _train(
    config: RunConfig,
    folder: Path,
    held_out: TokenData,
    resume: bool,
    on_event: Callable[[Event], None] | None,
    processes: Processes,
    locked: bool,
) -> bool:
    """Collective: the run, which is gone when this returns; see :func:`~haltkit.models.training.distributed.join`."""
    newest = processes.once(lambda: latest(folder)) if resume else None
    config, choice = settle_precision(config, processes, folder, newest)
    check_memory(config, processes)
    if newest is not None:
        processes.once(lambda: check_stored(config.model, newest))
    feed = open_feed(config, processes)
    run = new_run(config, folder, feed, processes)
    if newest is not None:
        restore(run, newest)
    if processes.first:
        clean(folder)
        write_config(folder, config)
    processes.wait()
    log = log_to(folder, config, run.step, on_event) if processes.first else nullcontext(lambda event: None)
    with log as emit, stop_requests() as stop:
        emit(
            {
                "kind": "start",
                "step": run.step,
                "max_steps": config.train.max_steps,
                "tokens": run.tokens,
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "seed": config.train.seed,
                "processes": processes.world,
                "locked": locked,
                "precision": choice.precision,
                "precision_reason": choice.reason,
                "precision_warning": choice.warning,
                "strategy": config.train.strategy if processes.world > 1 else None,
                "versions": versions(),
            }
        )
        return _Trainer(run, held_out, emit, stop).run_to_the_end()


class _Trainer:
    """The steps of a run and what happens between them. All processes do the same, the first one also writes."""

    def __init__(self, run: Run, held_out: TokenData, emit: Callable[[Event], None], stop: Stop) -> None:
        self.run, self.held_out, self.emit, self.stop = run, held_out, emit, stop
        self.versions = versions()
        self.saved = run.step if run.step else -1
        self.rollbacks = 0

    @property
    def train(self) -> TrainConfig:
        return self.run.config.train

    def run_to_the_end(self) -> bool:
        run, train = self.run, self.train
        asked = 0
        while run.step < train.max_steps and not (asked := run.processes.greatest(self.stop.number)):
            started = settled()
            loss, grad_norm = take_step(run)
            fault = find_fault(run, loss, grad_norm)
            if fault is None:
                run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            elapsed = settled() - started
            run.samples += run.samples_per_step
            run.seconds += elapsed
            if fault is not None and self._handle(fault, loss, grad_norm):
                continue
            run.step += 1
            if fault is None:
                run.tokens += run.tokens_per_step
                run.recent.append(loss)
                run.skips = 0
                if not weights_are_finite(run):
                    self._stop_for(
                        f"the weights are not finite after step {run.step}: stopped without saving them", "not finite"
                    )
                if run.step % train.log_every == 0 or run.step == train.max_steps:
                    self.emit(
                        {
                            "kind": "step",
                            "step": run.step,
                            "tokens": run.tokens,
                            "samples": run.samples,
                            "loss": loss,
                            "grad_norm": grad_norm,
                            "lr": run.optimizer.param_groups[0]["lr"],
                            "tokens_per_second": run.tokens_per_step / elapsed,
                            "seconds": run.seconds,
                        }
                    )
            self._between_steps()
        finished = run.step >= train.max_steps
        if finished:
            self._export(run.folder / "final", statistics=False)
        if self.saved != run.step:
            self._save(None)
        reason = {"reason": "done"} if finished else {"reason": "asked to stop", "signal": signal.Signals(asked).name}
        self.emit({"kind": "end", "step": run.step, **reason})
        return finished

    def _between_steps(self) -> None:
        """Evaluate, take a snapshot and save, each where it is due."""
        run, train = self.run, self.train
        held = None
        best = False
        if run.step % train.eval_every == 0 or run.step == train.max_steps:
            losses = evaluate(run, self.held_out)
            self.emit({"kind": "eval", "step": run.step, "tokens": run.tokens, "losses": losses})
            held = sum(losses.values()) / len(losses)
            best = run.best is None or held < run.best
            if best:
                run.best = held
        if run.tokens >= run.next_snapshot:
            while run.tokens >= run.next_snapshot:
                run.next_snapshot *= train.snapshot_factor
            self._export(run.folder / "snapshots" / f"tokens-{run.tokens:010d}", statistics=bool(run.model.regions))
        if run.step % train.checkpoint_every == 0 or run.step == train.max_steps or best:
            self._save(held)

    def _save(self, held: float | None) -> None:
        position = save(self.run, self.versions, held)["data"]
        self.saved, self.rollbacks = self.run.step, 0
        left_out = {"unreadable": position["unreadable"]} if "unreadable" in position else {}
        self.emit({"kind": "checkpoint", "step": self.run.step, **left_out})

    def _export(self, path: Path, statistics: bool) -> None:
        """Write a checkpoint to use and to share, and to go on from."""
        run = self.run
        losses, weights = evaluate(run, self.held_out), full_weights(run.model)
        progress = progress_of(run, self.versions)
        with writing(run.folder, path.name), shared_folder(path, run.processes) as partial:
            if run.processes.first:
                trained = {**run.trained, "held_out_loss": losses}
                write_export(
                    partial,
                    run.model,
                    run.config.model,
                    weights,
                    trained=trained,
                    progress=progress,
                    tokenizer=Path(run.config.data.path).expanduser(),
                )
                if statistics:
                    write_json(partial / STATISTICS_FILE, snapshot_statistics(run, weights, self.held_out))
        self.emit({"kind": "snapshot", "step": run.step, "tokens": run.tokens, "path": path.name})

    def _handle(self, fault: str, loss: float, grad_norm: float) -> bool:
        """Do what the config says about a bad step; True when the run has gone back to a checkpoint."""
        run, train = self.run, self.train
        action = train.on_spike if fault == "spike" else train.on_nonfinite
        what = f"loss {loss:.4g}, gradient norm {grad_norm:.4g} at step {run.step + 1}"
        if action == "skip":
            run.skips += 1
        elif action == "rollback":
            self.rollbacks += 1
        # JSON has no NaN: what is not finite is logged as null.
        numbers = {"loss": loss, "grad_norm": grad_norm}
        numbers = {key: value if math.isfinite(value) else None for key, value in numbers.items()}  # type: ignore[misc]
        self.emit({"kind": "fault", "step": run.step + 1, "fault": fault, "action": action, **numbers})
        if action == "stop":
            self._stop_for(f"{what}: stopped", fault)
        if max(run.skips, self.rollbacks) > train.max_faults:
            self._stop_for(f"{what}, after {train.max_faults} times {action}: stopped (train.max_faults)", fault)
        if action == "rollback":
            if self.saved < 0:
                self._stop_for(f"{what}: stopped, there is no checkpoint to roll back to", fault)
            restore(run, latest(run.folder), data=False)
            return True
        return False

    def _stop_for(self, what: str, reason: str) -> None:
        self.emit({"kind": "end", "step": self.run.step, "reason": reason})
        raise TrainingDiverged(
            f"{what}; the last checkpoint is of step {max(self.saved, 0)}. Lower optim.lr or raise optim.warmup_steps, "
            "then resume from there"
        )
