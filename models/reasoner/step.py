"""One optimizer step of a reasoner: a curriculum over levels, and the loss at a few random step counts.

Every draw is keyed by the run's seed and the optimizer's step, so a run that is resumed continues bit for bit as if it
had never been interrupted (on the same machine).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haltkit.files import read_json
from haltkit.folders import atomic_folder
from haltkit.models.config import from_dict
from haltkit.models.gpt.draws import STATE_STD, truncated_normal_
from haltkit.models.reasoner.config import RateConfig, ReasonerConfig, RecipeConfig, build_reasoner
from haltkit.models.reasoner.model import Reasoner
from haltkit.models.reasoner.task import Batch, Level, make_task
from haltkit.models.training.precision import Choice, choose_precision
from haltkit.models.training.runs import RunError
from haltkit.models.weights import read_tensors, save_tensors

__all__ = ["CHECKPOINT", "Diverged", "ReasonerRun", "learning_rate", "settle_precision", "take_step"]

CHECKPOINT = "checkpoint"
STATE, PROGRESS = "state.safetensors", "progress.json"
_DATA, _STEPS, _NOISE, _EXAM = 1, 2, 3, 4  # first entry of every key: keeps the streams of different purposes apart


class Diverged(RuntimeError):
    """The loss is not finite any more; the run's last checkpoint is from before."""


def learning_rate(step: int, max_steps: int, rate: RateConfig) -> float:
    """The rate for optimizer step ``step``, from 0: up, level, and down over the last ``decay_share`` of the run."""
    decay = rate.decay_share * max_steps
    falling = 1.0 if decay == 0 else min(1.0, (max_steps - step) / decay)
    return rate.lr * min(1.0, (step + 1) / max(1, rate.warmup_steps)) * max(rate.min_lr_ratio, falling)


@dataclass
class _Moving:
    """What moves in a run beside tensors."""

    step: int = 0
    level: int = 0
    level_since: int = 0  # optimizer step that the level began at
    right: float = 0.0  # share of the level's deepest rows, when last looked at
    seconds: float = 0.0
    rows: int = 0  # rows of training data so far
    precision: Literal["", "float32", "bf16"] = ""  # empty in checkpoints of before it was recorded


