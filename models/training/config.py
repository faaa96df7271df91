"""A training run's configuration: one YAML file with the sections ``model``, ``data``, ``optim`` and ``train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from haltkit.files import FileError, read_yaml
from haltkit.models.config import ConfigError, from_dict
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.text.config import DataConfig

__all__ = ["CONFIG_DIR", "OptimConfig", "RunConfig", "TrainConfig", "load_config"]

CONFIG_DIR = Path(__file__).parent.parent / "configs"


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
    # Only for "wsd": the rate falls to min_lr over this many last steps; 0 keeps it to the end.
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
    # Gradients flow through this many last steps of each region ([G]: 8).
    backprop_depth: int = 8
    # Activation checkpointing of loop steps: keep each step's first state only and compute the step again.
    recompute_steps: bool = False
    # "auto": bf16 where the processor or GPU multiplies it in hardware, float32 elsewhere. What it came to is recorded,
    # and a resumed run keeps it.
    precision: Literal["auto", "float32", "bf16"] = "auto"
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
            "max_steps",
            "batch_size",
            "grad_accumulation",
            "backprop_depth",
            "log_every",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep_checkpoints",
            "snapshot_first_tokens",
            "max_faults",
        ):
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


def load_config(source: str | Path) -> RunConfig:
    """Read a config by path, or by the name of one that ships with haltkit (``small.yaml`` or ``small``).

    Raises:
        ConfigError: no such file (the shipped names are listed), invalid YAML, or a bad field.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        shipped = CONFIG_DIR / f"{path.name.removesuffix('.yaml')}.yaml"
        if path.parent != Path() or not shipped.is_file():
            names = ", ".join(sorted(p.stem for p in CONFIG_DIR.rglob("*.yaml")))
            raise ConfigError(f"no config file {str(source)!r}; shipped with haltkit: {names}")
        path = shipped
    try:
        values = read_yaml(path, "the config", object)
    except FileError as error:
        raise ConfigError(str(error)) from None
    return from_dict(RunConfig, {} if values is None else values)
