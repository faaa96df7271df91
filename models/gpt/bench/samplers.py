"""One text, continued by each sampler: time per token, and whether the tokens are those of full depth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from haltkit.models.gpt.generation import Settings, stream
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.sampling import GenerationError
from haltkit.specs import Policies
from haltkit.timing import turns

__all__ = ["sampler_speed"]


@torch.inference_mode()
def sampler_speed(
    model: LoopedGPT, prompt: Tensor, policies: Mapping[str, Policies], *, count: int, max_loops: int, repeats: int
) -> list[dict[str, Any]]:
    """Continue a prompt ``(T,)`` by ``count`` tokens at temperature 0, from its first new token on.

    Each policy decides in the sequential sampler, verifies drafts of one step, settles a wavefront, and verifies what a
    wavefront commits under it. A wavefront that the model's regions do not allow is left out.

    Returns:
        a row for each, the first of which is full depth, with ``ms_per_token``, ``speedup`` over the first (the median
        of the ratios within a repeat), and ``same``, the share of tokens that full depth chooses given the same prefix.
    """
    full = f"fixed:steps={max_loops}"
    ways: list[tuple[str, str, Policies, dict[str, Any]]] = [("sequential", "full depth", full, {})]
    for name, policy in policies.items():
        ways += [
            ("sequential", name, policy, {}),
            ("speculative", name, policy, {"sampler": "speculative"}),
            ("wavefront", name, policy, {"sampler": "wavefront", "layout": "last"}),
            ("wavefront, verified", name, policy, {"sampler": "wavefront", "verify": True}),
        ]
    given = [prompt.tolist()]
    ways = [way for way in ways if _takes(model, given, way[2], _settings(count, max_loops, way[3]))]
    spent: list[list[float]] = [[] for _ in ways]
    texts: list[list[int]] = [[] for _ in ways]
    for order in turns(len(ways), repeats):
        for i in order:
            *_, policy, more = ways[i]
            emissions = stream(model, given, policy, _settings(count, max_loops, more))
            tokens = next(emissions).tokens
            begun = time.perf_counter()
            tokens += [token for one in emissions for token in one.tokens]
            spent[i].append(time.perf_counter() - begun)
            texts[i] = [token for token in tokens if token is not None]
    return [
        {
            "sampler": sampler,
            "spec": name,
            "length": len(prompt),
            "tokens": count,
            "ms_per_token": 1e3 * statistics.median(times) / max(1, count - 1),
            "speedup": statistics.median(slow / fast for slow, fast in zip(spent[0], times, strict=True)),
            "same": _same(model, prompt, text, max_loops),
        }
        for (sampler, name, *_), times, text in zip(ways, spent, texts, strict=True)
    ]


def _settings(count: int, max_loops: int, more: Mapping[str, Any]) -> Settings:
    return Settings.of(max_new_tokens=count, temperature=0.0, max_loops=max_loops, **more)


def _takes(model: LoopedGPT, prompts: list[list[int]], policy: Policies, settings: Settings) -> bool:
    """Whether a sampler can continue these; only a wavefront may be refused."""
    try:
        stream(model, prompts, policy, settings)
    except GenerationError:
        if settings.sampler == "wavefront":
            return False
        raise
    return True


def _same(model: LoopedGPT, prompt: Tensor, text: list[int], max_loops: int) -> float:
    """The share of a text's tokens that full depth chooses after the tokens before them."""
    new = torch.tensor(text, device=prompt.device)
    logits = model(torch.cat([prompt, new[:-1]]).unsqueeze(0), max_loops)[0, len(prompt) - 1 :]
    return float((logits.argmax(-1) == new).double().mean())
