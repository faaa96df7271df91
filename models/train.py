"""Training of the bundled model: the recipe's loop draws, truncated backprop, durable checkpoints.

Every random draw is keyed by the run's seed and the step or sample (see :mod:`haltkit.models.draws`), so the numbers
of step and sample are the whole random state, and a resumed run continues bit for bit as if never interrupted.
"""

from __future__ import annotations

import math
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.clock import settled
from haltkit.models.checkpoint import (
    CheckpointError,
    build_model,
    load_weights,
    read_config,
    read_weights,
    save_checkpoint,
    save_tensors,
)
from haltkit.models.config import ConfigError, OptimConfig, RunConfig, TrainConfig, from_dict, to_dict
from haltkit.models.cost import Spent, saved_bytes, step_flops, training_flops
from haltkit.models.data import DataError, Feed, ShardFeed, TokenData, read_manifest
from haltkit.models.distributed import (
    Objective,
    Processes,
    full_weights,
    join,
    local,
    shared_folder,
    synchronized,
    wrap,
)
from haltkit.models.draws import TrainingNoise, loop_count
from haltkit.models.export import write_export
from haltkit.models.files import atomic_folder, atomic_path, write_json
from haltkit.models.gpt import LoopedGPT, Region
from haltkit.models.logs import LOG_FILE, Event, log_to, versions
from haltkit.models.runs import (
    OPTIMIZER,
    PROGRESS,
    Run,
    RunError,
    WriteFailed,
    checkpoints,
    clean,
    latest,
    progress_of,
    read_progress,
    restore,
    save,
    writing,
)
from haltkit.models.statistics import loop_statistics
from haltkit.models.tokenizer import copy_tokenizer

__all__ = [
    "CONFIG_FILE", "LOG_FILE", "Event", "RunError", "TrainingDiverged", "WriteFailed", "anneal", "annealing",
    "checkpoints", "compile_for_training", "continue_from", "forecast", "head_loss", "learning_rate",
    "read_run_config", "train",
]  # fmt: skip

CONFIG_FILE, STATISTICS_FILE = "config.yaml", "statistics.json"
STATISTICS_WINDOWS = 8
SPIKE_HISTORY = 8  # losses before a median means anything


class TrainingDiverged(RuntimeError):
    """The loss is not finite any more, or too many faults in a row; the run's last checkpoint is from before."""


def learning_rate(step: int, max_steps: int, optim: OptimConfig) -> float:
    """The rate for step ``step`` (from 0): linear warmup, then the schedule's shape down to ``min_lr_ratio``.

    A run taken up again from weights alone (``rewarm_at``) also warms up from there to where its schedule is.
    """
    if 0 < optim.rewarm_at <= step < optim.rewarm_at + optim.warmup_steps:
        target = learning_rate(optim.rewarm_at + optim.warmup_steps, max_steps, optim)
        return target * (step - optim.rewarm_at + 1) / optim.warmup_steps
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    low = optim.lr * optim.min_lr_ratio
    if optim.schedule == "cosine":
        done = (step - optim.warmup_steps) / max(1, max_steps - optim.warmup_steps)
        return low + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (optim.lr - low)
    left = (max_steps - step) / optim.decay_steps if optim.decay_steps else 1.0
    return low + min(1.0, max(0.0, left)) * (optim.lr - low)


