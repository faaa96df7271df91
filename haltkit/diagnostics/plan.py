"""Everything there is to find out about a model, in order of what it costs, so that an early end keeps the most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.results import Attention, Control, Geometry, Limits, Snapshot
from haltkit.diagnostics.survey import (
    DEEP_LOOPS,
    survey_attention,
    survey_geometry,
    survey_limits,
    survey_paths,
    survey_tokens,
)
from haltkit.diagnostics.unfolding import Unfolding
from haltkit.specs import Policies
from haltkit.subject import Subject

__all__ = ["Case", "Plan", "check_subject", "run_plan"]


@dataclass(frozen=True)
class Case:
    """A subject with what a diagnosis needs beside it: ``pkg.mod:function`` on the command line may return one.

    Attributes:
        subject: the model.
        inputs: windows of text, ``(N, T)`` int64, or whatever the subject takes row by row.
        untrained: the same shape with fresh weights, the control of every finding; None where there is none.
        about: what is known of it, plain values; ``tokens_seen`` is how long it was trained.
        snapshots: the model across its training, measured already or by a call.
        control: the attention of a model without loops, measured already or by a call.
        unfolding: makes the answers of one problem, step by step; None where there is no problem to show.
    """

    subject: Subject
    inputs: Tensor
    untrained: Subject | None = None
    about: dict[str, Any] = field(default_factory=dict)
    snapshots: Iterable[Snapshot | Callable[[], Snapshot]] = ()
    control: Control | Callable[[], Control] | None = None
    unfolding: Callable[[], Unfolding] | None = None

    def __post_init__(self) -> None:
        check_subject(self.subject, self.inputs)

    @classmethod
    def of(cls, subject: Subject) -> Case:
        """A subject on its own samples.

        Raises:
            DiagnosticError: samples whose inputs are no tensors of one length.
        """
        inputs = [subject.inputs(sample) for sample in subject.samples]
        if not inputs or not all(isinstance(one, Tensor) and one.ndim > 1 for one in inputs):
            raise DiagnosticError(
                f"{subject.name} has no samples whose inputs are tensors (B, T): give it some, or return a "
                "haltkit.diagnostics.Case with the windows to look at"
            )
        if len({one.shape[1:] for one in inputs}) > 1:
            raise DiagnosticError(
                f"the samples of {subject.name} have different lengths: return a haltkit.diagnostics.Case with windows "
                "of one length"
            )
        return cls(subject, torch.cat(inputs), about=dict(subject.about))


def check_subject(subject: Subject, inputs: Tensor) -> None:
    """Refuse a model without loops, and what is not ``(N, T)`` windows, or whatever the model takes, row by row.

    Raises:
        DiagnosticError: no looped region, or inputs of fewer than two dimensions or with nothing in them.
    """
    if not subject.regions:
        raise DiagnosticError(f"{subject.name} has no looped region: there is no loop to look at")
    _check_windows(inputs)


def _check_windows(inputs: Tensor) -> None:
    """Refuse what is not ``(N, T)`` windows, or whatever the model takes, row by row.

    Raises:
        DiagnosticError: fewer than two dimensions, or nothing in them.
    """
    if inputs.ndim < 2 or not inputs.numel():
        raise DiagnosticError(
            f"inputs of shape {tuple(inputs.shape)} are no windows: give (N, T), N windows of T positions, and one "
            "sequence as inputs[None]"
        )


@dataclass(frozen=True)
class Plan:
    """How much of each survey.

    Args:
        loops: depth of the geometry, the paths and the page, at least 2.
        deep_tokens, deep_loops: for the long run; 0 tokens: no long run.
        attention_windows, attention_loops, attention_tokens: for attention; 0 windows: no attention.
        policies: whose steps are shown token by token: specs, or policies by the names that they are shown by.
    """

    loops: int = 32
    deep_tokens: int = 512
    deep_loops: int = DEEP_LOOPS
    attention_windows: int = 2
    attention_loops: int = 16
    attention_tokens: int = 128
    policies: Sequence[str] | Mapping[str, Policies] = (
        "norm-rel:tau=0.01",
        "accel-rel:tau=0.01,denominator=state",
        "kl:tau=1e-3",
    )

    def __post_init__(self) -> None:
        if self.loops < 2:
            raise DiagnosticError(f"{self.loops} loops: a loop of one step has no angles; at least 2 are needed")
        if self.deep_tokens and self.deep_loops < 16:
            raise DiagnosticError(f"{self.deep_loops} loops tell no limit: at least 16 are needed, better 128")

    def parts(self, inputs: Tensor) -> dict[str, Tensor]:
        """The windows each survey runs on."""
        length = inputs.shape[1]
        found = {"geometry": inputs}
        if self.deep_tokens:
            found["limits"] = inputs[: max(1, self.deep_tokens // length)]
        if self.attention_windows:
            found["attention"] = inputs[: self.attention_windows]
        return found

    def ticks(self, inputs: Tensor) -> int:
        """How often :func:`run_plan` ticks: once a window."""
        return sum(len(windows) for windows in self.parts(inputs).values())


def run_plan(
    subject: Subject, inputs: Tensor, plan: Plan, tick: Callable[[], None] | None = None, *, tokens: bool = True
) -> Iterator[tuple[str, Any]]:
    """Yield (part, result) as each is done: ``geometry``, ``limits``, ``attention``, ``paths``, ``tokens``.

    After a part that is ``partial`` there are no more.

    Args:
        tokens: whether to look at policies token by token.
    """
    surveys: dict[str, Callable[[Tensor], Geometry | Limits | Attention]] = {
        "geometry": lambda windows: survey_geometry(subject, windows, plan.loops, tick),
        "limits": lambda windows: survey_limits(subject, windows, plan.deep_loops, tick),
        "attention": lambda windows: survey_attention(
            subject, windows, plan.attention_loops, plan.attention_tokens, tick
        ),
    }
    for name, windows in plan.parts(inputs).items():
        found = surveys[name](windows)
        yield name, found
        if found.partial:
            return
    # Gradients are off in these, never across a yield: whoever asks would have them off too.
    yield "paths", survey_paths(subject, inputs[0], plan.loops)
    if tokens:
        yield "tokens", survey_tokens(subject, inputs[0], plan.policies, plan.loops)
