"""LoopedGPT: a GPT some of whose layers run many times.

The model of "Two-Scale Latent Dynamics for Recurrent-Depth Transformers" (arXiv 2509.23314, [P]):
a GPT-2 style decoder whose looped regions apply their layers again and again to a state that starts
as noise, with the region's input injected anew at each step. Block, initialization and loop schedule
follow Geiping et al. (arXiv 2502.05171, [G]).

Shapes: ``B`` sequences, ``T`` positions, ``D`` model width, ``H`` heads, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from haltkit.loop import Execution, Keep, LoopObserver
from haltkit.models.config import region_span
from haltkit.models.draws import EvaluationNoise, truncated_normal_
from haltkit.protocol import HaltingPolicy
from haltkit.registry import policy_for_regions

if TYPE_CHECKING:
    import tiktoken

    from haltkit.models.generation import Generation

__all__ = [
    "AdaptiveOutput",
    "Block",
    "LayerMemory",
    "LoopedGPT",
    "Noise",
    "Region",
    "RegionBody",
    "attend",
    "split_heads",
]

# noise(region, step, like): (T, D) or (B, T, D); step 0 is the initial state.
Noise = Callable[[str, int, Tensor], Tensor]
NormPlacement = Literal["residual", "branch"]
RMS_EPS = 1e-6
QUERY_CHUNK = 128


class LayerMemory(Protocol):
    """What one layer's attention remembers from step to step of a loop, or from token to token."""

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What each row reads, ``(..., D)``, from queries, keys and values ``(..., 3D)``, heads side by side."""
        ...


def attend(q: Tensor, k: Tensor, v: Tensor, broken: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Causal attention, ``(B, H, T, D/H)`` each; nobody sees positions that are ``broken``, ``(B, T)``.

    ``bias`` is the causal mask to add to scores, at least ``(T, T)`` float32; where it is given, gradients are cheaper.
    """
    if broken is not None:
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal & ~broken[:, None, None, :])
        # A token whose own keys or values are not finite is itself not finite, whatever it read from others.
        return y.masked_fill(broken[:, None, :, None], math.nan)
    if q.device.type != "cpu" or not torch.is_grad_enabled() or bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On a CPU the fused kernel's backward takes a third of a training step; two products and a softmax, compiled,
    # take far less. The mask is a ready-made tensor: one made from indices is worked out again, unvectorized, for
    # every score. Queries go in chunks, so that most of what lies above the diagonal is never computed.
    q = q * (1 / math.sqrt(q.shape[-1]))
    measured = torch.promote_types(v.dtype, torch.float32)
    chunks = []
    for start in range(0, q.shape[-2], QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, q.shape[-2])
        scores = q[..., start:end, :] @ k[..., :end, :].transpose(-2, -1)
        weights = (scores + bias[start:end, :end]).softmax(-1, dtype=measured).to(v.dtype)
        chunks.append(weights @ v[..., :end, :])
    return torch.cat(chunks, -2)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, T, 3D)`` into queries, keys and values, ``(B, H, T, D/H)`` each; views."""
    b, t, d = qkv.shape
    q, k, v = qkv.view(b, t, 3, n_head, d // 3 // n_head).permute(2, 0, 3, 1, 4)
    return q, k, v


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain follows the input's dtype, which under autocast is not the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    causal_bias: Tensor | None

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.register_buffer("causal_bias", None, persistent=False)  # see _attend
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, memory: LayerMemory | None = None) -> Tensor:
        qkv = self.qkv(x)
        if memory is not None:
            return self.proj(memory.attend(qkv, self.n_head))  # type: ignore[no-any-return]
        y = attend(*split_heads(qkv, self.n_head), bias=self.causal_bias)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(x.shape))
        return out


class MLP(nn.Module):
    def __init__(self, d_model: int, ratio: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d_model, ratio * d_model, bias=False)
        self.proj = nn.Linear(ratio * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(F.silu(self.fc(x)))
        return out


class Block(nn.Module):
    """One transformer layer with sandwich RMSNorm in one of the two senses of the word."""

    def __init__(self, d_model: int, n_head: int, mlp_ratio: int, norm_placement: NormPlacement) -> None:
        super().__init__()
        self.norm_placement = norm_placement
        self.n1, self.n2, self.n3, self.n4 = (RMSNorm(d_model, eps=RMS_EPS) for _ in range(4))
        self.attn = Attention(d_model, n_head)
        self.mlp = MLP(d_model, mlp_ratio)

    def forward(self, x: Tensor, memory: LayerMemory | None = None) -> Tensor:
        if self.norm_placement == "residual":  # [G]
            x = self.n2(x + self.attn(self.n1(x), memory))
            return self.n4(x + self.mlp(self.n3(x)))  # type: ignore[no-any-return]
        x = x + self.n2(self.attn(self.n1(x), memory))
        return x + self.n4(self.mlp(self.n3(x)))  # type: ignore[no-any-return]


class RegionBody(nn.Module):
    """One loop step of a region: inject the input, run the region's layers, norm the state.

    A module of its own so that hooks see each step: its first input is ``x_{k-1}``, its output ``x_k``.
    """

    def __init__(self, blocks: Sequence[Block], d_model: int, *, inject: bool, state_norm: bool) -> None:
        super().__init__()
        self.adapter = nn.Linear(2 * d_model, d_model, bias=False) if inject else None
        self.blocks = nn.ModuleList(blocks)
        # No gain: the norm of the state is then sqrt(D) exactly, a known scale for every threshold.
        self.norm = RMSNorm(d_model, eps=RMS_EPS, elementwise_affine=False) if state_norm else None

    def forward(self, x: Tensor, e: Tensor | None = None, memory: Sequence[LayerMemory] | None = None) -> Tensor:
        """``x_k`` from ``x_{k-1}``, both ``(B, T, D)``; ``e`` is the region's input, None to inject nothing."""
        if e is not None and self.adapter is not None:
            x = self.adapter(torch.cat([x, e.to(x.dtype)], dim=-1))
        for i, block in enumerate(self.blocks):
            x = block(x, None if memory is None else memory[i])
        return x if self.norm is None else self.norm(x)


