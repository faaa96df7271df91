"""Configurations: frozen dataclasses read from YAML, checked field by field.

A config is unpacked at the door (command line, builders, checkpoints); the
classes behind it take flat arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

__all__ = [
    "CONFIG_DIR",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "region_span",
    "to_dict",
]

CONFIG_DIR = Path(__file__).parent / "configs"

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which field and what is allowed."""


def region_span(name: str) -> tuple[int, int]:
    """First and last layer (numbered from 1, both included) of a region called ``"4"`` or ``"5-6"``."""
    first, _, last = name.partition("-")
    try:
        span = int(first), int(last or first)
    except ValueError:
        raise ConfigError(f"region {name!r}: write one layer ('4') or a range ('5-6')") from None
    if name not in (f"{span[0]}", f"{span[0]}-{span[1]}"):
        raise ConfigError(
            f"region {name!r}: write it as {span[0]}-{span[1]}" if last else f"region {name!r}: write {span[0]}"
        )
    if span[0] < 1 or span[1] < span[0]:
        raise ConfigError(f"region {name!r}: layers are numbered from 1 and a range runs upwards")
    return span


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and the function of a :class:`~haltkit.models.gpt.LoopedGPT`.

    Sources: [P] arXiv 2509.23314 section 2 and appendix B, [G] arXiv 2502.05171; where both leave a
    choice open, the field's comment says what the values mean.
    """

    vocab_size: int = 50257
    block_size: int = 512
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    mlp_ratio: int = 4
    # Layers numbered from 1; "5-6" loops the pair together. Every other layer runs once.
    regions: tuple[str, ...] = ("4", "5-6", "7")
    # r: the loop count the model is trained around; also enters the init through the effective depth.
    mean_loops: int = 12
    # "residual": x = n2(x + attn(n1(x))), as [G]. "branch": x = x + n2(attn(n1(x))).
    norm_placement: Literal["residual", "branch"] = "residual"
    # A parameter-free RMSNorm at the end of each body step: holds the state's norm at sqrt(d).
    state_norm: bool = False
    # An RMSNorm on what a region hands on, as [G] norms the loop's output.
    exit_norm: bool = True
    # When the region's input is mixed into the state through the learned projection of [state ; input].
    injection: Literal["every_step", "first_step", "never"] = "every_step"
    # "identity" starts the projection at [0.5 W ; 0.5 W + I]; "random" at W.
    injection_init: Literal["identity", "random"] = "random"
    # What x_0 is: truncated normal noise of variance 2/5 ([G]), zeros, or the region's own input.
    initial_state: Literal["noise", "zero", "input"] = "noise"
    # "every_step" adds fresh noise to the state before each application ([P]'s other reading).
    noise: Literal["initial", "every_step"] = "initial"
    noise_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "d_model", "mlp_ratio", "mean_loops"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.noise_seed < 0:
            raise ConfigError(f"model.noise_seed must not be negative, got {self.noise_seed}")
        if self.d_model % self.n_head:
            raise ConfigError(f"model.d_model={self.d_model} is not a multiple of n_head={self.n_head}")
        end = 0
        for name in self.regions:
            first, last = region_span(name)
            if first <= end:
                raise ConfigError(f"model.regions: {name!r} overlaps or precedes the region before it")
            if last > self.n_layer:
                raise ConfigError(f"model.regions: {name!r} ends after the last layer ({self.n_layer})")
            end = last
        if self.injection == "never" and self.initial_state != "input":
            raise ConfigError(
                "model.injection=never needs initial_state=input: otherwise the region never sees its input"
            )
        if self.noise == "every_step" and self.initial_state != "noise":
            raise ConfigError("model.noise=every_step needs initial_state=noise")


@dataclass(frozen=True)
class DataConfig:
    """Where training tokens come from: a folder written by ``haltkit prepare``, or a stream beside it."""

    path: str = ""
    train_split: str = "train"
    eval_split: str = "validation"
    # Train on text read and tokenized on the way instead of the prepared split: a Hub dataset, or local files. The
    # folder at ``path`` still gives the tokenizer and the evaluation split, whose documents the stream leaves out.
    stream: str = ""
    stream_config: str = ""
    # A commit, tag or branch of the dataset on the Hub. A commit makes sure that a resumed run reads the same text.
    stream_revision: str = ""
    stream_column: str = "text"
    # What a document of the stream that cannot be read does: "stop" the run, or be left out and counted in the log.
    bad_documents: Literal["stop", "skip"] = "stop"
    # Processes that read and tokenize for each training process; 0 does it between steps.
    stream_workers: int = 1

    def __post_init__(self) -> None:
        if self.stream_revision and not self.stream:
            raise ConfigError("data.stream_revision is of a dataset on the Hub: name that in data.stream")
        if self.stream_workers < 0:
            raise ConfigError(f"data.stream_workers must not be negative, got {self.stream_workers}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW in nanoGPT's manner, with a cosine or a warmup-stable-decay schedule."""

    lr: float = 6e-4
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 2000
    # Only for "wsd": the rate falls to min_lr over this many last steps; 0 holds it to the end.
    decay_steps: int = 0
    # The step at which a run was taken up again from weights alone: the rate warms up anew from there. 0: never.
    rewarm_at: int = 0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr must be positive, got {self.lr}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"optim.min_lr_ratio must lie in [0, 1], got {self.min_lr_ratio}")
        for name in ("warmup_steps", "decay_steps", "rewarm_at", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig:
    """The training run: how long, in what precision, what is saved and when."""

    seed: int = 0
    max_steps: int = 60_000
    # Sequences of one micro-step, of all processes together: a run is the same on one process and on eight.
    batch_size: int = 10
    grad_accumulation: int = 1
    # Under torchrun: "ddp" keeps the weights whole in every process, "fsdp" shards them, gradients and optimizer.
    strategy: Literal["ddp", "fsdp"] = "ddp"
    # [G]: K ~ Poisson(exp(tau)) + 1 with tau ~ Normal(log r - sigma^2/2, sigma).
    loop_sigma: float = 0.5
    # Gradients flow through the last so many steps of each region ([G]: 8).
    backprop_depth: int = 8
    # Activation checkpointing of loop steps: keep each step's first state only and compute the step again.
    recompute_steps: bool = False
    precision: Literal["float32", "bf16"] = "bf16"
    compile: bool = True
    # What a loss or gradient norm that is not finite does: "stop" the run; "skip" the update and go on with the next
    # batch; "rollback" to the last checkpoint's weights and go on with the next batch.
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    # The same for a loss above the median of the last 32 by more than spike_margin nats; 0 looks for none.
    on_spike: Literal["stop", "skip", "rollback"] = "skip"
    spike_margin: float = 0.0
    # So many skips in a row, or rollbacks without a new checkpoint between them, stop the run.
    max_faults: int = 10
    log_every: int = 10
    eval_every: int = 1000
    eval_batches: int = 20
    eval_loops: tuple[int, ...] = (1, 4, 8, 12, 32)
    checkpoint_every: int = 1000
    # Besides so many newest ones the best is kept (least held-out loss, mean over eval_loops), and, unless 0, those
    # of every so many steps.
    keep_checkpoints: int = 2
    keep_every: int = 0
    # Weights-only snapshots at log-spaced token counts: the first, then each so many times the last.
    snapshot_first_tokens: int = 100_000
    snapshot_factor: float = 2.0
    # Weights & Biases project to log to as well, if wandb is installed.
    wandb_project: str = ""

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "batch_size", "grad_accumulation", "backprop_depth", "log_every", "eval_every",
            "eval_batches", "checkpoint_every", "keep_checkpoints", "snapshot_first_tokens", "max_faults",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"train.seed must not be negative, got {self.seed}")
        for name in ("loop_sigma", "keep_every", "spike_margin"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}")
        if self.snapshot_factor <= 1:
            raise ConfigError(f"train.snapshot_factor must be above 1, got {self.snapshot_factor}")
        if not self.eval_loops or min(self.eval_loops) < 1:
            raise ConfigError(f"train.eval_loops must be one or more positive counts, got {self.eval_loops}")


