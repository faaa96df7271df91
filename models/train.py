"""Training of the bundled model: the recipe's loop draws, truncated backprop, durable checkpoints.

Every random draw is keyed by the run's seed and the step (see :mod:`haltkit.models.draws`), so the step
number is the whole random state, and a resumed run continues bit for bit as if never interrupted.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.models.checkpoint import (
    CheckpointError,
    build_model,
    load_weights,
    read_config,
    read_tensors,
    save_checkpoint,
)
from haltkit.models.config import ConfigError, OptimConfig, RunConfig, from_dict, to_dict
from haltkit.models.data import DataError, TokenData, read_manifest
from haltkit.models.draws import TrainingNoise, loop_count
from haltkit.models.evaluate import fixed_depth_losses
from haltkit.models.files import atomic_folder, atomic_path, write_json
from haltkit.models.gpt import LoopedGPT, Region
from haltkit.models.statistics import loop_statistics
from haltkit.models.tokenizer import TOKENIZER_FILE

__all__ = ["Event", "RunError", "TrainingDiverged", "anneal", "continue_from", "learning_rate", "train"]

# What training reports: {"kind": "start" | "step" | "eval" | "checkpoint" | "snapshot" | "end", ...}.
Event = Mapping[str, Any]
CONFIG_FILE, LOG_FILE, STATISTICS_FILE = "config.yaml", "log.jsonl", "statistics.json"


STATISTICS_WINDOWS = 8


class RunError(ValueError):
    """A run folder that cannot be started in or resumed from."""


class TrainingDiverged(RuntimeError):
    """The loss is not finite any more; the run's last checkpoint is from before."""


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


@dataclass
class _Run:
    """One run in progress: what is configured, what moves, and where it is kept."""

    config: RunConfig
    folder: Path
    model: LoopedGPT
    optimizer: torch.optim.AdamW
    loss: Callable[[LoopedGPT, Tensor, Tensor], Tensor]
    step: int = 0
    seconds: float = 0.0
    next_snapshot: float = 0.0

    @property
    def tokens_per_step(self) -> int:
        train = self.config.train
        return train.batch_size * train.grad_accumulation * self.config.model.block_size

    @property
    def tokens(self) -> int:
        return self.step * self.tokens_per_step


