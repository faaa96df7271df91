"""The bundled model in a comparison: its settings, its windows, and how one pass is run and observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import haltkit
from haltkit.comparison import Comparison, Observation, Setting, compare
from haltkit.loop import Execution
from haltkit.models.checkpoint import BUNDLED, Checkpoint
from haltkit.models.data import DataError, read_text, windows
from haltkit.models.generation import Decoder
from haltkit.models.gpt import AdaptiveOutput, LoopedGPT
from haltkit.offline import readout_of_recordings
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, granularity_of
from haltkit.registry import Spec
from haltkit.sweep import depth_settings, sweep_settings
from haltkit.trajectory import RegionTrajectory

__all__ = ["FIXED_DEPTHS", "SAMPLE", "Mode", "check_mode", "choose_settings", "compare_checkpoint", "text_windows"]

Mode = Literal["forward", "decode"]
FIXED_DEPTHS = (1, 2, 4, 8, 12, 16, 32)
SAMPLE = BUNDLED / "sample.txt"


def text_windows(checkpoint: Checkpoint, path: Path, tokens: int) -> Tensor:
    """About ``tokens`` tokens of a text file in windows of the model's context, spread evenly over the file.

    They are where the model is.

    Returns:
        ``(N, T + 1)``.

    Raises:
        DataError: no such file, not UTF-8 text, or shorter than one window.
    """
    text = read_text(path)
    length = checkpoint.config.block_size
    try:
        found = windows(checkpoint.tokenizer.encode_ordinary(text), length)
    except DataError as error:
        raise DataError(f"{str(path)!r} is too short: {error}") from None
    wanted = min(len(found), max(1, tokens // length))
    chosen = found[np.linspace(0, len(found) - 1, wanted).round().astype(int)]
    return chosen.to(checkpoint.model.wte.weight.device)


def choose_settings(
    checkpoint: Checkpoint,
    specs: Sequence[Spec],
    taus: str | Sequence[float],
    max_loops: int,
    sample: Tensor,
    granularity: str | None = None,
) -> list[Setting]:
    """Full depth, the other fixed depths and those that the policies suggest, and each policy at its thresholds.

    Args:
        specs: those with a ``tau`` stand for one setting, the others for a sweep.
        taus: ``paper``, ``auto`` (picked from the scores seen on ``sample``), ``both``, or the thresholds.
        sample: windows ``(N, T + 1)`` to observe scores on.
        granularity: for every policy that does not say its own; one that says another is refused. None: token,
            where a policy says nothing.

    Raises:
        ValueError: a bad spec, a depth beyond ``max_loops``, or no threshold for a policy.
    """
    built_fixed = [spec.build() for spec in specs if spec.name == "fixed"]
    asked = {policy.steps for policy in built_fixed if isinstance(policy, Fixed)}
    if max(asked, default=0) > max_loops:
        raise ValueError(f"fixed:steps={max(asked)} is deeper than full depth, --max-loops {max_loops}")
    depths = sorted(({d for d in FIXED_DEPTHS if d < max_loops} | asked) - {max_loops})
    settings = [Setting("fixed", f"fixed:steps={loops}", loops=loops) for loops in (max_loops, *depths)]
    model = checkpoint.model

    @cache
    def recorded() -> list[Mapping[str, RegionTrajectory]]:
        """The loops of each window of the sample at full depth, by region: run once, and only if somebody asks."""
        loops: list[Mapping[str, RegionTrajectory]] = []
        for window in torch.split(sample, 1):  # a policy that looks at logits takes memory by the window
            with torch.no_grad(), haltkit.record(model) as recording:
                model(window[:, :-1], max_loops)
            loops.append(recording.trajectory.regions)
        return loops

    readout = readout_of_recordings(model.readout, model)
    swept = sweep_settings(
        [spec for spec in specs if spec.name != "fixed"], taus,
        lambda: [region for loops in recorded() for region in loops.values()], readout, granularity=granularity,
    )  # fmt: skip
    suggested = depth_settings([*settings, *swept], recorded()[0], readout) if swept else []
    return [*settings, *suggested, *swept]


@dataclass(frozen=True)
class _Runner:
    model: LoopedGPT
    max_loops: int
    policies: Mapping[str, HaltingPolicy[Any]]  # by spec, built before anything is timed
    mode: Mode
    execution: Execution

    @torch.no_grad()
    def run(self, setting: Setting, window: Tensor) -> Tensor | AdaptiveOutput:
        inputs = window[:, :-1]
        if self.mode == "decode":
            return self.decode(setting, inputs)
        if setting.loops is not None:  # a fixed depth measures nothing and pays for nothing
            logits: Tensor = self.model(inputs, setting.loops)
            return logits
        return self.model.forward_adaptive(
            inputs, self.policies[setting.spec], max_loops=self.max_loops, execution=self.execution
        )

    def decode(self, setting: Setting, inputs: Tensor) -> Tensor | AdaptiveOutput:
        """Token by token with the exact cache, the text being given; a fixed depth with nothing but its loop."""
        decoder = Decoder(self.model, self.policies.get(setting.spec, setting.spec), max_loops=self.max_loops)
        first = decoder.prefill(inputs[:, :1])
        if setting.loops is not None:
            loops = self.model.loop_counts(setting.loops)
            rest = [decoder.step_fixed(inputs[:, i], loops) for i in range(1, inputs.shape[1])]
            return torch.stack([first.logits, *rest], 1)
        seen = [first, *(decoder.step(inputs[:, i]) for i in range(1, inputs.shape[1]))]
        return AdaptiveOutput(
            torch.stack([one.logits for one in seen], 1),
            {name: torch.stack([one.steps[name] for one in seen], 1) for name in self.model.regions},
            {name: torch.stack([one.outcome[name] for one in seen], 1) for name in self.model.regions},
        )

    def observe(self, setting: Setting, output: Tensor | AdaptiveOutput, window: Tensor) -> Observation:
        logits = output.logits if isinstance(output, AdaptiveOutput) else output
        losses = F.cross_entropy(logits.float().transpose(1, 2), window[:, 1:], reduction="none")
        if isinstance(output, AdaptiveOutput):
            return Observation(logits, losses, output.steps, output.outcome)
        steps = {name: torch.full_like(losses, depth) for name, depth in self.model.loop_counts(setting.loops).items()}
        return Observation(logits, losses, steps, {})


def check_mode(mode: str, execution: str) -> None:
    """Refuse an unknown mode or execution, and a pair that does not go together.

    Raises:
        ValueError: which, and what does.
    """
    if mode not in ("forward", "decode"):
        raise ValueError(f"mode {mode!r}: allowed are forward, decode")
    if execution not in ("masked", "compact"):
        raise ValueError(f"execution {execution!r}: allowed are masked, compact")
    if mode == "decode" and execution == "masked":
        raise ValueError("mode decode computes a token at a time, so nothing is masked: use compact, or mode forward")


def compare_checkpoint(
    checkpoint: Checkpoint,
    settings: Sequence[Setting],
    sequences: Tensor,
    *,
    batch: int = 1,
    max_loops: int = 32,
    repeats: int = 3,
    timed: int = 1,
    mode: Mode = "forward",
    execution: Execution = "compact",
    on_tick: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare on windows ``(N, T + 1)``, ``batch`` of them at a time.

    Args:
        mode: ``forward`` is one teacher-forced pass over a window; ``decode`` takes it token by token with a cache,
            the prompt being its first token.
        execution: of a forward pass under a policy.

    Raises:
        ValueError: a batch that does not fit, an unknown mode or execution, or ones that cannot go together.
    """
    check_mode(mode, execution)
    if batch < 1 or len(sequences) < batch:
        raise ValueError(f"batch={batch} does not fit {len(sequences)} windows of text: lower it or give more text")
    batches = [part for part in torch.split(sequences, batch) if len(part) == batch]
    policies = {setting.spec: haltkit.policy(setting.spec) for setting in settings if setting.loops is None}
    for spec, policy in policies.items():
        if mode == "decode" and (granularity := granularity_of(policy)) != "token":
            raise ValueError(
                f"{spec!r} decides by {granularity}, and a {granularity} is not there yet while it is decoded: use "
                "granularity=token, or mode forward"
            )
    runner = _Runner(checkpoint.model, max_loops, policies, mode, execution)
    with torch.inference_mode():
        runner.run(settings[0], batches[0])  # warm up before anything is timed
    return compare(
        runner.run,
        runner.observe,
        settings,
        batches,
        timed=timed,
        repeats=repeats,
        on_tick=on_tick,
    )
