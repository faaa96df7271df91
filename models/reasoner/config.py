"""What a run of a reasoner is made of: one YAML file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from haltkit.files import FileError, read_yaml
from haltkit.models.config import ConfigError, from_dict
from haltkit.models.reasoner.model import Reasoner
from haltkit.models.reasoner.task import Task, make_task
from haltkit.models.training.config import CONFIG_DIR
from haltkit.trust import reading

SHIPPED = CONFIG_DIR / "reasoners"

__all__ = [
    "LayerConfig",
    "RateConfig",
    "ReasonerConfig",
    "RecipeConfig",
    "build_reasoner",
    "config_from_dict",
    "is_reasoner_config",
    "load_reasoner_config",
    "plain",
]


@dataclass(frozen=True)
class LayerConfig:
    """The looped layer's shape."""

    d_model: int = 64
    n_head: int = 4
    mlp_ratio: int = 4
    noise_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("d_model", "n_head", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_head:
            raise ConfigError(f"model.d_model={self.d_model} is not a multiple of n_head={self.n_head}")
        if self.noise_seed < 0:
            raise ConfigError(f"model.noise_seed must not be negative, got {self.noise_seed}")


@dataclass(frozen=True)
class RateConfig:
    """AdamW, and a rate that rises over ``warmup_steps``, stays, and falls linearly over the last ``decay_share``."""

    lr: float = 3e-3
    min_lr_ratio: float = 0.05
    warmup_steps: int = 50
    decay_share: float = 0.25
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    ema: float = 0.995  # of the weights, which is what is evaluated and shipped

    def __post_init__(self) -> None:
        if not self.lr > 0 or not self.grad_clip > 0:
            raise ConfigError("optim.lr and optim.grad_clip must be positive")
        for name in ("min_lr_ratio", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim.{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"optim.ema must be from 0 to below 1, got {self.ema}")


@dataclass(frozen=True)
class RecipeConfig:
    """How the loop is trained.

    Attributes:
        max_steps: optimizer steps.
        losses: at how many step counts of a pass the loss is taken: the last and random ones before it.
        backprop_depth: gradients flow through this many last steps of a loop; 0: through all.
        supervision: ``random_steps`` as above; ``last_step``: every pass takes the level's greatest number of steps
            and its loss at the last one only (an ablation).
        state_noise: standard deviation of noise added to the state after each step.
        mastered: a level is mastered when so large a share of its deepest rows is right ...
        examine_every: ... which is looked at every so many optimizer steps, on a fresh batch.
        level_steps: a level takes at least this many.
        precision: of matrix products; ``auto``: bf16 where the processor multiplies it, float32 elsewhere.
    """

    seed: int = 0
    max_steps: int = 6000
    losses: int = 3
    backprop_depth: int = 16
    supervision: Literal["random_steps", "last_step"] = "random_steps"
    state_noise: float = 0.01
    mastered: float = 0.97
    examine_every: int = 20
    level_steps: int = 50
    precision: Literal["auto", "float32", "bf16"] = "auto"
    log_every: int = 50
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("max_steps", "losses", "log_every", "save_every", "examine_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "backprop_depth", "state_noise"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class ReasonerConfig:
    """One YAML file: the task's name, its own settings, and ``model``, ``optim`` and ``train`` sections."""

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: LayerConfig = field(default_factory=LayerConfig)
    optim: RateConfig = field(default_factory=RateConfig)
    train: RecipeConfig = field(default_factory=RecipeConfig)


def build_reasoner(task: Task, config: LayerConfig) -> Reasoner:
    """A freshly initialized model for a task (from torch's global generator)."""
    return Reasoner(
        columns=task.columns,
        classes=task.classes,
        positions=task.positions,
        d_model=config.d_model,
        n_head=config.n_head,
        mlp_ratio=config.mlp_ratio,
        noise_seed=config.noise_seed,
    )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as plain lists, dicts and scalars, ready for YAML or JSON."""
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


def config_from_dict(values: Any) -> ReasonerConfig:
    """A config from plain values.

    Raises:
        ConfigError: a field that is unknown or does not work, or no task.
    """
    if not isinstance(values, dict) or not isinstance(values.get("task"), str):
        raise ConfigError("a reasoner's config says which task it is for: task: chase")
    settings = values.get("settings", {})
    if not isinstance(settings, dict):
        raise ConfigError(f"settings={settings!r}: a mapping of the task's settings is expected")
    rest = from_dict(_Sections, {k: v for k, v in values.items() if k not in ("task", "settings")})
    return ReasonerConfig(values["task"], dict(settings), rest.model, rest.optim, rest.train)


@dataclass(frozen=True)
class _Sections:
    model: LayerConfig = field(default_factory=LayerConfig)
    optim: RateConfig = field(default_factory=RateConfig)
    train: RecipeConfig = field(default_factory=RecipeConfig)


def load_reasoner_config(source: str | Path) -> ReasonerConfig:
    """Read a config by path, or by the name of one that ships with haltkit (``chase``).

    Raises:
        ConfigError: an unknown file (the shipped names are listed), invalid YAML, a bad field, or bad settings.
        CodeRefused: the task is code of its own, and code from files is not allowed (:func:`haltkit.allow_code`).
    """
    path = _shipped(source) or Path(source).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise ConfigError(f"no config file {str(source)!r}; shipped with haltkit: {names}")
    try:
        config = config_from_dict(read_yaml(path, "the config", object))
    except FileError as error:
        raise ConfigError(str(error)) from None
    with reading(f"the config {str(source)!r}"):
        make_task(config.task, config.settings)
    return config


def is_reasoner_config(source: str | Path) -> bool:
    """Whether this is the config of a reasoner: one that ships, by name, or a file that says ``task:``."""
    if _shipped(source) is not None:
        return True
    path = Path(source).expanduser()
    try:
        values = read_yaml(path, "the config", object) if path.is_file() else None
    except FileError:
        return False  # whoever reads it next says what is wrong
    return isinstance(values, dict) and "task" in values


def _shipped(source: str | Path) -> Path | None:
    """The config that ships under a name; a file of that name goes before it."""
    path = Path(source).expanduser()
    shipped = SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
    return shipped if not path.is_file() and path.parent == Path() and shipped.is_file() else None