class ReasonerRun:
    """A run in memory: the task, the model, its average, the optimizer, and how far it has come."""

    def __init__(self, config: ReasonerConfig) -> None:
        self.bf16 = False
        self.config, self.task = config, make_task(config.task, config.settings)
        with torch.random.fork_rng():
            torch.manual_seed(config.train.seed)
            self.model = build_reasoner(self.task, config.model)
            self.average = build_reasoner(self.task, config.model)
        self.average.load_state_dict(self.model.state_dict())
        self.parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.optim.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas)
        self.moving = _Moving()

    def tensors(self) -> dict[str, Tensor]:
        """All that moves, by name."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        named |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for i, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{i}.{key}"] = value
        return named

    def save(self, folder: Path) -> None:
        with atomic_folder(folder / CHECKPOINT) as partial:
            save_tensors(self.tensors(), partial / STATE)
            (partial / PROGRESS).write_text(json.dumps(asdict(self.moving)) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        tensors = read_tensors(folder / CHECKPOINT / STATE)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.model.load_state_dict(part("model."))
            self.average.load_state_dict(part("average."))
            self.moving = from_dict(_Moving, read_json(folder / CHECKPOINT / PROGRESS, "the run's progress", dict))
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the checkpoint of {str(folder)!r} does not fit its config: {error}") from None
        levels = len(self.task.levels)
        if not 0 <= self.moving.level < levels or self.moving.step < 0:
            raise RunError(
                f"the checkpoint of {str(folder)!r} does not fit its config: level {self.moving.level} of {levels}, "
                f"step {self.moving.step}"
            )
        for i, parameter in enumerate(self.parameters):
            self.optimizer.state[parameter] = part(f"optimizer.{i}.")


def _rng(seed: int, purpose: int, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, step])


def _draw_steps(recipe: RecipeConfig, level: Level, step: int) -> tuple[int, int, set[int]]:
    """Steps of the pass, the first one that gradients reach, and the steps that the loss is taken at."""
    rng = _rng(recipe.seed, _STEPS, step)
    if recipe.supervision == "last_step":
        last = level.steps[1]
    else:
        last = int(rng.integers(level.steps[0], level.steps[1] + 1))
    first = 1 if recipe.backprop_depth == 0 else max(1, last - recipe.backprop_depth + 1)
    if recipe.supervision == "last_step":
        return last, first, {last}
    return last, first, {last, *rng.integers(first, last + 1, recipe.losses - 1).tolist()}


def _loss(model: Reasoner, x: Tensor, batch: Batch, k: int) -> Tensor:
    """Mean cross-entropy at step ``k`` of rows that need fewer steps."""
    logits = model.readout(x).float()
    counted = batch.asked & (batch.needed < k)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.labels)
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def _pass(run: ReasonerRun, batch: Batch, level: Level) -> Tensor:
    """The loss of one pass."""
    recipe, model = run.config.train, run.model
    last, first, at = _draw_steps(recipe, level, run.moving.step)
    seed = int(_rng(recipe.seed, _NOISE, run.moving.step).integers(2**63))
    generator = torch.Generator().manual_seed(seed)
    e = model.embed(batch.inputs)
    x = truncated_normal_(torch.empty_like(e), STATE_STD, generator)
    loss = torch.zeros(())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.bf16):
        for k in range(1, last + 1):
            with torch.set_grad_enabled(k >= first):
                x = model.step(x, e)
                if recipe.state_noise:
                    x = x + recipe.state_noise * torch.randn(x.shape, generator=generator)
            if k in at:
                loss = loss + _loss(model, x, batch, k) / len(at)
    return loss


@torch.no_grad()
def _examine(run: ReasonerRun) -> None:
    """Look whether the level is mastered, and if so go on to the next.

    The weights in training are asked, not the averaged ones: those pass levels that training has not got used to, and
    going on at once made it collapse.
    """
    moving, levels, recipe = run.moving, run.task.levels, run.config.train
    level = levels[moving.level]
    batch = run.task.sample(_rng(recipe.seed, _EXAM, moving.step), moving.level, level.batch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=run.bf16):
        logits = run.model(batch.inputs, level.steps[1])
    known = levels[moving.level - 1].depth if moving.level else -1
    deepest = batch.asked & (batch.needed > (known if known < level.depth else -1))
    moving.right = float((logits.argmax(-1) == batch.labels)[deepest].double().mean()) if bool(deepest.any()) else 0.0
    long_enough = moving.step - moving.level_since >= recipe.level_steps
    if long_enough and moving.right >= recipe.mastered and moving.level + 1 < len(levels):
        moving.level, moving.level_since = moving.level + 1, moving.step


def take_step(run: ReasonerRun) -> dict[str, Any]:
    """One optimizer step. Returns what there is to log."""
    config, moving, levels = run.config, run.moving, run.task.levels
    level = levels[moving.level]
    batch = run.task.sample(_rng(config.train.seed, _DATA, moving.step), moving.level, level.batch)
    rate = learning_rate(moving.step, config.train.max_steps, config.optim)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss = _pass(run, batch, level)
    if not bool(loss.isfinite()):
        raise Diverged(f"the loss of step {moving.step} is {float(loss)}: lower optim.lr and resume")
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(run.parameters, config.optim.grad_clip)
    run.optimizer.step()
    keep = min(config.optim.ema, (1 + moving.step) / (10 + moving.step))
    with torch.no_grad():
        for average, parameter in zip(run.average.parameters(), run.parameters, strict=True):
            average.lerp_(parameter, 1 - keep)
    logged = {
        "step": moving.step,
        "loss": round(float(loss.detach()), 5),
        "grad_norm": round(float(norm), 4),
        "lr": rate,
        "level": moving.level,
        "depth": level.depth,
        "deepest_right": round(moving.right, 4),
    }
    moving.step += 1
    moving.rows += int(batch.asked.sum())
    if moving.step % config.train.examine_every == 0:
        _examine(run)
    return logged


def settle_precision(run: ReasonerRun) -> Choice:
    """What the run computes in: as it began, or as the config and the processor say."""
    asked, recorded = run.config.train.precision, run.moving.precision
    if asked == "auto" and recorded:
        choice = Choice(recorded, "as the run began")
    else:
        choice = choose_precision(asked, torch.device("cpu"))
    run.moving.precision, run.bf16 = choice.precision, choice.precision == "bf16"
    return choice