@dataclass(frozen=True)
class RunConfig:
    """One YAML file: ``model``, ``data``, ``optim`` and ``train`` sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain lists, dicts and scalars, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}={value!r}: allowed are {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}={value!r}: a list is expected")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}={value!r}: exactly {len(kinds)} entries are expected")
        return tuple(_coerce(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = float(value)
    # YAML 1.1 reads 6e-4 (no dot) as a string: accept what is plainly a number.
    if hint is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    # YAML reads an unquoted region such as 4 as a number.
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{where}={value!r}: a finite number is expected")
    if type(value) is not hint:
        raise ConfigError(f"{where}={value!r}: {hint.__name__} expected, got {type(value).__name__}")
    return value


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Build a config dataclass from plain values.

    Raises:
        ConfigError: an unknown field (the known ones are listed), a value of the wrong kind, or a
            value that the dataclass itself refuses.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'config'}: a mapping of fields is expected, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    built: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"unknown config field {path}{hint}; known here: {', '.join(known)}")
        if dataclasses.is_dataclass(hints[name]):
            built[name] = from_dict(typing.cast("type[Any]", hints[name]), value, path)
        else:
            built[name] = _coerce(value, hints[name], path)
    return cls(**built)


def load_config(source: str | Path) -> RunConfig:
    """Read a config by path, or by the name of one that ships with haltkit (``small.yaml`` or ``small``).

    Raises:
        ConfigError: no such file (the shipped names are listed), invalid YAML, or a bad field.
    """
    import yaml

    path = Path(source)
    if not path.is_file():
        shipped = CONFIG_DIR / f"{path.name.removesuffix('.yaml')}.yaml"
        if path.parent != Path() or not shipped.is_file():
            names = ", ".join(sorted(p.name for p in CONFIG_DIR.glob("*.yaml")))
            raise ConfigError(f"no config file {str(source)!r}; shipped with haltkit: {names}")
        path = shipped
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    return from_dict(RunConfig, values if values is not None else {})
