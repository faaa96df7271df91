"""The bundled LoopedGPT halts its own regions, token by token in the canonical semantics."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from haltkit.attachment.native import Native
from haltkit.loop import LoopObserver
from haltkit.protocol import Readout
from haltkit.registry import policy_for_regions

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Native, Readout | None]:
    """Every region at once; ``loops`` of the model's call is the budget of each."""
    gpt: Any = model

    def budgets(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
        loops = args[1] if len(args) > 1 else kwargs.get("loops")
        return gpt.loop_counts(loops)  # type: ignore[no-any-return]

    def run(
        policy: Any, observer: LoopObserver | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        tokens = args[0] if args else kwargs["tokens"]
        out = gpt.forward_adaptive(tokens, policy, max_loops=budgets(args, kwargs), observer=observer)
        return out.logits, out.steps, out.outcome

    def check(policy: Any) -> None:
        policy_for_regions(policy, list(gpt.regions))

    return Native(run, check, budgets), gpt.readout
