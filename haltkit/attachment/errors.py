"""What attaching refuses, each with its own type: a wrong answer would otherwise go unnoticed."""

from __future__ import annotations

__all__ = [
    "AlreadyAttached",
    "AttachError",
    "BatchNotFound",
    "BodyOutsideScope",
    "CannotStep",
    "DetachOrder",
    "GlueDrift",
    "GradientLost",
    "KVDepthMismatch",
    "MutatedOutput",
    "NeverEnds",
    "ReentrantCheckpoint",
    "RowsMeet",
    "ScriptModuleUnsupported",
    "StateNotCarried",
    "StateShapeChanged",
    "TapeMismatch",
    "UnknownModule",
    "VaryingInput",
]


class AttachError(RuntimeError):
    """The loop cannot be halted as described; the message says what to change."""


class NeverEnds(AttachError):
    """The model's loop goes on for ever once its state stands still."""


class UnknownModule(AttachError):
    """A path in the description names no module (or no method) of the model."""


class CannotStep(AttachError):
    """The loop can be halted, but it does not go on from a state that is put into it."""


class AlreadyAttached(AttachError):
    """Another session already halts the loop with this state module."""


class DetachOrder(AttachError):
    """A session was detached while one that was attached later still wraps the same module."""


class BodyOutsideScope(AttachError):
    """The body ran, but never inside a call of the scope: nothing was observed."""


class BatchNotFound(AttachError):
    """The batch is not where it must be: a module is given no such dimension, or loops disagree about its size."""


class RowsMeet(AttachError):
    """Rows cannot be retired from a module: it computes the rows of a batch from each other."""


class TapeMismatch(AttachError):
    """After the halt the model called other body modules than in its last complete iteration."""


class GlueDrift(AttachError):
    """After the halt the body's input went on changing: state is carried outside the described modules."""


class MutatedOutput(AttachError):
    """The model changed a recorded output in place, so it cannot be given again."""


class StateNotCarried(AttachError):
    """What was named as the state is not read by the next iteration: halting a row would not freeze it."""


class StateShapeChanged(AttachError):
    """The state's shape changed inside one loop."""


class VaryingInput(AttachError):
    """Each iteration consumes new input: a recurrence over a sequence, not over depth."""


class KVDepthMismatch(AttachError):
    """A KV cache was filled to another depth by an earlier call: later tokens would miss keys and values."""


class GradientLost(AttachError):
    """An output recorded without gradients would be given again where gradients are wanted."""


class ReentrantCheckpoint(AttachError):
    """Reentrant activation checkpointing recomputes the body outside the loop: its gradients would be wrong."""


class ScriptModuleUnsupported(AttachError):
    """A scripted module's forward cannot be overridden."""