def _optimizer(model: LoopedGPT, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW as nanoGPT groups it: matrices and embeddings decay, gains do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _save(run: _Run) -> Path:
    from safetensors.torch import save_file

    path = run.folder / "checkpoints" / f"step-{run.step:08d}"
    state: dict[str, Tensor] = {}
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value.detach().contiguous()
    progress = {"step": run.step, "tokens": run.tokens, "seconds": run.seconds, "next_snapshot": run.next_snapshot}
    with atomic_folder(path) as partial:
        save_checkpoint(partial, run.model, run.config.model, dtype=torch.float32, trained={"tokens": run.tokens})
        save_file(state, partial / "optimizer.safetensors")
        (partial / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    for old in sorted((run.folder / "checkpoints").glob("step-*"))[: -run.config.train.keep_checkpoints]:
        shutil.rmtree(old)
    return path


def _latest(folder: Path) -> Path:
    found = sorted((folder / "checkpoints").glob("step-*"))
    if not found:
        raise RunError(f"no checkpoint in {str(folder)!r} to resume from")
    return found[-1]


def _restore(run: _Run, path: Path) -> None:
    load_weights(run.model, read_tensors(path / "model.safetensors"))
    state = read_tensors(path / "optimizer.safetensors")
    state = {
        key: value if key.endswith("/step") else value.to(next(run.model.parameters()).device)
        for key, value in state.items()
    }
    for name, parameter in run.model.named_parameters():
        keys = [key for key in state if key.rpartition("/")[0] == name]
        run.optimizer.state[parameter] = {key.rpartition("/")[2]: state[key] for key in keys}
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    run.step, run.seconds = int(progress["step"]), float(progress["seconds"])
    run.next_snapshot = float(progress["next_snapshot"])


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


def anneal(source: Path, out: Path, steps: int, data: Path | None = None) -> RunConfig:
    """Copy a run's last checkpoint into a new run whose rate falls to its minimum over ``steps`` more steps.

    The new folder is resumed with :func:`train`; the source run is left as it is and can go on.

    Raises:
        RunError: no checkpoint, or ``out`` exists.
    """
    config, latest = read_run_config(source), _latest(source)
    if out.exists():
        raise RunError(f"{str(out)!r} exists already: choose another folder")
    if steps < 1:
        raise RunError(f"an anneal takes at least 1 step, got {steps}")
    step = int(json.loads((latest / "progress.json").read_text(encoding="utf-8"))["step"])
    # From the rate that the run has reached: annealing must never raise it.
    reached = learning_rate(step, config.train.max_steps, config.optim)
    low = min(1.0, config.optim.lr * config.optim.min_lr_ratio / reached)
    optim = replace(config.optim, lr=reached, min_lr_ratio=low, schedule="wsd", decay_steps=steps, warmup_steps=0)
    config = replace(config, optim=optim, train=replace(config.train, max_steps=step + steps))
    if data is not None:
        config = replace(config, data=replace(config.data, path=str(data)))
    read_manifest(Path(config.data.path).expanduser())  # before anything is copied
    with atomic_folder(out) as partial:
        write_config(partial, config)
        shutil.copytree(latest, partial / "checkpoints" / latest.name)
    return config


def continue_from(checkpoint: Path, config: RunConfig, out: Path) -> RunConfig:
    """Make a run folder that goes on from a checkpoint's weights: for a run whose own folder is gone.

    The optimizer starts fresh and the rate warms up over ``optim.warmup_steps``. The step, and with it the order of
    the samples and every draw, is the one that the checkpoint's training record says, so no sample comes twice. The
    new folder is resumed with :func:`train`.

    Raises:
        RunError: ``out`` exists, or the checkpoint's training does not say how far it was in steps of this size.
        CheckpointError: no checkpoint, or not one of ``config.model``.
    """
    if out.exists():
        raise RunError(f"{str(out)!r} exists already: choose another folder")
    model_config, trained = read_config(checkpoint)
    own, found = to_dict(config.model), to_dict(model_config)
    if own != found:
        name = next(name for name in own if own[name] != found[name])
        raise CheckpointError(
            f"the checkpoint in {str(checkpoint)!r} is of another model: model.{name} is {found[name]!r} there and "
            f"{own[name]!r} in the config"
        )
    step, tokens = trained.get("steps"), trained.get("tokens")
    size = config.train.batch_size * config.train.grad_accumulation * config.model.block_size
    if not isinstance(step, int) or step < 1 or tokens != step * size:
        raise RunError(
            f"the checkpoint says that it has seen {tokens} tokens in {step} steps; the config's steps are of {size} "
            "tokens. Set train.batch_size and grad_accumulation to what it was trained with"
        )
    model = build_model(config.model)
    load_weights(model, read_tensors(checkpoint / "model.safetensors"))
    run = _Run(
        replace(config, optim=replace(config.optim, rewarm_at=step)), out, model, _optimizer(model, config.optim), _loss
    )
    run.step, run.seconds = step, float(trained.get("seconds", 0.0))
    run.next_snapshot = config.train.snapshot_first_tokens
    while run.next_snapshot <= run.tokens:
        run.next_snapshot *= config.train.snapshot_factor
    read_manifest(Path(config.data.path).expanduser())  # before anything is written
    with atomic_folder(out) as partial:
        write_config(partial, run.config)
        run.folder = partial
        _save(run)
    return run.config


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the step in progress can finish and be saved."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.signal(s, lambda *_: asked.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loss(model: LoopedGPT, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the head on ``x``, ``(B, T, D)``, for targets ``(B, T)``."""
    return F.cross_entropy(model.readout(x).float().flatten(0, 1), targets.flatten())


def _compile(run: _Run) -> None:
    """Compile each layer, each region's whole step and the loss, in place; the state dict's names do not change."""
    model = run.model
    run.loss = torch.compile(_loss)
    torch._dynamo.config.recompile_limit = 64  # one graph a region, with and without gradients
    for layer in model.layers.values():
        (layer.body if isinstance(layer, Region) else layer).compile()


def _check_data(config: RunConfig, data: TokenData) -> None:
    if data.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the data was prepared with {data.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}"
        )


def train(
    config: RunConfig, folder: Path, *, resume: bool = False, on_event: Callable[[Event], None] | None = None
) -> bool:
    """Train until ``max_steps`` or until asked to stop (Ctrl-C, SIGTERM), which saves first.

    Args:
        config: used as given, also when resuming (so that evaluation or length can be changed).
        folder: the run folder; created, or with ``resume`` continued from its last complete checkpoint.
        resume: continue; without it a folder that holds a run already is refused.
        on_event: told of every step, evaluation, checkpoint and snapshot.

    Returns:
        True when the run reached ``max_steps``.

    Raises:
        RunError: the folder holds a run and ``resume`` is off, or the other way round.
        DataError: the token data is missing or does not fit the model.
        TrainingDiverged: a loss or gradient norm that is not finite.
    """
    if not config.data.path:
        raise ConfigError("data.path is empty: name a folder made by 'haltkit prepare'")
    data_folder = Path(config.data.path).expanduser()
    block = config.model.block_size
    data = TokenData(data_folder, config.data.train_split, block)
    _check_data(config, data)
    held_out = TokenData(data_folder, config.data.eval_split, block)
    if not resume and (folder / "checkpoints").exists():
        raise RunError(f"{str(folder)!r} holds a run already: add --resume, or choose another folder")
    latest = _latest(folder) if resume else None

    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(config, folder, model, _optimizer(model, config.optim), _loss)
    run.next_snapshot = config.train.snapshot_first_tokens
    if latest is not None:
        _restore(run, latest)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    if config.train.compile:
        _compile(run)

    with _log_to(folder, on_event) as emit, _stop_requests() as stop:
        emit({"kind": "start", "step": run.step, "max_steps": config.train.max_steps, "tokens": run.tokens,
              "parameters": sum(p.numel() for p in model.parameters())})  # fmt: skip
        return _steps(run, data, held_out, emit, stop)


@contextmanager
def _log_to(folder: Path, on_event: Callable[[Event], None] | None) -> Iterator[Callable[[Event], None]]:
    """Write every event to ``log.jsonl`` and TensorBoard, then pass it on."""
    from torch.utils.tensorboard import SummaryWriter

    log = (folder / LOG_FILE).open("a", encoding="utf-8", buffering=1)
    board = SummaryWriter(str(folder / "tensorboard"))

    def emit(event: Event) -> None:
        log.write(json.dumps(event) + "\n")
        for key in ("loss", "lr", "grad_norm", "tokens_per_second"):
            if event["kind"] == "step":
                board.add_scalar(f"train/{key}", event[key], event["step"])
        for loops, loss in event.get("losses", {}).items():
            board.add_scalar(f"eval/loss at {loops} loops", loss, event["step"])
        if event["kind"] in ("eval", "end"):
            board.flush()
        if on_event is not None:
            on_event(event)

    try:
        yield emit
    finally:
        board.close()
        log.close()


def _steps(
    run: _Run, data: TokenData, held_out: TokenData, emit: Callable[[Event], None], stop: threading.Event
) -> bool:
    train = run.config.train
    saved = run.step if run.step else -1
    while run.step < train.max_steps and not stop.is_set():
        started = time.monotonic()
        loss, grad_norm = _step(run, data)
        elapsed = time.monotonic() - started
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            emit({"kind": "end", "step": run.step, "reason": "not finite"})
            raise TrainingDiverged(
                f"loss {loss}, gradient norm {grad_norm} at step {run.step + 1}: stopped; the last checkpoint is "
                f"of step {max(saved, 0)}. Lower optim.lr or raise optim.warmup_steps, then resume from there"
            )
        run.step += 1
        run.seconds += elapsed
        if run.step % train.log_every == 0 or run.step == train.max_steps:
            emit({"kind": "step", "step": run.step, "tokens": run.tokens, "loss": loss, "grad_norm": grad_norm,
                  "lr": run.optimizer.param_groups[0]["lr"], "tokens_per_second": run.tokens_per_step / elapsed,
                  "seconds": run.seconds})  # fmt: skip
        if not _weights_are_finite(run.model):
            emit({"kind": "end", "step": run.step, "reason": "not finite"})
            raise TrainingDiverged(
                f"the weights are not finite after step {run.step}: stopped without saving them; the last checkpoint "
                f"is of step {max(saved, 0)}. Lower optim.lr, then resume from there"
            )
        if run.step % train.eval_every == 0 or run.step == train.max_steps:
            emit({"kind": "eval", "step": run.step, "tokens": run.tokens, "losses": _evaluate(run, held_out)})
        if run.tokens >= run.next_snapshot:
            while run.tokens >= run.next_snapshot:
                run.next_snapshot *= train.snapshot_factor
            path = run.folder / "snapshots" / f"tokens-{run.tokens:010d}"
            with atomic_folder(path) as partial:
                _export(run, partial, _evaluate(run, held_out))
                if run.model.regions:
                    write_json(partial / STATISTICS_FILE, _statistics(run, held_out))
            emit({"kind": "snapshot", "step": run.step, "tokens": run.tokens, "path": path.name})
        if run.step % train.checkpoint_every == 0 or run.step == train.max_steps:
            _save(run)
            saved = run.step
            emit({"kind": "checkpoint", "step": run.step})
    finished = run.step >= train.max_steps
    if finished:
        with atomic_folder(run.folder / "final") as partial:
            _export(run, partial, _evaluate(run, held_out))
        emit({"kind": "snapshot", "step": run.step, "tokens": run.tokens, "path": "final"})
    if saved != run.step:
        _save(run)
        emit({"kind": "checkpoint", "step": run.step})
    emit({"kind": "end", "step": run.step, "reason": "done" if finished else "asked to stop"})
    return finished


def _weights_are_finite(model: LoopedGPT) -> bool:
    """Whether every weight is finite; about a thousandth of a step's time."""
    return all(bool(p.detach().abs().amax() < torch.inf) for p in model.parameters())


def _autocast(run: _Run, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if run.config.train.precision == "bf16" else nullcontext()


def _step(run: _Run, data: TokenData) -> tuple[float, float]:
    """One optimizer step; the mean loss and the gradient norm before clipping."""
    train, optim, model = run.config.train, run.config.optim, run.model
    device = next(model.parameters()).device
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, train.max_steps, optim)
    total = 0.0
    for micro_step in range(train.grad_accumulation):
        first = (run.step * train.grad_accumulation + micro_step) * train.batch_size
        samples = range(first, first + train.batch_size)
        batch = torch.from_numpy(np.stack([data.sample(train.seed, n) for n in samples])).to(device)
        loops = {
            name: loop_count(
                model.mean_loops, train.loop_sigma, seed=train.seed, step=run.step, micro_step=micro_step, region=name
            )
            for name in model.regions
        }
        with _autocast(run, device):
            x = model.hidden(
                batch[:, :-1], loops, noise=TrainingNoise(train.seed, samples), backprop_depth=train.backprop_depth
            )
            loss = run.loss(model, x, batch[:, 1:])
        (loss / train.grad_accumulation).backward()  # type: ignore[no-untyped-call]
        total += loss.item() / train.grad_accumulation
    clip = optim.grad_clip or math.inf
    grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    if math.isfinite(total) and math.isfinite(grad_norm):
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


def _statistics(run: _Run, held_out: TokenData) -> dict[str, Any]:
    """Reduced loop statistics of the current weights, on a few held-out windows, in float32."""
    model = build_model(run.config.model)  # a plain one: hooks added to a compiled module do not fire
    load_weights(model, {name: weight.cpu() for name, weight in run.model.state_dict().items()})
    statistics = loop_statistics(model.eval(), _spread(held_out, STATISTICS_WINDOWS)[:, :-1])
    return {"tokens_seen": run.tokens, "steps": run.step, **statistics}


def _spread(held_out: TokenData, count: int) -> Tensor:
    """``count`` windows spread evenly over a split, ``(count, T + 1)``."""
    chosen = np.linspace(0, len(held_out) - 1, min(len(held_out), count)).astype(int)
    return torch.from_numpy(np.stack([held_out.window(int(i)) for i in chosen]))


def _evaluate(run: _Run, held_out: TokenData) -> dict[str, float]:
    """Held-out loss at each of ``eval_loops``, on windows spread evenly over the split."""
    train = run.config.train
    device = next(run.model.parameters()).device
    windows = _spread(held_out, train.eval_batches * train.batch_size).to(device)
    with _autocast(run, device):
        losses = fixed_depth_losses(run.model, torch.split(windows, train.batch_size), train.eval_loops)
    return {str(count): loss for count, loss in losses.items()}


def _export(run: _Run, folder: Path, losses: dict[str, float]) -> None:
    """A weights-only checkpoint in bf16 that the other commands can load, tokenizer included."""
    trained = {"tokens": run.tokens, "steps": run.step, "seconds": round(run.seconds, 1), "held_out_loss": losses}
    save_checkpoint(folder, run.model, run.config.model, dtype=torch.bfloat16, trained=trained)
    data_folder = Path(run.config.data.path).expanduser()
    if (data_folder / TOKENIZER_FILE).is_file():
        shutil.copyfile(data_folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)
