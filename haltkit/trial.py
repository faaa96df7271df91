"""Which policy and threshold, on *your* model: the comparison for any model that can be attached to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment import Loop, Session, attach
from haltkit.attachment.presets import preset_for
from haltkit.comparison import Comparison, Observation, Setting
from haltkit.comparison import compare as measure
from haltkit.offline import readout_of_recordings
from haltkit.protocol import Readout
from haltkit.recorder import Recorder
from haltkit.registry import Spec, parse_spec_list
from haltkit.sweep import depth_settings, sweep_settings
from haltkit.trajectory import RegionTrajectory

__all__ = ["FIXED_DEPTHS", "Trial", "compare"]

FIXED_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Thresholds are picked to stop a typical row after these shares of the model's own depth.
TARGET_SHARES = (0.1, 0.2, 0.35, 0.5, 0.75)


@dataclass(frozen=True)
class Trial:
    """A model and what is asked of it: what ``haltkit compare --model pkg.mod:factory`` expects a factory to return.

    Args:
        model: with a loop inside.
        run: one pass of the model on one sample.
        samples: what it is run on; with one alone there is no standard error, and few verdicts.
        metric: from (output, sample) to what is lost, less is better: a number, ``(B,)`` for each sequence or
            ``(B, T)`` for each position. None: ``run`` returns that itself.
        loop: the description; None finds the preset.
        readout: from the state to logits, for policies that look at predictions; None asks the preset.
        logits: from the output to logits ``(B, T, V)``, for agreement and KL with full depth; None leaves them out.
        metric_name: heads the metric's column.
        item: what one entry of the metric is for, as in "ms a token".
        levels: three qualities to draw conclusions at, as losses above full depth in the metric's unit, the middle one
            being what a winner is chosen by; None: 0.1%, 1% and 5% of full depth's loss.
    """

    model: nn.Module
    run: Callable[[Any], Any]
    samples: Sequence[Any]
    metric: Callable[[Any, Any], Tensor | float] | None = None
    loop: Loop | None = None
    readout: Readout | None = None
    logits: Callable[[Any], Tensor] | None = None
    metric_name: str = "loss"
    item: str = "item"
    levels: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module) or not callable(self.run):
            raise ValueError("a Trial needs a model (an nn.Module) and run, a function of one sample")
        object.__setattr__(self, "samples", list(self.samples))
        if not self.samples:
            raise ValueError("a Trial needs at least one sample to run the model on")

    def described(self) -> tuple[Loop, Readout | None]:
        """The loop and the readout, the model's preset filling in what is not given.

        Raises:
            AttachError: no description and no preset.
            ValueError: a model that halts itself.
        """
        if self.loop is not None:
            return self.loop, self.readout
        loop, readout = preset_for(self.model, self.readout)
        if not isinstance(loop, Loop):
            raise ValueError(
                f"{type(self.model).__name__} halts itself: compare its checkpoint with 'haltkit compare --checkpoint'"
            )
        return loop, readout

    def losses(self, output: Any, sample: Any) -> Tensor:
        """What the metric says, ``(B,)`` or ``(B, T)``.

        Raises:
            ValueError: it is not a number or a tensor of numbers.
        """
        value = output if self.metric is None else self.metric(output, sample)
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor):
            raise ValueError(f"the metric must be a number or a tensor of them, less being better; got {type(value)}")
        if not bool(value.isfinite().all()):
            raise ValueError("the metric is not finite: nothing can be compared by it")
        return value.detach().reshape(1) if value.ndim == 0 else value.detach()


def compare(
    model: nn.Module | Trial,
    run: Callable[[Any], Any] | None = None,
    policies: str | Sequence[str | Spec] = "accel,norm,norm-rel",
    taus: str | Sequence[float] = "auto",
    metric: Callable[[Any, Any], Tensor | float] | None = None,
    *,
    samples: Sequence[Any] = (),
    repeats: int = 3,
    timed: int = 1,
    on_tick: Callable[[int, int], None] | None = None,
    **about: Any,
) -> Comparison:
    """Compare policies, thresholds and fixed depths on a model of your own::

        result = haltkit.compare(model, run=lambda batch: model(batch), samples=batches, metric=loss, body=["core"])
        for finding in haltkit.comparison.findings(result.rows): ...

    Full depth is the model as it is, not attached; fixed depths and policies halt it from outside. A policy without a
    granularity decides for the whole batch, since from outside only a halt of all rows saves time.

    Args:
        model: the model, or a :class:`Trial` that says everything about it.
        run, metric, samples: see :class:`Trial`.
        policies: specs, or one string of them; those without a tau are swept.
        taus: thresholds for the sweep: the paper's, those picked from scores observed on the first samples, both, or
            a list.
        repeats, timed, on_tick: see :func:`haltkit.comparison.compare`.
        about: ``loop``, ``body`` and the other fields of a description, ``readout``, ``logits``, names: see
            :class:`Trial`.

    Raises:
        AttachError: the loop is not described, or cannot be halted as described.
        ValueError: bad policies, thresholds or metric.
    """
    if isinstance(model, Trial):
        trial = model
    else:
        if run is None or not samples:
            raise ValueError("compare needs run= and at least one sample, or a Trial that has them")
        if "body" in about:
            fields = {name: about.pop(name) for name in list(about) if name in Loop.__dataclass_fields__}
            about["loop"] = Loop(**fields)
        trial = Trial(model, run, samples, metric, **about)
    specs = parse_spec_list(policies) if isinstance(policies, str) else [_spec(p) for p in policies]
    return _Trier(trial).compare(specs, taus, repeats=repeats, timed=timed, on_tick=on_tick)


def _spec(policy: str | Spec) -> Spec:
    (spec,) = parse_spec_list(policy) if isinstance(policy, str) else [policy]
    return spec


class _Trier:
    """One trial in progress."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.loop, self.readout = trial.described()
        self.session: Session | None = None

    @contextmanager
    def attached(self, setting: Setting) -> Iterator[None]:
        with attach(self.trial.model, setting.spec, self.loop, readout=self.readout) as self.session:
            yield
        self.session = None

    def prepare(self, setting: Setting) -> AbstractContextManager[None]:
        return nullcontext() if setting.loops == self.depth else self.attached(setting)

    def observe(self, setting: Setting, output: Any, sample: Any) -> Observation:
        losses = self.trial.losses(output, sample)
        logits = None if self.trial.logits is None else self.trial.logits(output).detach()
        if logits is not None and logits.ndim < 3:
            raise ValueError(f"logits must be (B, T, V) or more, got {tuple(logits.shape)}")
        if self.session is None:
            return Observation(logits, losses, {"loop": torch.full_like(losses, self.depths[id(sample)])}, {})
        steps, outcome = self.session.steps, self.session.outcome
        fixed = setting.loops is not None
        return Observation(logits, losses, {"loop": steps}, {} if fixed else {"loop": outcome})

    def look(self) -> RegionTrajectory:
        """Run every sample as it is to see how deep it goes, and record the loop of the first."""
        recorder = Recorder()
        self.depths: dict[int, int] = {}
        loop = self._hookable()
        for number, sample in enumerate(self.trial.samples):
            with (
                attach(self.trial.model, None, loop, observer=None if number else recorder) as session,
                torch.no_grad(),
            ):
                self.trial.run(sample)
                if session.tally.loops != 1:
                    raise ValueError(
                        f"one run went through the loop {session.tally.loops} times: compare wants one pass a sample, "
                        "so let run call the model once (of nested loops, take the outer one)"
                    )
                self.depths[id(sample)] = session.computed
        (region,) = recorder.trajectory.regions.values()
        self.depth = max(self.depths.values())
        if self.depth < 2:
            raise ValueError("the loop takes a single iteration on every sample: there is nothing to halt")
        return region

    def _hookable(self) -> Loop:
        if self.loop.scope_method != "forward":
            raise ValueError(f"compare needs a loop inside a call of forward; this one is in {self.loop.scope!r}")
        return self.loop

    def compare(
        self,
        specs: Sequence[Spec],
        taus: str | Sequence[float],
        *,
        repeats: int,
        timed: int,
        on_tick: Callable[[int, int], None] | None,
    ) -> Comparison:
        region = self.look()
        readout = self.readout and readout_of_recordings(self.readout, self.trial.model)
        settings = [Setting("fixed", f"fixed:steps={self.depth}", loops=self.depth)]
        settings += [Setting("fixed", f"fixed:steps={k}", loops=k) for k in FIXED_DEPTHS if k < self.depth]
        # From outside only a halt of all rows saves time, so a policy decides for the batch unless it says otherwise.
        swept = sweep_settings(
            [spec for spec in specs if spec.name != "fixed"], taus, lambda: [region], readout,
            default_granularity="batch", targets=sorted({max(2, math.ceil(self.depth * s)) for s in TARGET_SHARES}),
        )  # fmt: skip
        settings += [*depth_settings([*settings, *swept], {"loop": region}, readout), *swept]
        with torch.no_grad():
            for setting in (settings[0], settings[-1]):  # warm up before anything is timed
                with self.prepare(setting):
                    self.trial.run(self.trial.samples[0])
            result = measure(
                lambda setting, sample: self.trial.run(sample), self.observe, settings, self.trial.samples,
                prepare=self.prepare, repeats=repeats, timed=timed, on_tick=on_tick,
            )  # fmt: skip
        counts = result.tokens, result.sequences, result.timed_tokens
        return Comparison(result.rows, *counts, self.trial.metric_name, self.trial.item)
