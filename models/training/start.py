"""How a run begins: anew, resumed, annealed from another run, or from a checkpoint's weights alone."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from haltkit.files import FileError, atomic_path, read_yaml, write_json
from haltkit.folders import atomic_folder
from haltkit.models.checkpoint import build_model
from haltkit.models.config import ConfigError, from_dict, to_dict
from haltkit.models.gpt.files import load_weights, read_config, save_checkpoint
from haltkit.models.text.data import DataError, Feed, ShardFeed, TokenData, read_manifest
from haltkit.models.text.tokenizer import copy_tokenizer
from haltkit.models.training.config import RunConfig
from haltkit.models.training.distributed import Objective, Processes, join, wrap
from haltkit.models.training.precision import Choice, choose_precision
from haltkit.models.training.runs import OPTIMIZER, PROGRESS, Run, RunError, latest, read_progress
from haltkit.models.training.step import adamw, compile_for_training, head_loss, learning_rate
from haltkit.models.weights import CheckpointError, read_weights, save_tensors

__all__ = [
    "RUN_CONFIG",
    "anneal",
    "annealing",
    "check_data",
    "continue_from",
    "new_run",
    "open_feed",
    "read_run_config",
    "settle_precision",
    "write_config",
]

RUN_CONFIG = "config.yaml"


def write_config(folder: Path, config: RunConfig) -> None:
    """Write ``config.yaml`` of a run folder, atomically."""
    import yaml

    with atomic_path(folder / RUN_CONFIG) as partial:
        partial.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def read_run_config(folder: Path) -> RunConfig:
    """The config of a run folder.

    Raises:
        RunError: it has none.
        ConfigError: the file is damaged, or a field is wrong; the message names the file.
    """
    path = folder / RUN_CONFIG
    if not path.is_file():
        raise RunError(f"{str(folder)!r} is not a run folder: it has no {RUN_CONFIG}")
    try:
        return from_dict(RunConfig, read_yaml(path, "the run's config", dict))
    except FileError as error:
        raise ConfigError(f"{error}. To go on with another config, name it beside --resume") from None
    except ConfigError as error:
        raise ConfigError(f"the run's config in {str(path)!r}: {error}") from None


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
    """Copy a run's last checkpoint into a new run with the config that :func:`annealing` gives. Collective.

    The new folder is resumed with :func:`~haltkit.models.training.loop.train`; the source run stays as it is and can
    go on.

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
    """Make a run folder that goes on from a checkpoint's weights: for a run whose own folder is gone. Collective.

    The optimizer starts fresh and the rate warms up over ``optim.warmup_steps``. The step, and with it every draw, and
    the place in the data are those that the checkpoint says, so no sample comes twice. The new folder is resumed with
    :func:`~haltkit.models.training.loop.train`.

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
    feed, position = open_feed(config, Processes()), known.get("data") or {}
    if config.data.stream:
        if position.get("kind") != "stream":
            raise RunError(
                f"the checkpoint in {str(checkpoint)!r} does not say where in a stream it was, and from its beginning "
                f"{config.data.stream!r} would give what it may have seen. Go on from a checkpoint of a run over this "
                "stream (one in its folder, for those shared without progress.json do not say), or over prepared data: "
                "leave data.stream empty"
            )
        feed.seek(position)  # refused before anything is written
    model = build_model(config.model)
    load_weights(model, read_weights(checkpoint))
    due = float(config.train.snapshot_first_tokens)
    while due <= tokens:
        due *= config.train.snapshot_factor
    progress = {
        "step": step,
        "tokens": tokens,
        "samples": known["samples"],
        "seconds": known["seconds"],
        "next_snapshot": due,
        "data": position if config.data.stream else None,
    }
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


def settle_precision(
    config: RunConfig, processes: Processes, folder: Path | None = None, newest: Path | None = None
) -> tuple[RunConfig, Choice]:
    """Collective: the config with ``train.precision`` as the run computes in it, and why.

    Args:
        folder, newest: of a run that goes on, with its last checkpoint: ``auto`` is what it has been computed in.
    """
    asked = config.train.precision
    recorded = processes.once(lambda: _recorded_precision(folder, newest)) if folder and newest else None
    if asked == "auto" and recorded is not None:
        choice = Choice(recorded, "as the run began")
    else:
        choice = processes.once(lambda: choose_precision(asked, processes.device))
    return replace(config, train=replace(config.train, precision=choice.precision)), choice


def _recorded_precision(folder: Path, newest: Path) -> Literal["float32", "bf16"] | None:
    found = read_progress(newest).get("precision")
    if found is None and (folder / RUN_CONFIG).is_file():  # checkpoints of before it was recorded: it was not "auto"
        with suppress(ConfigError):
            found = read_run_config(folder).train.precision
    return found if found in ("float32", "bf16") else None


def check_data(config: RunConfig, data: TokenData) -> None:
    if data.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the data was prepared with {data.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}"
        )


def open_feed(config: RunConfig, processes: Processes) -> Feed:
    if config.data.stream:
        from haltkit.models.text.stream import StreamFeed

        train = config.train
        return StreamFeed(config.data, train.batch_size, config.model.block_size, processes.rows(train.batch_size))
    data = TokenData(Path(config.data.path).expanduser(), config.data.train_split, config.model.block_size)
    check_data(config, data)
    return ShardFeed(data, config.train.seed)


def new_run(config: RunConfig, folder: Path, feed: Feed, processes: Processes) -> Run:
    """A run at step 0, the same in every process."""
    processes.rows(config.train.batch_size)  # refused before anything is built
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(processes.device)
    objective = Objective(model, compile_for_training(model) if config.train.compile else head_loss, head_loss)
    wrapped = wrap(objective, config.train.strategy, processes)  # FSDP replaces parameters: the optimizer comes after
    run = Run(config, folder, model, wrapped, adamw(model, config.optim), feed, processes)
    run.next_snapshot = config.train.snapshot_first_tokens
    return run
