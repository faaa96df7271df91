"""LoopedGPT: a GPT some of whose layers run many times.

The model of "Two-Scale Latent Dynamics for Recurrent-Depth Transformers" (arXiv 2509.23314, [P]):
a GPT-2 style decoder whose looped regions apply their layers again and again to a state that starts
as noise, with the region's input injected anew at each step. Block, initialization and loop schedule
follow Geiping et al. (arXiv 2502.05171, [G]).

Shapes: ``B`` sequences, ``T`` positions, ``D`` model width, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haltkit.loop import Execution, Keep, LoopObserver
from haltkit.models.gpt.config import region_span
from haltkit.models.gpt.draws import EvaluationNoise, truncated_normal_
from haltkit.models.gpt.generation import Continuation, Generation, Settings, generate, generate_stream
from haltkit.models.gpt.hub import Shared
from haltkit.models.gpt.layers import (
    RMS_EPS,
    Block,
    InitialState,
    Injection,
    Noise,
    NormPlacement,
    Region,
    RegionBody,
    RMSNorm,
)
from haltkit.models.gpt.passes import (
    Budgets,
    CompactMemories,
    MaskedMemories,
    Memories,
    fixed_pass,
    halting_pass,
)
from haltkit.models.gpt.sampling import GenerationError
from haltkit.specs import Policies, policy_for_regions

__all__ = ["AdaptiveOutput", "Block", "LoopedGPT", "Noise", "Region", "RegionBody"]


@dataclass(frozen=True)
class AdaptiveOutput:
    """Logits and, for each region by name, how its loop went.

    Attributes:
        logits: ``(B, T, V)``.
        steps: body applications of each token, ``(B, T)`` int64.
        outcome: a :class:`haltkit.Outcome` each, ``(B, T)`` int8.
    """

    logits: Tensor
    steps: dict[str, Tensor]
    outcome: dict[str, Tensor]


class LoopedGPT(Shared):
    """A decoder-only transformer with looped regions; arguments as :class:`~haltkit.models.gpt.config.ModelConfig`.

    ``save_pretrained(folder)``, ``from_pretrained(folder or Hub repository)`` and ``push_to_hub(repository)`` write and
    read a checkpoint folder (:mod:`haltkit.models.gpt.hub`); ``tokenizer`` and ``trained`` travel with the model.

    ``layers`` is the network in order under the paper's names: ``"1"``, ``"2"``, ``"3"``, region
    ``"4"``, region ``"5-6"``, ...; ``layers.4.body`` is the module that a loop step of region 4 calls.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        block_size: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        mlp_ratio: int = 4,
        regions: Sequence[str] = (),
        mean_loops: int = 12,
        norm_placement: NormPlacement = "residual",
        state_norm: bool = False,
        exit_norm: bool = True,
        injection: Injection = "every_step",
        injection_init: Literal["identity", "random"] = "random",
        initial_state: InitialState = "noise",
        noise: Literal["initial", "every_step"] = "initial",
        noise_seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size, self.d_model = vocab_size, block_size, d_model
        self.mean_loops, self.norm_placement = mean_loops, norm_placement
        self.noise = EvaluationNoise(noise_seed, block_size, d_model)

        self.wte = nn.Embedding(vocab_size, d_model)
        self.wpe = nn.Embedding(block_size, d_model)
        self.layers = nn.ModuleDict()
        starts = {region_span(name)[0]: name for name in regions}
        bias = torch.full((block_size, block_size), -math.inf).triu(1)  # one for all layers
        number = 1
        while number <= n_layer:
            name = starts.get(number, str(number))
            first, last = region_span(name)
            blocks = [Block(d_model, n_head, mlp_ratio, norm_placement) for _ in range(first, last + 1)]
            for block in blocks:
                block.attn.causal_bias = bias
            if number in starts:
                body = RegionBody(blocks, d_model, inject=injection != "never", state_norm=state_norm)
                self.layers[name] = Region(
                    name,
                    body,
                    d_model,
                    injection=injection,
                    initial_state=initial_state,
                    noise_every_step=noise == "every_step",
                    exit_norm=exit_norm,
                )
            else:
                self.layers[name] = blocks[0]
            number = last + 1
        self.norm_f = RMSNorm(d_model, eps=RMS_EPS)
        self._init_weights(injection_init)

    @property
    def regions(self) -> dict[str, Region]:
        """The looped regions by name, in order."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, Region)}

    @property
    def loop_modules(self) -> dict[str, str]:
        """Where a recorder finds each region's loop step: ``{"4": "layers.4.body", ...}``."""
        return {name: f"layers.{name}.body" for name in self.regions}

    @property
    def loop_injections(self) -> dict[str, str]:
        """Where a recorder finds each region's injection projection, for regions that have one."""
        return {name: f"layers.{name}.body.adapter" for name, r in self.regions.items() if r.body.adapter is not None}

    @property
    def effective_depth(self) -> int:
        """Layers a token passes at ``mean_loops`` loops in every region."""
        return sum(
            len(layer.body.blocks) * self.mean_loops if isinstance(layer, Region) else 1
            for layer in self.layers.values()
        )

    def _init_weights(self, injection_init: Literal["identity", "random"]) -> None:
        """[G] section 4.1, from narrow to wide:

        | tensor                               | value                                            |
        |--------------------------------------|--------------------------------------------------|
        | every matrix and embedding           | truncated normal (3 sigma), std ``sqrt(2/(5D))`` |
        | output projections (attention, MLP)  | the same, over ``sqrt(2 * effective depth)``     |
        | injection projection, ``identity``   | ``[0.5 W ; 0.5 W + I]`` on ``[state ; input]``   |
        | norm gains                           | 1                                                |

        Where the norm is on the branch it would undo the projections' scale, and 1 over a small number would blow
        up their gradients; there the scale goes into the gain of the branch's norm instead.
        """
        std = math.sqrt(2 / (5 * self.d_model))
        scale = 1 / math.sqrt(2 * self.effective_depth)
        on_branch = self.norm_placement == "branch"
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                branch_gain = on_branch and name.endswith(("n2.weight", "n4.weight"))
                nn.init.constant_(parameter, scale if branch_gain else 1.0)
            elif name.endswith("proj.weight") and not on_branch:
                truncated_normal_(parameter, std * scale)
            else:
                truncated_normal_(parameter, std)
        if injection_init == "identity":
            for region in self.regions.values():
                if region.body.adapter is not None:
                    with torch.no_grad():
                        weight = region.body.adapter.weight.mul_(0.5)  # (D, 2D)
                        weight[:, self.d_model :] += torch.eye(self.d_model)

    def loop_counts(self, loops: int | Mapping[str, int] | None) -> dict[str, int]:
        """One count for each region, from one for all (None: ``mean_loops``) or a mapping that names every region.

        Raises:
            ValueError: a count below 1, an unknown region, or a missing one.
        """
        counts = (
            dict(loops)
            if isinstance(loops, Mapping)
            else dict.fromkeys(self.regions, self.mean_loops if loops is None else loops)
        )
        if counts.keys() != self.regions.keys():
            raise ValueError(f"loops names regions {sorted(counts)}; the model's are {list(self.regions)}")
        if any(count < 1 for count in counts.values()):
            raise ValueError(f"every loop count must be at least 1, got {counts}")
        return counts

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """``(B, T)`` token ids to ``(B, T, D)``; token plus position, times ``sqrt(D)`` ([G]).

        ``positions``: each token's place in its sequence, of the same shape; None: from 0 on.
        """
        t = tokens.shape[-1]
        if positions is None and t > self.block_size:
            raise ValueError(f"{t} tokens do not fit the model's context of {self.block_size}")
        places = self.wpe.weight[:t] if positions is None else self.wpe(positions)
        x: Tensor = (self.wte(tokens) + places) * math.sqrt(self.d_model)
        return x

    def readout(self, x: Tensor) -> Tensor:
        """The model's decoder head on any state: final norm and tied LM head, ``(..., D)`` to ``(..., V)``."""
        return F.linear(self.norm_f(x), self.wte.weight)

    def hidden(
        self,
        tokens: Tensor,
        loops: int | Mapping[str, int] | None = None,
        *,
        noise: Noise | None = None,
        backprop_depth: int | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """The last layer's output at fixed loop counts, ``(B, T, D)``, before the head; see :meth:`Region.unroll`."""
        return fixed_pass(
            self.layers,
            self.embed(tokens),
            self.loop_counts(loops),
            noise or self.noise,
            backprop_depth=backprop_depth,
            recompute=recompute,
        )

    def forward(self, tokens: Tensor, loops: int | Mapping[str, int] | None = None) -> Tensor:
        """Logits ``(B, T, V)`` of tokens ``(B, T)`` at fixed loop counts (None: ``mean_loops``)."""
        return self.readout(self.hidden(tokens, loops))

    @torch.no_grad()
    def forward_adaptive(
        self,
        tokens: Tensor,
        policy: Policies,
        *,
        max_loops: int | Mapping[str, int] = 32,
        total_loops: int | None = None,
        budget: Mapping[str, Tensor] | None = None,
        rows: Tensor | None = None,
        keep: Keep = "current",
        observer: LoopObserver | None = None,
        execution: Execution = "masked",
    ) -> AdaptiveOutput:
        """Logits of tokens ``(B, T)``, each region looping until the policy halts it. No gradients.

        A halted token keeps its state, and others go on reading the keys and values of its last step; after a
        region every token hands on its own last state.

        Args:
            tokens: ``(B, T)`` token ids; sequences shorter than ``T`` are padded at the end.
            policy: one for all regions, a spec such as ``"accel:tau=1e-3"``, or one for each region by name.
            max_loops: budget of each region, one for all or by region.
            total_loops: budget of a token over all regions. In each it may spend what remains, less one step for
                every region still to come.
            budget: of each token by region, ``(B, T)`` int64, where it is less than ``max_loops``; not together with
                ``total_loops``.
            rows: which positions are real, ``(B, T)`` bool; the others are padding, at the end of a sequence.
            keep: see :func:`haltkit.run_loop`.
            observer: is given every state under the region's name.
            execution: ``masked`` computes every token at every step and is the reference; ``compact`` computes
                those still looping. The same function, step for step.

        Raises:
            ValueError: a bad spec, a mapping that does not name exactly the model's regions, a ``total_loops`` that
                does not give each region a step, or padding before a token.
        """
        policies = policy_for_regions(policy, list(self.regions))
        budgets = Budgets.of(self, max_loops, total_loops, budget)
        if execution not in ("masked", "compact"):
            raise ValueError(f"execution={execution!r}: allowed are 'masked' and 'compact'")
        if rows is not None and bool((rows[:, 1:] & ~rows[:, :-1]).any()):
            raise ValueError("rows: padding must be at the end of a sequence, not before one of its tokens")
        memories: Memories = MaskedMemories(self.noise)
        if execution == "compact":
            memories = CompactMemories(len(tokens), tokens.shape[1], self.noise)
        x = self.embed(tokens)
        seen = halting_pass(self, x, policies, budgets, memories, rows=rows, keep=keep, observer=observer)
        return AdaptiveOutput(self.readout(seen.x), seen.steps, seen.outcome)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        policy: Policies,
        settings: Settings | None = None,
        **values: Any,
    ) -> Generation:
        """Continue prompts (token ids, of any lengths), each token looping until its policies halt it.

        The same function as :meth:`forward_adaptive` on the text so far, with a cache. To have each token as soon as
        it is there, iterate over :func:`haltkit.models.gpt.generation.stream`.

        Args:
            policy: as in :meth:`forward_adaptive`, deciding token by token.
            settings: what to generate and how; or, by name, the fields of
                :class:`~haltkit.models.gpt.generation.Settings` and :class:`~haltkit.models.gpt.sampling.Sampling`,
                such as ``max_new_tokens=64, temperature=0.8, layout="last"``.

        Raises:
            GenerationError: prompts, settings or policies that do not work; the message says what does.
            ValueError: a bad spec, layout or budget.
        """
        return generate(self, prompts, policy, _settings(settings, values))

    def generate_stream(
        self,
        prompts: Iterable[Sequence[int]],
        policy: Policies,
        settings: Settings | None = None,
        *,
        slots: int = 8,
        ordered: bool = True,
        ahead: int | None = None,
        **values: Any,
    ) -> Iterator[Continuation]:
        """Continue the prompts of any iterable, also one without an end, ``slots`` at a time.

        The next prompt takes the place of a text that has ended, at once. Prompt ``i`` gets the text, steps and reason
        that :meth:`generate` gives it alone with ``seed + i``, up to rounding.

        Memory: a cache of ``slots`` sequences that fill the context, and ``slots`` texts; with ``ordered`` finished
        texts wait for those of earlier prompts, and the prompts are read at most ``ahead`` beyond the last text handed
        out. Nothing is read before the first text is asked for, or while the caller is busy.

        Args:
            policy, settings, values: as for :meth:`generate`. The speculative and the wavefront sampler continue one
                prompt after the other, whatever ``slots`` is.
            slots: how many prompts are continued at a time.
            ordered: texts come in the order of the prompts; False: as they end.
            ahead: see above; ``8 * slots`` unless given.

        A prompt that cannot be continued becomes the ``error`` of its text; errors of the iterable itself end all.

        Raises:
            GenerationError, ValueError: settings as of :meth:`generate`, ``slots`` below 1, ``ahead`` below ``slots``.
        """
        every = _settings(settings, values)
        return generate_stream(self, prompts, policy, every, slots=slots, ordered=ordered, ahead=ahead)


def _settings(settings: Settings | None, values: Mapping[str, Any]) -> Settings:
    """The settings of a text, given as such or by name."""
    if settings is not None and values:
        raise GenerationError(f"give settings= or {', '.join(values)} by name, not both")
    return settings or Settings.of(**values)
