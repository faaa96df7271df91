"""Attention inside a loop: the matrices that were really used, and what [M] (arXiv 2604.11791) measures on them.

An attention matrix ``A`` is ``(..., T, T)``: row ``t`` says what position ``t`` reads, and sums to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from haltkit import signals
from haltkit.diagnostics.errors import DiagnosticError

__all__ = [
    "SINK",
    "attention_matrix",
    "capture_attention",
    "column_concentration",
    "frobenius_distances",
    "mixing_score",
    "residual_compression",
    "sink_rate",
]

SINK = 0.3


def attention_matrix(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` weighs values with: ``(..., H, T, d)`` twice to ``(..., H, T, S)``."""
    q, k = signals.measured(query), signals.measured(key)
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + signals.measured(attn_mask)
    return scores.softmax(-1)


class _Capture(TorchFunctionMode):
    def __init__(self, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.inside: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self.inside:
            self._look(*args, **kwargs)
        return func(*args, **kwargs)

    def _look(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.see(self.inside[-1], attention_matrix(query, key, attn_mask, is_causal, scale, enable_gqa).detach())


@contextmanager
def capture_attention(model: nn.Module, paths: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(path, A)`` whenever a layer among ``paths`` attends; ``A`` is ``(B, H, T, S)``.

    Sees every use of :func:`torch.nn.functional.scaled_dot_product_attention` in an uncompiled model, whoever wrote
    it; attention written out by hand is not seen (and then ``see`` is never called).
    """
    capture = _Capture(see)
    handles = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            enter = module.register_forward_pre_hook(lambda _m, _a, path=path: capture.inside.append(path))
            leave = module.register_forward_hook(lambda _m, _a, _o: capture.inside.pop() and None, always_call=True)
            handles += [enter, leave]
        with capture:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p, p).sum(-1)
    return entropy


def column_concentration(attention: Tensor) -> Tensor:
    """``1 - H(c) / log T`` of the column sums ``c_j = sum_i A_ij / T``: ``(..., T, T)`` to ``(...)``, in [0, 1].

    0 where every position is read as much, 1 where all read one.
    """
    if attention.shape[-1] < 2:
        raise DiagnosticError("attention over one position has no concentration: give a longer window")
    return (1 - _entropy(attention.mean(-2)) / math.log(attention.shape[-1])).clamp(0, 1)


def sink_rate(attention: Tensor, threshold: float = SINK) -> Tensor:
    """Share of heads with a sink, ``(..., H, T, T)`` to ``(...)``: some position's mean share of attention,
    over all rows, is ``threshold`` or more."""
    return (attention.mean(-2).amax(-1) >= threshold).double().mean(-1)


def mixing_score(attention: Tensor) -> Tensor:
    """Mean entropy of the rows in nats, ``(..., T, T)`` to ``(...)``: 0 where each reads a single position."""
    return _entropy(attention).mean(-1)


def residual_compression(states: Tensor) -> Tensor:
    """Matrix-based entropy of a sequence's states in nats, ``(..., T, D)`` to ``(...)``.

    The entropy of the spectrum of ``X X^T`` normalized to a sum of one: log of the number of directions where it is
    flat, 0 where all states lie on one line (fully compressed); NaN where some are not finite, and have none.
    """
    x = signals.measured(states).double()
    if not x.isfinite().all():
        return torch.full(x.shape[:-2], torch.nan, dtype=x.dtype)
    spectrum = torch.linalg.svdvals(x).square()
    return _entropy(spectrum / spectrum.sum(-1, keepdim=True))


def frobenius_distances(matrices: Sequence[Tensor]) -> Tensor:
    """Frobenius distance between all pairs of N attention matrices, ``(H, T, T)`` each; mean over heads, ``(N, N)``."""
    rows = torch.stack(list(matrices)).double().flatten(2).transpose(0, 1)  # (H, N, T * T)
    square = rows.square().sum(-1)
    # Of squares, so that pairs need no T * T each; what rounding leaves below zero is zero.
    gram = square[:, :, None] + square[:, None, :] - 2 * rows @ rows.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).zero_()
    return gram.clamp_min(0).sqrt().mean(0)


def attention_numbers(attention: Tensor) -> dict[str, float]:
    """The head-averaged statistics of one layer's matrices in one pass, ``(H, T, T)``."""
    return {
        "concentration": float(column_concentration(attention).mean()),
        "sink_rate": float(sink_rate(attention)),
        "mixing": float(mixing_score(attention).mean()),
    }
