"""What deciding costs: one update of each policy, and the choice of policies that a benchmark runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from haltkit.comparison.settings import Candidate
from haltkit.comparison.speed import at_target
from haltkit.models.gpt.model import Block
from haltkit.protocol import HaltingPolicy, Heads, LoopStep, Readout, judge
from haltkit.registry import records
from haltkit.specs import Policies
from haltkit.specs import policy as build_policy
from haltkit.subject import Subject
from haltkit.timing import clock, in_turns, milliseconds, ratio

__all__ = ["choose_policies", "policy_cost"]

TARGET_STEP = 6  # where thresholds are put when none is given: deep enough for depths to differ


def choose_policies(subject: Subject, wanted: Sequence[Candidate]) -> dict[str, Policies]:
    """Policies ready to run, by name; one without a tau gets that at which a typical token takes ``TARGET_STEP`` steps.

    Raises:
        ValueError: a policy that does not decide token by token, or one whose scores give no threshold.
    """
    chosen: dict[str, Policies] = {}
    for setting in at_target(subject, subject.look(), wanted, TARGET_STEP):
        if not setting.causal:
            raise ValueError(f"{setting.label!r} does not decide token by token, which is what is measured here")
        chosen[setting.title] = setting.policies
    return chosen


def _update(policy: HaltingPolicy[Any], state: Any, x: Tensor, x_prev: Tensor, active: Tensor, head: Readout) -> None:
    judge(policy, state, LoopStep(2, x, x_prev, active, head))


def _heads(width: int, vocabulary: int, device: torch.device | str, dtype: torch.dtype) -> Heads:
    """A readout and an exit head, both linear."""
    readout = torch.nn.Linear(width, vocabulary, bias=False).to(device, dtype)
    leave = torch.nn.Linear(width, 1).to(device, dtype)
    return Heads(readout, lambda x: leave(x).squeeze(-1))


def _registered() -> list[tuple[str, HaltingPolicy[Any]]]:
    """Every registered policy that can be timed."""
    timed = [record for record in records() if record.cost is not None]
    return [(record.name, build_policy(f"{record.name}:{record.cost}")) for record in timed]


@torch.inference_mode()
def policy_cost(
    widths: Sequence[int],
    rows: Sequence[int],
    vocabulary: int,
    *,
    seconds: float,
    dtypes: Sequence[torch.dtype],
    device: torch.device | str = "cpu",
    also: Callable[[int], Mapping[str, HaltingPolicy[Any]]] = lambda width: {},
) -> list[dict[str, Any]]:
    """One update of each policy over one step of a body, a transformer layer, by width, rows and dtype.

    Args:
        widths, rows: of the states; rows in sequences of 256.
        vocabulary: of the readout that some policies pay for.
        seconds: to spend on each combination, about; body and updates take turns, 3 to 50 times.
        dtypes: of body and states.
        device: where all of it runs.
        also: from a width to policies beside the registered ones, by the name of their figure: those with weights.
    """
    results = []
    for dtype in dtypes:
        for width in widths:
            torch.manual_seed(0)
            body = Block(width, max(1, width // 64), 4, "branch").to(device, dtype)
            head = _heads(width, vocabulary, device, dtype)
            for count in rows:
                # Sequences of 256: attention over thousands of keys would flatter every policy.
                shape = (max(1, count // 256), min(count, 256), width)
                x_prev = torch.randn(shape).to(device, dtype)
                x = body(x_prev)
                active = torch.ones(shape[:2], dtype=torch.bool, device=device)
                runs: dict[str, Callable[[], object]] = {"body": partial(body, x_prev)}
                for name, policy in (*_registered(), *also(width).items()):
                    # A state from the middle of a loop.
                    state, _ = judge(policy, policy.init(x_prev), LoopStep(1, x_prev, x, active, head))
                    runs[name] = partial(_update, policy, state, x, x_prev, active, head)
                # Right after the body, as in a loop: what the cache has of the states is what the body left there.
                once, _ = clock(partial(in_turns, runs, 1, runs["body"]))  # warms up, too
                times = in_turns(runs, max(3, min(50, int(seconds / once))), runs["body"])
                results.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "width": width,
                        "rows": count,
                        "body_ms": milliseconds(times["body"]),
                        "relative": {name: ratio(times, name, "body") for name in runs if name != "body"},
                    }
                )
    return results
