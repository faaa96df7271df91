"""Judge a policy on a recording, without running the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from haltkit.loop import Keep, LoopResult, Outcome, run_loop
from haltkit.protocol import LoopStep, Readout, Verdict, each_head, judge
from haltkit.recording.trajectory import RegionTrajectory, TrajectoryError
from haltkit.specs import PolicyLike, policy_of

__all__ = ["readout_of_recordings", "replay", "scores"]


@dataclass(frozen=True)
class _Tape:
    states: Tensor

    pure: ClassVar[bool] = True

    def step(self, x: Tensor, k: int, active: Tensor) -> Tensor:
        return self.states[k]


def _states(trajectory: RegionTrajectory) -> Tensor:
    states = trajectory._consecutive_states()
    if trajectory.outcome is None:
        return states
    broken = trajectory.outcome == Outcome.NONFINITE
    early = (trajectory.steps < trajectory.max_steps) & ~broken & (trajectory.outcome != Outcome.ABSENT)
    if bool(early.any()):
        raise TrajectoryError(
            "some rows of this recording halted early, so their later states are unknown: record at a fixed depth"
        )
    if bool(broken.any()):  # such a row is recorded at its last finite state, and is to stop being finite again
        k = torch.arange(len(states), device=states.device).view(-1, *[1] * broken.ndim)
        states = states.masked_fill((broken & (k >= trajectory.steps)).unsqueeze(-1), torch.nan)
    return states


def _fitting(readout: Readout, width: int) -> Readout:
    """The readout; where it cannot take the states, the recording is of another model, or the readout elsewhere."""

    def fitting(head: Readout) -> Readout:
        def read(x: Tensor) -> Tensor:
            try:
                return head(x)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise TrajectoryError(
                    f"the recording's states, of width {width}, do not fit the readout: it is of another model, or on "
                    "another device, where haltkit.readout_of_recordings(readout, model) would carry them "
                    f"({' '.join(str(error).split())})"
                ) from error

        return read

    return each_head(readout, fitting)


def readout_of_recordings(readout: Readout, model: nn.Module) -> Readout:
    """A model's readout for recorded states, which lie on the CPU wherever the model is; so do its logits."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return each_head(readout, lambda head: lambda x: head(x.to(device)).to(x.device))


def replay(
    policy: PolicyLike, trajectory: RegionTrajectory, *, readout: Readout | None = None, keep: Keep = "current"
) -> LoopResult:
    """Run the loop with recorded states in place of the body.

    Exact where the recorded states are those that the loop itself would have seen: for rows that do not look at each
    other, and for a policy that halts all rows which do at the same step. In a transformer halted token by token it
    is an approximation, and a flattering one: in the recording, tokens went on reading the later states of tokens
    that the policy would have stopped. Only the recorded region is replayed; what it hands on would change what
    later regions see.

    Args:
        policy: judged as in :func:`haltkit.run_loop`.
        trajectory: every state of a loop run at a fixed depth, which becomes the budget.
        readout: for policies that look at logits; of a model that is not on the CPU, as recordings are, give
            :func:`readout_of_recordings`.
        keep: as in :func:`haltkit.run_loop`.

    Raises:
        TrajectoryError: the recording has no states, skips steps, was itself cut short by a policy, or is of another
            model than the readout.
    """
    states = _states(trajectory)
    if readout is not None:
        readout = _fitting(readout, states.shape[-1])
    rows = None if trajectory.outcome is None else trajectory.present
    return run_loop(
        _Tape(states),
        states[0],
        policy,
        max_steps=len(states) - 1,
        readout=readout,
        rows=rows,
        keep=keep,
        name=trajectory.name,
    )


def scores(policy: PolicyLike, trajectory: RegionTrajectory, *, readout: Readout | None = None) -> Tensor:
    """What a policy measures at each step of a recording, ``(K, ...)``, were nothing ever halted.

    ``+inf`` after a step at which no row was finite any more.

    Raises:
        TrajectoryError: see :func:`replay`.
    """
    # One tensor for all steps: small ones, one a step, would lie between the large temporaries of a policy that looks
    # at logits and keep the C library from using their place again.
    recorded: Tensor | None = None
    last, built = len(trajectory._consecutive_states()) - 1, policy_of(policy)

    class Listening:
        def init(self, x0: Tensor) -> Any:
            return built.init(x0)

        def update(self, state: Any, step: LoopStep) -> tuple[Any, Verdict]:
            state, verdict = judge(built, state, step)
            nonlocal recorded
            if recorded is None:
                recorded = verdict.score.new_full((last, *verdict.score.shape), torch.inf)
            recorded[step.k - 1] = verdict.score
            return state, Verdict(verdict.score, torch.zeros_like(verdict.halt))

    replay(Listening(), trajectory, readout=readout)
    assert recorded is not None
    return recorded