def _optimizer(model: LoopedGPT, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW as nanoGPT groups it: matrices and embeddings decay, gains do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write ``config.yaml`` of a run folder, atomically."""
    import yaml

    with atomic_path(folder / CONFIG_FILE) as partial:
        partial.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def read_run_config(folder: Path) -> RunConfig:
    """The config of a run folder."""
    import yaml

    path = folder / CONFIG_FILE
    if not path.is_file():
        raise RunError(f"{str(folder)!r} is not a run folder: it has no {CONFIG_FILE}")
    return from_dict(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")))


def annealing(source: Path, steps: int, data: Path | None = None) -> RunConfig:
    """What a run's config becomes when it goes on from its last checkpoint to its minimal rate in ``steps`` steps.

    Args:
        data: a prepared folder to go on over instead of the run's own.

    Raises:
        RunError: not a run folder, no checkpoint, or no step.
        DataError: nothing is prepared there.
    """
    config, newest = read_run_config(source), latest(source)
    if steps < 1:
        raise RunError(f"an anneal takes at least 1 step, got {steps}")
    step = int(read_progress(newest)["step"])
    # From the rate that the run has reached: annealing must never raise it.
    reached = learning_rate(step, config.train.max_steps, config.optim)
    low = min(1.0, config.optim.lr * config.optim.min_lr_ratio / reached)
    optim = replace(config.optim, lr=reached, min_lr_ratio=low, schedule="wsd", decay_steps=steps, warmup_steps=0)
    config = replace(config, optim=optim, train=replace(config.train, max_steps=step + steps))
    if data is not None:
        config = replace(config, data=replace(config.data, path=str(data)))
    read_manifest(Path(config.data.path).expanduser())
    return config


def anneal(source: Path, out: Path, steps: int, data: Path | None = None) -> RunConfig:
    """Copy a run's last checkpoint into a new run with the config that :func:`annealing` gives. Together.

    The new folder is resumed with :func:`train`; the source run is left as it is and can go on.

    Raises:
        RunError: ``out`` exists; and as :func:`annealing`.
    """

    def begin() -> RunConfig:
        _check_new(out)
        config, newest = annealing(source, steps, data), latest(source)
        with atomic_folder(out) as partial:
            write_config(partial, config)
            copy = partial / "checkpoints" / newest.name
            shutil.copytree(newest, copy)
            if data is not None:  # it was asked for: the position in the old data says nothing about the new
                write_json(copy / PROGRESS, {**read_progress(copy), "data": None})
        return config

    with join() as processes:
        return processes.once(begin)


def _check_new(out: Path) -> None:
    if out.exists():
        raise RunError(f"{str(out)!r} exists already: choose another folder")


def continue_from(checkpoint: Path, config: RunConfig, out: Path) -> RunConfig:
    """Make a run folder that goes on from a checkpoint's weights: for a run whose own folder is gone. Together.

    The optimizer starts fresh and the rate warms up over ``optim.warmup_steps``. The step, and with it every draw, and
    the place in the data are those that the checkpoint says, so no sample comes twice. The new folder is resumed with
    :func:`train`.

    Raises:
        RunError: ``out`` exists, or the checkpoint does not say how far its training was in the config's data.
        CheckpointError: no checkpoint, or not one of ``config.model``.
        DataError: no data, or another stream than the checkpoint's.
    """
    with join() as processes:
        return processes.once(lambda: _continue_from(checkpoint, config, out))


def _continue_from(checkpoint: Path, config: RunConfig, out: Path) -> RunConfig:
    _check_new(out)
    model_config, trained = read_config(checkpoint)
    own, found = to_dict(config.model), to_dict(model_config)
    if own != found:
        name = next(name for name in own if own[name] != found[name])
        raise CheckpointError(
            f"the checkpoint in {str(checkpoint)!r} is of another model: model.{name} is {found[name]!r} there and "
            f"{own[name]!r} in the config"
        )
    known = _left_off(checkpoint, trained, config)
    step, tokens = known["step"], known["tokens"]
    feed, position = _feed(config, Processes()), known.get("data") or {}
    if config.data.stream:
        if position.get("kind") != "stream":
            raise RunError(
                f"the checkpoint in {str(checkpoint)!r} does not say where in a stream it was, and from its beginning "
                f"{config.data.stream!r} would give what it may have seen. Go on from a checkpoint of a run over this "
                "stream (one in its folder, for those shared without progress.json do not say), or over prepared data: "
                "leave data.stream empty"
            )
        feed.seek(position, Processes())  # refused before anything is written
    model = build_model(config.model)
    load_weights(model, read_weights(checkpoint))
    due = float(config.train.snapshot_first_tokens)
    while due <= tokens:
        due *= config.train.snapshot_factor
    progress = {
        "step": step, "tokens": tokens, "samples": known["samples"], "seconds": known["seconds"], "next_snapshot": due,
        "data": position if config.data.stream else None,
    }  # fmt: skip
    config = replace(config, optim=replace(config.optim, rewarm_at=step))
    with atomic_folder(out) as partial:
        write_config(partial, config)
        first = partial / "checkpoints" / f"step-{step:08d}"
        first.mkdir(parents=True)
        save_checkpoint(first, model, config.model, dtype=torch.float32, trained=trained)
        copy_tokenizer(Path(config.data.path).expanduser(), first)
        save_tensors({}, first / OPTIMIZER)  # no moments: AdamW begins anew
        write_json(first / PROGRESS, progress)
    return config


def _left_off(checkpoint: Path, trained: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Where a checkpoint's training was: its ``progress.json``, or what can be said from the training record alone."""
    if (checkpoint / PROGRESS).is_file():
        return read_progress(checkpoint)
    step, tokens, samples = (trained.get(key) for key in ("steps", "tokens", "samples"))
    if not isinstance(step, int) or step < 1 or not isinstance(tokens, int):
        raise RunError(
            f"the checkpoint in {str(checkpoint)!r} does not say after how many steps and tokens of training it was "
            "written: there is nothing to go on from. Begin a new run"
        )
    if not isinstance(samples, int):  # records of before they were noted
        samples = step * config.train.batch_size * config.train.grad_accumulation
        if tokens != samples * config.model.block_size:
            raise RunError(
                f"the checkpoint says that it has seen {tokens} tokens in {step} steps, and not in how many samples; "
                f"the config's steps are of {samples // step * config.model.block_size} tokens. Set train.batch_size "
                "and grad_accumulation to what it was trained with; if steps were skipped, its samples cannot be told"
            )
    return {"step": step, "tokens": tokens, "samples": samples, "seconds": float(trained.get("seconds", 0.0))}


class _Stop(threading.Event):
    """Set by Ctrl-C and SIGTERM, so that the step in progress can finish and be saved."""

    number: int = 0

    def ask(self, number: int) -> None:
        self.number = number
        self.set()


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    asked = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.signal(s, lambda number, _: asked.ask(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def head_loss(model: LoopedGPT, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the head on ``x``, ``(B, T, D)``, for targets ``(B, T)``."""
    return F.cross_entropy(model.readout(x).float().flatten(0, 1), targets.flatten())


def compile_for_training(model: LoopedGPT) -> Callable[[LoopedGPT, Tensor, Tensor], Tensor]:
    """Compile each layer and each region's whole step, in place (names stay), and the loss, which is returned."""
    torch._dynamo.config.recompile_limit = 64  # one graph a region, with and without gradients
    for layer in model.layers.values():
        (layer.body if isinstance(layer, Region) else layer).compile()
    return torch.compile(head_loss)


def _check_data(config: RunConfig, data: TokenData) -> None:
    if data.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the data was prepared with {data.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}"
        )


def train(
    config: RunConfig, folder: Path, *, resume: bool = False, on_event: Callable[[Event], None] | None = None
) -> bool:
    """Train until ``max_steps`` or until asked to stop (Ctrl-C, SIGTERM), which saves first.

    Under torchrun, or in any initialized process group, all processes call this with the same arguments.

    Args:
        config: used as given, also when resuming (so that evaluation or length can be changed).
        folder: the run folder; created, or with ``resume`` continued from its last complete checkpoint.
        resume: continue; without it a folder that holds a run already is refused.
        on_event: told of every step, evaluation, checkpoint, snapshot and fault; in the first process only.

    Returns:
        True when the run reached ``max_steps``.

    Raises:
        RunError: the folder holds a run and ``resume`` is off, or the other way round; or a damaged checkpoint.
        DataError: the token data is missing, damaged, not what the run began with, or does not fit the model.
        TrainingDiverged: a loss or gradient norm that is not finite, if the config says to stop there.
        WriteFailed: a full or read-only disk; the checkpoints before are whole.
    """
    if not config.data.path:
        raise ConfigError("data.path is empty: name a folder made by 'haltkit prepare'")
    held_out = TokenData(Path(config.data.path).expanduser(), config.data.eval_split, config.model.block_size)
    _check_data(config, held_out)
    if not resume and checkpoints(folder):
        raise RunError(f"{str(folder)!r} holds a run already: add --resume, or choose another folder")
    newest = latest(folder) if resume else None

    with join() as processes:
        feed = _feed(config, processes)
        run = _start(config, folder, feed, processes)
        if newest is not None:
            restore(run, newest)
        if processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            clean(folder)
            write_config(folder, config)
        processes.wait()
        log = log_to(folder, config, run.step, on_event) if processes.first else nullcontext(lambda event: None)
        with log as emit, _stop_requests() as stop:
            emit({"kind": "start", "step": run.step, "max_steps": config.train.max_steps, "tokens": run.tokens,
                  "parameters": sum(p.numel() for p in run.model.parameters()), "seed": config.train.seed,
                  "processes": processes.world, "strategy": config.train.strategy if processes.world > 1 else None,
                  "versions": versions()})  # fmt: skip
            return _Trainer(run, held_out, emit, stop).run_to_the_end()


def _feed(config: RunConfig, processes: Processes) -> Feed:
    if config.data.stream:
        from haltkit.models.stream import StreamFeed

        train = config.train
        return StreamFeed(config.data, train.batch_size, config.model.block_size, processes.rows(train.batch_size))
    data = TokenData(Path(config.data.path).expanduser(), config.data.train_split, config.model.block_size)
    _check_data(config, data)
    return ShardFeed(data, config.train.seed)


def _start(config: RunConfig, folder: Path, feed: Feed, processes: Processes) -> Run:
    """A run at step 0, the same in every process."""
    processes.rows(config.train.batch_size)  # refused before anything is built
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(processes.device)
    objective = Objective(model, compile_for_training(model) if config.train.compile else head_loss, head_loss)
    wrapped = wrap(objective, config.train.strategy, processes)  # FSDP replaces parameters: the optimizer comes after
    run = Run(config, folder, model, wrapped, _optimizer(model, config.optim), feed, processes)
    run.next_snapshot = config.train.snapshot_first_tokens
    return run


class _Trainer:
    """The steps of a run and what happens between them. All processes do the same, the first one also writes."""

    def __init__(self, run: Run, held_out: TokenData, emit: Callable[[Event], None], stop: _Stop) -> None:
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
            loss, grad_norm = _step(run)
            fault = _fault(run, loss, grad_norm)
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
                if not _weights_are_finite(run):
                    self._stop_for(
                        f"the weights are not finite after step {run.step}: stopped without saving them", "not finite"
                    )
                if run.step % train.log_every == 0 or run.step == train.max_steps:
                    self.emit({"kind": "step", "step": run.step, "tokens": run.tokens, "samples": run.samples,
                               "loss": loss, "grad_norm": grad_norm, "lr": run.optimizer.param_groups[0]["lr"],
                               "tokens_per_second": run.tokens_per_step / elapsed,
                               "seconds": run.seconds})  # fmt: skip
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
            losses = _evaluate(run, self.held_out)
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
        losses, weights = _evaluate(run, self.held_out), full_weights(run.model)
        progress = progress_of(run, self.versions)
        with writing(run.folder, path.name), shared_folder(path, run.processes) as partial:
            if run.processes.first:
                trained = {**run.trained, "held_out_loss": losses}
                write_export(
                    partial, run.model, run.config.model, weights, trained=trained, progress=progress,
                    tokenizer=Path(run.config.data.path).expanduser(),
                )  # fmt: skip
                if statistics:
                    write_json(partial / STATISTICS_FILE, _statistics(run, weights, self.held_out))
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


@dataclass(frozen=True)
class Forecast:
    """What a run would be, from its config and a few real steps.

    Attributes:
        effective_depth: layers a token passes at the mean loop count.
        flops: operations a token, mean over the run's own loop draws.
        activations: bytes that one micro-step of this process keeps for its backward pass; grows with the batch, the
            length and ``backprop_depth``, not with the number of loops.
        state: bytes of weights, gradients and optimizer moments in this process.
        peak: bytes of the whole process at its peak so far.
        seconds: one step (not the first, which compiles), scaled from the probe's operations to those of the mean step.
    """

    parameters: int
    effective_depth: int
    flops: Spent
    activations: int
    state: int
    peak: int
    seconds: float
    tokens_per_step: int
    tokens: int
    checkpoint: int


def forecast(config: RunConfig, steps: int = 3) -> Forecast:
    """Take ``steps`` real steps on the run's own data and write nothing.

    Raises:
        ConfigError, DataError: as :func:`train`.
    """
    with join() as processes:
        run = _start(config, Path(), _feed(config, processes), processes)
        with saved_bytes(run.model.parameters()) as kept:
            rows = processes.rows(config.train.batch_size)
            batch = torch.from_numpy(run.feed.take(0, rows)).to(processes.device)
            loops = dict.fromkeys(run.model.regions, config.model.mean_loops)
            with _autocast(run):
                loss = run.objective(
                    batch, loops, TrainingNoise(config.train.seed, rows), config.train.backprop_depth,
                    config.train.recompute_steps,
                )  # fmt: skip
        loss.backward()
        run.optimizer.zero_grad(set_to_none=True)
        counts = [0.0, 0.0]
        for number in range(steps):
            started = settled()
            _step(run)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            counts[0] += settled() - started
            for micro_step in range(config.train.grad_accumulation):
                drawn = {
                    name: loop_count(
                        config.model.mean_loops, config.train.loop_sigma, seed=config.train.seed, step=number,
                        micro_step=micro_step, region=name,
                    )
                    for name in run.model.regions
                }  # fmt: skip
                spent = step_flops(config.model, drawn, config.train.backprop_depth)
                counts[1] += spent.total * config.train.batch_size * config.model.block_size
            run.step += 1
            run.samples += run.samples_per_step
        flops = training_flops(config)
        parameters = sum(local(p).numel() for p in run.model.parameters())
        whole = sum(p.numel() for p in run.model.parameters())
        return Forecast(
            parameters=whole, effective_depth=run.model.effective_depth, flops=flops, activations=kept.value,
            state=4 * 4 * parameters, peak=_peak(processes.device),
            seconds=counts[0] / counts[1] * flops.total * run.tokens_per_step,
            tokens_per_step=run.tokens_per_step, tokens=run.tokens_per_step * config.train.max_steps,
            checkpoint=3 * 4 * whole,
        )  # fmt: skip


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _fault(run: Run, loss: float, grad_norm: float) -> str | None:
    """What is wrong with a step, the same answer in every process."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "not finite"
    margin = run.config.train.spike_margin
    if margin and len(run.recent) >= SPIKE_HISTORY and loss > statistics.median(run.recent) + margin:
        return "spike"
    return None


def _weights_are_finite(run: Run) -> bool:
    """Whether every weight is finite; under a hundredth of a step's time."""
    parts = [part for p in run.model.parameters() if (part := local(p.detach())).numel()]
    extremes = [extreme for part in parts for extreme in torch.aminmax(part)]
    broken = bool(extremes) and not bool(torch.stack(extremes).isfinite().all())  # one look at the device for all
    return not (run.processes.greatest(int(broken)) if run.sharded else broken)


def _autocast(run: Run) -> Any:
    bf16 = run.config.train.precision == "bf16"
    return torch.autocast(run.processes.device.type, torch.bfloat16) if bf16 else nullcontext()


def _step(run: Run) -> tuple[float, float]:
    """Gradients of one optimizer step, clipped; the global batch's mean loss and the gradient norm before clipping."""
    train, optim, model, processes = run.config.train, run.config.optim, run.model, run.processes
    rows = processes.rows(train.batch_size)
    share = len(rows) / train.batch_size
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, train.max_steps, optim)
    total = torch.zeros((), device=processes.device)
    for micro_step in range(train.grad_accumulation):
        first = run.samples + micro_step * train.batch_size
        batch = _to_device(torch.from_numpy(run.feed.take(first, rows)), processes.device)
        loops = {
            name: loop_count(
                model.mean_loops, train.loop_sigma, seed=train.seed, step=run.step, micro_step=micro_step, region=name
            )
            for name in model.regions
        }
        noise = TrainingNoise(train.seed, [first + row for row in rows])
        with synchronized(run.objective, micro_step == train.grad_accumulation - 1):
            with _autocast(run):
                loss = run.objective(batch, loops, noise, train.backprop_depth, train.recompute_steps)
            # The engines average over processes; processes may hold different numbers of rows.
            (loss * (share * processes.world / train.grad_accumulation)).backward()
        total += loss.detach().float() * (share / train.grad_accumulation)
    clip = optim.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if hasattr(grad_norm, "full_tensor"):
        grad_norm = grad_norm.full_tensor()
    return float(processes.sum(total)), float(grad_norm)


def _to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the device is still busy with."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def _statistics(run: Run, weights: dict[str, Tensor], held_out: TokenData) -> dict[str, Any]:
    """Reduced loop statistics of the current weights, on a few held-out windows, in float32."""
    model = build_model(run.config.model)  # a plain one: hooks added to a compiled module do not fire
    load_weights(model, {name: weight.cpu() for name, weight in weights.items()})
    device = run.processes.device
    statistics = loop_statistics(model.eval().to(device), held_out.spread(STATISTICS_WINDOWS)[:, :-1].to(device))
    return {"tokens_seen": run.tokens, "steps": run.step, **statistics}


@torch.no_grad()
def _evaluate(run: Run, held_out: TokenData) -> dict[str, float]:
    """Together: held-out loss at each of ``eval_loops``, on windows spread evenly over the split."""
    train, processes = run.config.train, run.processes
    windows = held_out.spread(train.eval_batches * train.batch_size)
    batches = torch.split(windows, max(1, train.batch_size // processes.world))
    counts = train.eval_loops if run.model.regions else train.eval_loops[:1]
    sums = torch.zeros(len(counts), dtype=torch.float64)
    for first in range(0, len(batches), processes.world):
        mine = first + processes.rank
        # FSDP needs everybody in every forward: who has no batch left computes one that does not count.
        batch = batches[mine if mine < len(batches) else 0]
        weight = len(batch) if mine < len(batches) else 0
        for i, count in enumerate(counts):
            with _autocast(run):
                loss = _unsynchronized(run)(batch.to(processes.device), count if run.model.regions else {})
            sums[i] += weight * float(loss)
    if run.sharded:
        run.objective.reshard()  # type: ignore[operator]  # FSDP waits for a backward with it, and would go on with these very weights
    sums = processes.sum(sums) / len(windows)
    return {str(count): float(sums[min(i, len(counts) - 1)]) for i, count in enumerate(train.eval_loops)}


def _unsynchronized(run: Run) -> Any:
    """The objective without DDP around it, which would prepare for a backward that never comes."""
    wrapped = run.objective
    return wrapped.module if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel) else wrapped
