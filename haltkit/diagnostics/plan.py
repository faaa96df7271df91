"""Everything there is to find out about a model, in order of what it costs, so that an early end keeps the most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.subject import Subject
from haltkit.diagnostics.survey import (
    DEEP_LOOPS,
    survey_attention,
    survey_geometry,
    survey_limits,
    survey_paths,
    survey_tokens,
)

__all__ = ["Case", "Plan", "run_plan"]


@dataclass(frozen=True)
class Case:
    """What ``haltkit diagnose`` is given for a model that is not ours: ``pkg.mod:function`` returns one.

    Attributes:
        subject: the model.
        inputs: windows of text, ``(N, T)`` int64, or whatever ``subject.run`` takes row by row.
        untrained: the same shape with fresh weights, the control of every finding; None where there is none.
        about: what is known of it, plain values; ``tokens_seen`` is how long it was trained.
    """

    subject: Subject
    inputs: Tensor
    untrained: Subject | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.inputs.ndim < 2 or not self.inputs.numel():
            raise DiagnosticError(
                f"inputs of shape {tuple(self.inputs.shape)} hold no windows: give (N, T), N windows of T positions, "
                "and one sequence as inputs[None]"
            )


@dataclass(frozen=True)
class Plan:
    """How much of each survey.

    Args:
        loops: depth of the geometry, the paths and the page, at least 2.
        deep_tokens, deep_loops: for the long run; 0 tokens leave it out.
        attention_windows, attention_loops, attention_tokens: for attention; 0 windows leave it out.
        policies: whose steps are shown token by token.
    """

    loops: int = 32
    deep_tokens: int = 512
    deep_loops: int = DEEP_LOOPS
    attention_windows: int = 2
    attention_loops: int = 16
    attention_tokens: int = 128
    policies: tuple[str, ...] = ("norm-rel:tau=0.01", "accel-rel:tau=0.01,denominator=state", "kl:tau=1e-3")

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
    subject: Subject, inputs: Tensor, plan: Plan, tick: Callable[[], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (part, results) as each is done: ``geometry``, ``limits``, ``attention``, ``paths``, ``tokens``.

    After a part that is marked ``partial`` there are no more.
    """
    surveys: dict[str, Callable[[Tensor], dict[str, Any]]] = {
        "geometry": lambda windows: survey_geometry(subject, windows, plan.loops, tick),
        "limits": lambda windows: survey_limits(subject, windows, plan.deep_loops, tick),
        "attention": lambda windows: survey_attention(
            subject, windows, plan.attention_loops, plan.attention_tokens, tick
        ),
    }
    for name, windows in plan.parts(inputs).items():
        found = surveys[name](windows)
        yield name, found
        if found["partial"]:
            return
    # Gradients are off in these, never across a yield: whoever asks would have them off too.
    yield "paths", survey_paths(subject, inputs[0], plan.loops)
    yield "tokens", survey_tokens(subject, inputs[0], plan.policies, plan.loops)