class Region(nn.Module):
    """A looped group of layers and how its loop starts, is fed and ends."""

    def __init__(
        self,
        name: str,
        body: RegionBody,
        d_model: int,
        *,
        injection: Literal["every_step", "first_step", "never"],
        initial_state: Literal["noise", "zero", "input"],
        noise_every_step: bool,
        exit_norm: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self.body = body
        self.injection = injection
        self.initial = initial_state
        self.noise_every_step = noise_every_step
        self.exit_norm = RMSNorm(d_model, eps=RMS_EPS) if exit_norm else None

    def initial_state(self, e: Tensor, noise: Noise) -> Tensor:
        """``x_0`` for the region's input ``e``, ``(B, T, D)``."""
        if self.initial == "input":
            return e
        if self.initial == "zero":
            return torch.zeros_like(e)
        return noise(self.name, 0, e).to(e.dtype).expand_as(e)

    def step(self, x: Tensor, e: Tensor, k: int, noise: Noise, memory: Sequence[LayerMemory] | None = None) -> Tensor:
        """``x_k`` from ``x_{k-1}``; ``k`` counts from 1."""
        if self.noise_every_step and k > 1:
            x = x + noise(self.name, k - 1, e).to(x.dtype)
        inject = self.injection == "every_step" or (self.injection == "first_step" and k == 1)
        out: Tensor = self.body(x, e if inject else None, memory)
        return out

    def leave(self, x: Tensor) -> Tensor:
        """What the region hands on, from its last state: ``(..., D)``, row by row."""
        return x if self.exit_norm is None else self.exit_norm(x)

    def forward(
        self, e: Tensor, steps: int, noise: Noise, backprop_depth: int | None = None, recompute: bool = False
    ) -> Tensor:
        """:meth:`unroll`, as the call that engines of distributed training gather weights around."""
        return self.unroll(e, steps, noise, backprop_depth, recompute)

    def unroll(
        self, e: Tensor, steps: int, noise: Noise, backprop_depth: int | None = None, recompute: bool = False
    ) -> Tensor:
        """A fixed number of steps, no policy: ``(B, T, D)`` to ``(B, T, D)``.

        Gradients flow through the last ``backprop_depth`` steps only (None: through all). With ``recompute`` only
        each step's first state is kept for them, and the step is computed again on the way back.
        """
        x = self.initial_state(e, noise)
        cut = 0 if backprop_depth is None else max(0, steps - backprop_depth)
        with torch.no_grad():
            for k in range(1, cut + 1):
                x = self.step(x, e, k, noise)
        for k in range(cut + 1, steps + 1):
            if recompute and torch.is_grad_enabled():
                # Nothing in a step draws from a global generator.
                x = checkpoint(self.step, x, e, k, noise, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.step(x, e, k, noise)
        return self.leave(x)


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


MODEL_CARD = """---
{{ card_data }}
---

# A looped GPT

A decoder-only transformer some of whose layers run many times in one forward pass, trained with
[haltkit](https://pypi.org/project/haltkit/); `config.json` has its shape and what is known of its training.

```python
from haltkit.models.gpt import LoopedGPT

model = LoopedGPT.from_pretrained("{{ repo_id | default("this/repository", true) }}")
ids = model.tokenizer.encode_ordinary("When has a looped model thought enough?")
```

`model(tokens, loops)` runs a fixed number of loops, `model.forward_adaptive(tokens, "norm:tau=1.0")` as many as a
halting policy asks for. Loading runs no code from this repository.
"""


class LoopedGPT(
    nn.Module, ModelHubMixin, library_name="haltkit", tags=["looped-transformer"], model_card_template=MODEL_CARD
):
    """A decoder-only transformer with looped regions; arguments as :class:`~haltkit.models.config.ModelConfig`.

    ``save_pretrained(folder)``, ``from_pretrained(folder or Hub repository)`` and ``push_to_hub(repository)`` are
    huggingface_hub's; what they write and read is a checkpoint folder (:mod:`haltkit.models.hub`). ``tokenizer`` and
    ``trained`` (what is known of the training) travel with the model; they are None and empty for a new one.

    ``layers`` holds the network in order under the paper's names: ``"1"``, ``"2"``, ``"3"``, region
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
        injection: Literal["every_step", "first_step", "never"] = "every_step",
        injection_init: Literal["identity", "random"] = "random",
        initial_state: Literal["noise", "zero", "input"] = "noise",
        noise: Literal["initial", "every_step"] = "initial",
        noise_seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer: tiktoken.Encoding | None = None
        self.trained: dict[str, Any] = {}
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

    def _save_pretrained(self, save_directory: Path) -> None:
        from haltkit.models.hub import save_folder

        save_folder(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **source: Any) -> LoopedGPT:
        from haltkit.models.hub import load_folder

        return load_folder(model_id, **source).model

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
        """One count a region, from one for all (None: ``mean_loops``) or a mapping that names every region.

        Raises:
            ValueError: a count below 1, an unknown region, or one left out.
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
        return (self.wte(tokens) + places) * math.sqrt(self.d_model)  # type: ignore[no-any-return]

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
        counts = self.loop_counts(loops)
        x = self.embed(tokens)
        for name, layer in self.layers.items():
            if isinstance(layer, Region):
                x = layer(x, counts[name], noise or self.noise, backprop_depth, recompute)
            else:
                x = layer(x)
        return x

    def forward(self, tokens: Tensor, loops: int | Mapping[str, int] | None = None) -> Tensor:
        """Logits ``(B, T, V)`` of tokens ``(B, T)`` at fixed loop counts (None: ``mean_loops``)."""
        return self.readout(self.hidden(tokens, loops))

    @torch.no_grad()
    def forward_adaptive(
        self,
        tokens: Tensor,
        policy: str | HaltingPolicy[Any] | Mapping[str, str | HaltingPolicy[Any]],
        *,
        max_loops: int | Mapping[str, int] = 32,
        total_loops: int | None = None,
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
            policy: one for all regions, a spec such as ``"accel:tau=1e-3"``, or one policy a region.
            max_loops: budget of each region, one for all or by region.
            total_loops: budget of a token over all regions. In each it may spend what is left, less one step for
                every region still to come.
            rows: which positions are real, ``(B, T)`` bool; the others are padding, at the end of a sequence.
            keep: see :func:`haltkit.run_loop`.
            observer: told of every state under the region's name.
            execution: ``masked`` computes every token at every step and is the reference; ``compact`` computes
                those still looping. The same function, step for step.

        Raises:
            ValueError: a bad spec, a mapping that does not name exactly the model's regions, a ``total_loops`` that
                does not give each region a step, or padding before a token.
        """
        from haltkit.models.execution import run_policies

        x, steps, outcome = run_policies(
            self, tokens, policy_for_regions(policy, list(self.regions)), max_loops=max_loops,
            total_loops=total_loops, rows=rows, keep=keep, observer=observer, execution=execution,
        )  # fmt: skip
        return AdaptiveOutput(self.readout(x), steps, outcome)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        policy: str | HaltingPolicy[Any] | Mapping[str, str | HaltingPolicy[Any]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        vocabulary: int | None = None,
        stop: Sequence[int] = (),
        layout: str = "depth-indexed",
        max_loops: int | Mapping[str, int] = 32,
        total_loops: int | None = None,
    ) -> Generation:
        """Continue prompts (token ids, of any lengths), each token looping until its policies halt it.

        The same function as :meth:`forward_adaptive` on the text so far, with a cache. To have each token as soon as
        it is there, iterate over :func:`haltkit.models.generation.stream`.

        Args:
            policy: as in :meth:`forward_adaptive`, deciding token by token.
            max_new_tokens: of each sequence; it also ends at a stop token or where the context is full.
            temperature, top_k, top_p, seed, vocabulary: see :class:`haltkit.models.generation.Sampling`.
            stop: token ids that end a sequence and are left out.
            layout: ``depth-indexed``, exact; or a smaller cache that is an approximation: ``last``, ``modulo:M``
                (see :mod:`haltkit.models.cache`).
            max_loops, total_loops: as in :meth:`forward_adaptive`.

        Raises:
            GenerationError: prompts, sampling or policies that do not work; the message says what does.
            ValueError: a bad spec, layout or budget.
        """
        from haltkit.models.generation import Sampling, generate

        return generate(
            self, prompts, policy, max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, seed, vocabulary), stop=stop, layout=layout,
            max_loops=max_loops, total_loops=total_loops,
        )  # fmt: skip
