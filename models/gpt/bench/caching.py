"""The cache while tokens are decoded: what a token costs by its position, and what each layout takes and loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.models.gpt.bench.work import means
from haltkit.models.gpt.decoding import Decoded, Decoder
from haltkit.models.gpt.model import Block, LoopedGPT, Region
from haltkit.specs import Policies
from haltkit.timing import in_turns, milliseconds

__all__ = ["approximate_layouts", "position_cost"]

ATTENTION_CALLS = 200


def _attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    for _ in range(ATTENTION_CALLS):
        F.scaled_dot_product_attention(q, k, v)


@torch.inference_mode()
def position_cost(
    model: LoopedGPT, ids: Tensor, policy: Policies, places: Sequence[int], *, count: int, max_loops: int, repeats: int
) -> list[dict[str, float]]:
    """Time of a token by its position, and what of it is attention, timed alone: ``ids`` is ``(1, T)``."""
    heads = next(layer for layer in model.layers.values() if isinstance(layer, Block)).attn.n_head
    plain = sum(not isinstance(layer, Region) for layer in model.layers.values())
    runs: dict[str, Callable[[], object]] = {}
    applied: dict[int, float] = {}
    for place in places:
        decoder = Decoder(model, policy, max_loops=max_loops)
        decoder.prefill(ids[:, :place])

        def run(decoder: Decoder = decoder, place: int = place) -> list[Decoded]:
            decoder.lengths = [place]
            return [decoder.step(ids[:, i]) for i in range(place, place + count)]

        layers = sum(
            float(taken) * len(model.regions[name].body.blocks) for one in run() for name, taken in one.steps.items()
        )
        applied[place] = plain + layers / count
        device = ids.device
        q = torch.randn(1, heads, 1, model.d_model // heads, device=device)
        kv = torch.randn(1, place + count // 2, 2, heads, model.d_model // heads, device=device).permute(2, 0, 3, 1, 4)
        runs[f"token {place}"] = run
        runs[f"attention {place}"] = partial(_attention, q, *kv)
    times = in_turns(runs, repeats)
    return [
        {
            "position": place,
            "ms_per_token": milliseconds(times[f"token {place}"], count),
            "attention_ms": milliseconds(times[f"attention {place}"], ATTENTION_CALLS) * applied[place],
        }
        for place in places
    ]


@torch.inference_mode()
def approximate_layouts(
    model: LoopedGPT, window: Tensor, policy: Policies, layouts: Sequence[str], *, max_loops: int
) -> list[dict[str, Any]]:
    """What each layout takes and what it loses, teacher-forced token by token over a window ``(1, T + 1)``.

    The first layout is the reference. ``max_logit_error`` is the largest change of any logit, ``mean_logit_error``
    the mean over tokens of the largest.
    """
    ids, targets = window[:, :-1], window[0, 1:]
    results: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for layout in layouts:
        decoder = Decoder(model, policy, layout=layout, max_loops=max_loops)
        seen = [decoder.prefill(ids[:, :1]), *(decoder.step(ids[:, i]) for i in range(1, ids.shape[1]))]
        logits = torch.cat([one.logits for one in seen])  # (T, V)
        ce = float(F.cross_entropy(logits, targets))
        reference = logits if reference is None else reference
        error = (logits - reference).abs().amax(-1)
        results.append(
            {
                "layout": layout,
                "bytes_per_token": decoder.nbytes() / ids.shape[1],
                "steps": means({n: torch.cat([one.steps[n] for one in seen]) for n in model.regions}),
                "ce": ce,
                "ce_change": ce - (results[0]["ce"] if results else ce),
                "max_logit_error": float(error.max()),
                "mean_logit_error": float(error.mean()),
                "agreement": float((logits.argmax(-1) == reference.argmax(-1)).double().mean()),
            }
        )
    return results
