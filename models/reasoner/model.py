"""The reasoner: an embedding that sums columns, one bidirectional looped layer, a linear head.

Shapes: ``B`` sequences, ``T`` rows, ``C`` columns of the input, ``D`` width, ``V`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.native import HaltedCall
from haltkit.bodies import CompactBody, LoopBody
from haltkit.loop import Execution, Keep, LoopObserver, run_loop
from haltkit.models.gpt.draws import EvaluationNoise, truncated_normal_
from haltkit.models.gpt.layers import Block, Noise, Region, RegionBody
from haltkit.models.gpt.memory import CompactRegionLoop, RegionLoop
from haltkit.models.gpt.model import AdaptiveOutput
from haltkit.models.reasoner.memory import AllRows, BidirectionalMemory, CompactBidirectionalMemory, CompactRows
from haltkit.protocol import HaltingPolicy
from haltkit.specs import policy as parse_policy

__all__ = ["LOOP", "Reasoner"]

LOOP = "loop"  # what the one region is called


class Reasoner(nn.Module):
    """One looped layer over a set of rows, each row a tuple of ``C`` small integers.

    A row's input is the sum of one embedding a column, where the value 0 adds nothing: one embedding that most rows
    shared would move all of them at every optimizer step, and training shook. The input is injected at every step. The
    state starts as noise and is normed after each step to ``sqrt(D)``. All rows of a sequence see each other, and
    nothing but their columns tells them apart.

    Args:
        columns: how many values each column has, the 0 of nothing included, ``C`` numbers.
        classes: ``V``, what the head tells apart.
        positions: rows in the longest sequence; the table of initial noise has as many.
        d_model, n_head, mlp_ratio: the layer's shape.
        noise_seed: of the initial state at evaluation.
    """

    def __init__(
        self,
        *,
        columns: Sequence[int],
        classes: int,
        positions: int,
        d_model: int = 64,
        n_head: int = 4,
        mlp_ratio: int = 4,
        noise_seed: int = 0,
    ) -> None:
        super().__init__()
        self.columns, self.classes, self.d_model, self.n_head = tuple(columns), classes, d_model, n_head
        self.noise = EvaluationNoise(noise_seed, positions, d_model)
        self.tables = nn.ModuleList(nn.Embedding(count, d_model, padding_idx=0) for count in self.columns)
        body = RegionBody([Block(d_model, n_head, mlp_ratio, "branch")], d_model, inject=True, state_norm=True)
        self.region = Region(
            LOOP, body, d_model, injection="every_step", initial_state="noise", noise_every_step=False, exit_norm=False
        )
        self.head = nn.Linear(d_model, classes, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """Truncated normal of std ``sqrt(2/(5D))``, gains 1, the injection ``[0.5 W ; 0.5 W + I]`` on [state ; input].

        The branches' gains are 1, not small as in the GPT: a layer that is all there is must move its state.
        """
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                truncated_normal_(parameter, math.sqrt(2 / (5 * self.d_model)))
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.zeros_(table.weight[0])
        assert self.region.body.adapter is not None
        with torch.no_grad():
            weight = self.region.body.adapter.weight.mul_(0.5)  # (D, 2D)
            weight[:, self.d_model :] += torch.eye(self.d_model)

    @property
    def regions(self) -> dict[str, Region]:
        """The one looped region, by name."""
        return {LOOP: self.region}

    @property
    def loop_modules(self) -> dict[str, str]:
        """Where a recorder finds the loop step."""
        return {LOOP: "region.body"}

    @property
    def function_config(self) -> dict[str, int]:
        """See :class:`haltkit.identity.SaysItsFunction`: all that no shape of a weight says."""
        return {"n_head": self.n_head, "noise_seed": self.noise.seed, "positions": self.noise.shape[0]}

    @property
    def looped_regions(self) -> tuple[str, ...]:
        """See :class:`haltkit.attachment.native.HaltsItself`, as for :meth:`halted_call`."""
        return (LOOP,)

    def halted_call(
        self,
        policies: Mapping[str, HaltingPolicy[Any]],
        observer: LoopObserver | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> HaltedCall:
        """:meth:`forward` with these arguments, halted; its ``steps`` are the budget."""

        def halted(inputs: Tensor, steps: int, rows: Tensor | None = None) -> HaltedCall:
            out = self.forward_adaptive(inputs, policies[LOOP], max_loops=steps, rows=rows, observer=observer)
            return HaltedCall(out.logits, out.steps, out.outcome, {LOOP: steps})

        return halted(*args, **kwargs)

    def embed(self, inputs: Tensor) -> Tensor:
        """``e``, ``(B, T, D)``, of ``inputs``, ``(B, T, C)`` int64: the columns' embeddings, summed, times ``sqrt(D)``.

        Raises:
            ValueError: not ``C`` columns, or more rows than the model has positions.
        """
        if inputs.ndim != 3 or inputs.shape[-1] != len(self.columns):
            raise ValueError(f"inputs have shape {tuple(inputs.shape)}; expected (B, T, {len(self.columns)})")
        if inputs.shape[1] > self.noise.shape[0]:
            raise ValueError(f"{inputs.shape[1]} rows do not fit the model's {self.noise.shape[0]} positions")
        columns = [table(inputs[..., i]) for i, table in enumerate(self.tables)]
        return torch.stack(columns).sum(0) * math.sqrt(self.d_model)

    def initial_state(self, e: Tensor, noise: Noise | None = None) -> Tensor:
        """``x_0`` for the input ``e``, ``(B, T, D)``; ``noise`` None: the table that evaluation uses."""
        return self.region.initial_state(e, noise or self.noise)

    def step(self, x: Tensor, e: Tensor, rows: Tensor | None = None) -> Tensor:
        """``x_k`` from ``x_{k-1}``, ``(B, T, D)``, no row having halted; ``rows``: which are real, ``(B, T)``."""
        out: Tensor = self.region.body(x, e, [AllRows(rows)])
        return out

    def readout(self, x: Tensor) -> Tensor:
        """Logits ``(..., V)`` of a state ``(..., D)``, row by row."""
        out: Tensor = self.head(x)
        return out

    def forward(self, inputs: Tensor, steps: int, rows: Tensor | None = None) -> Tensor:
        """Logits ``(B, T, V)`` after ``steps`` steps of inputs ``(B, T, C)``; ``rows``: which are real, ``(B, T)``."""
        e = self.embed(inputs)
        x = self.initial_state(e)
        for _ in range(steps):
            x = self.step(x, e, rows)
        return self.readout(x)

    def masked_body(self, e: Tensor, rows: Tensor | None = None) -> LoopBody:
        """The body of one masked loop over the input ``e``, ``(B, T, D)``, for :func:`haltkit.run_loop`."""
        loop = RegionLoop(self.region, e, self.noise)
        loop.memories = [BidirectionalMemory(rows)]
        return loop

    def compact_body(self, e: Tensor, rows: Tensor | None = None) -> CompactBody:
        """The body of one compact loop over the input ``e``, ``(B, T, D)``."""
        batch, length = e.shape[:2]
        present = CompactRows(batch, length, rows)
        positions = torch.arange(length, device=e.device).repeat(batch)
        memories = [CompactBidirectionalMemory(present)]
        return CompactRegionLoop(self.region, e.flatten(0, 1), positions, self.noise, present, memories)

    @torch.no_grad()
    def forward_adaptive(
        self,
        inputs: Tensor,
        policy: str | HaltingPolicy[Any],
        *,
        max_loops: int = 32,
        budget: Tensor | None = None,
        rows: Tensor | None = None,
        keep: Keep = "current",
        observer: LoopObserver | None = None,
        execution: Execution = "masked",
    ) -> AdaptiveOutput:
        """Logits of inputs ``(B, T, C)``, looping until the policy halts each row. No gradients.

        A halted row keeps its state, and others go on reading the keys and values of its last step.

        Args:
            inputs: ``(B, T, C)`` int64.
            policy: a policy, or a spec such as ``"kl:tau=1e-3"`` or ``"norm:tau=0.1,granularity=sequence"``.
            max_loops: budget of every row.
            budget: of each row, ``(B, T)`` int64, where it is less.
            rows: which rows are real, ``(B, T)`` bool; None: all.
            keep, observer, execution: see :func:`haltkit.run_loop`.

        Raises:
            ValueError: inputs that do not fit the model, a bad spec or budget.
        """
        e = self.embed(inputs)
        body = self.compact_body(e, rows) if execution == "compact" else self.masked_body(e, rows)
        result = run_loop(
            body,
            self.initial_state(e),
            parse_policy(policy) if isinstance(policy, str) else policy,
            max_steps=max_loops,
            readout=self.readout,
            rows=rows,
            keep=keep,
            observer=observer,
            name=LOOP,
            budget=budget,
            execution=execution,
        )
        return AdaptiveOutput(self.readout(result.x), {LOOP: result.steps}, {LOOP: result.outcome})
