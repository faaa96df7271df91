"""The numbers that tell how a loop moves: pure functions of states, steps and logits.

Words: ``x_k`` is the loop state after ``k`` applications of the body, shape ``(..., D)``; its leading
dimensions are the *rows*. ``d_k = x_k - x_{k-1}`` is the k-th step. All norms are L2 over ``D``. What is
measured is promoted to float32 first (float64 stays float64): in bfloat16 the rounding of a state of norm 28 is
already about 0.03, above any threshold of interest.

Equations are those of "Two-Scale Latent Dynamics for Recurrent-Depth Transformers" (arXiv 2509.23314, [P]).
This module is the only place where a formula stands; policies, recorders and diagnostics call it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "EPS",
    "KLDirection",
    "acceleration",
    "cosine",
    "cosine_distance",
    "curvature",
    "delta_loop_ratio",
    "difference",
    "entropy",
    "entropy_change",
    "finite",
    "kl_divergence",
    "log_probabilities",
    "margin",
    "measured",
    "min_p",
    "norm",
    "normalized",
    "remaining_distance",
    "rounding_floor",
    "step_angle",
    "step_size_change",
    "top",
]

EPS = 1e-8
_CACHED = 2**18  # numbers
KLDirection = Literal["current_previous", "previous_current"]


def measured(x: Tensor) -> Tensor:
    """``x`` in the precision of measurement: float64 as it is, everything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def finite(x: Tensor) -> Tensor:
    """Rows whose entries are all finite, ``(..., D)`` to ``(...)``; the maximum propagates NaN.

    (``vector_norm`` with ``ord=inf`` says the same, ten times as slowly on a CPU.)
    """
    return measured(x).abs().amax(-1) < torch.inf


def difference(x: Tensor, x_prev: Tensor) -> Tensor:
    """The step ``d_k = x_k - x_{k-1}``, both ``(..., D)``, subtracted in the precision of measurement."""
    return measured(x) - measured(x_prev)


def norm(v: Tensor) -> Tensor:
    """L2 norm over the last dimension, ``(..., D)`` to ``(...)``. Of a step: the step norm, [P] Eq. 3."""
    size: Tensor = torch.linalg.vector_norm(measured(v), dim=-1)
    return size


def normalized(value: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """``value / (scale + eps)``, row by row; ``+inf`` where the scale is not defined yet (``+inf``).

    With ``value = ||d_k||`` and ``scale = ||x_{k-1}||`` the normalized step norm ([P] section 4); with
    ``scale = ||x_k||`` the form of Geiping et al. (arXiv 2502.05171). With ``value = ||d_k - d_{k-1}||`` and
    ``scale = ||d_k|| + ||d_{k-1}||`` the normalized acceleration ([P] Eq. 6), which lies in [0, 1].
    """
    return torch.where(scale == torch.inf, torch.inf, value / (scale + eps))


def acceleration(d: Tensor, d_prev: Tensor) -> Tensor:
    """``||d_k - d_{k-1}||``, ``(..., D)`` twice to ``(...)``: [P] Eq. 5."""
    return norm(difference(d, d_prev))


def step_size_change(step_norm: Tensor, step_norm_prev: Tensor) -> Tensor:
    """``abs(||d_k|| - ||d_{k-1}||)``: the "second-order difference in step-size" of [P]'s abstract, literally.

    Blind to a change of direction: zero for a steady rotation, where :func:`acceleration` is not.
    """
    return (step_norm - step_norm_prev).abs()


def step_angle(
    d: Tensor, d_prev: Tensor, step_norm: Tensor | None = None, step_norm_prev: Tensor | None = None
) -> Tensor:
    """``cos(d_k, d_{k-1})``, in [-1, 1]: [P] section 2. NaN where a step is zero and has no direction.

    Step norms that are known are not measured again.
    """
    return cosine(d, d_prev, step_norm, step_norm_prev)


def cosine(a: Tensor, b: Tensor, norm_a: Tensor | None = None, norm_b: Tensor | None = None) -> Tensor:
    """Cosine between vectors, ``(..., D)`` twice to ``(...)``, in [-1, 1]; NaN where one of them is zero.

    Norms ``(...)`` that are known are not measured again.
    """
    size = (norm(a) if norm_a is None else norm_a) * (norm(b) if norm_b is None else norm_b)
    return ((measured(a) * measured(b)).sum(-1) / size).clamp(-1, 1)


def curvature(d: Tensor, d_prev: Tensor) -> Tensor:
    """Menger curvature of the path at three successive states, ``(..., D)`` twice to ``(...)``, in 1 / length.

    One over the radius of the circle through ``x_{k-2}``, ``x_{k-1}`` and ``x_k``: twice the sine of the turn over
    ``||x_k - x_{k-2}||``. 0 on a straight line; NaN where a step is zero or leads back to ``x_{k-2}``. A spiral
    whose steps shrink by ``r`` has a curvature that grows by ``1 / r``: only a circle's is constant.
    """
    a, b = measured(d), measured(d_prev)
    along = (a * b).sum(-1, keepdim=True) / (b * b).sum(-1, keepdim=True)
    sine = norm(a - along * b) / norm(a)  # from the part across d_{k-1}: exact for a small turn, 1 - cos^2 is not
    chord = norm(a + b)
    return torch.where(chord == 0, torch.nan, 2 * sine / chord)


def remaining_distance(step_norm: Tensor, step_norm_prev: Tensor, cosine: Tensor) -> Tensor:
    """``||d_k|| r / |1 - r e^{i angle}|``: how far the limit is if the steps go on to shrink by ``r`` and to turn.

    With ``r = ||d_k|| / ||d_{k-1}||`` and the angle between the two steps, the steps to come are a geometric series in
    the plane of the last two, whose sum is ``d_k`` times ``r e^{i angle} / (1 - r e^{i angle})``: exact for a
    contraction and for a spiral (it is Aitken's extrapolation, one row at a time). 0 for a step of length 0, ``+inf``
    where ``r`` is not below 1 or not defined yet; ``cosine`` may be NaN where a step is zero. All ``(...)``.
    """
    ratio = step_norm / step_norm_prev
    beside = (1 - 2 * ratio * cosine + ratio * ratio).clamp(min=0).sqrt()  # |1 - r e^{i angle}|
    left = step_norm * ratio / beside
    left = torch.where((ratio < 1) & (step_norm_prev < torch.inf), left, torch.inf)
    return torch.where(step_norm == 0, 0.0, left)


def span(step_norm: Tensor, step_norm_prev: Tensor, cosine: Tensor) -> Tensor:
    """``sqrt(||d_k|| ||d_{k-1}|| sin)``, the root of the area that two successive steps span, all ``(...)``.

    A linear map of the plane changes every area by its determinant: round an ellipse the span is constant, where the
    step norm is not, and in a spiral it shrinks by ``r`` per step. 0 for steps on one line.
    """
    return (step_norm * step_norm_prev * (1 - cosine * cosine).clamp_min(0).sqrt()).sqrt()


def off_plane(cosine: Tensor, cosine_skip: Tensor, cosine_prev: Tensor) -> Tensor:
    """Sine of the angle between ``d_k`` and the plane of the two steps before, in [0, 1]; all ``(...)``.

    From ``cos(d_k, d_{k-1})``, ``cos(d_k, d_{k-2})`` and ``cos(d_{k-1}, d_{k-2})``. 0 in a plane, such as on an orbit,
    where each step is a combination of the two before. Where those lie on one line, it is the angle to the line.
    """
    across = 1 - cosine_prev * cosine_prev
    in_plane = (cosine * cosine + cosine_skip * cosine_skip - 2 * cosine * cosine_skip * cosine_prev) / across
    explained = torch.where(across > 1e-4, in_plane, cosine * cosine)
    return (1 - explained).clamp(0, 1).sqrt()


def rate(sizes: Tensor) -> Tensor:
    """By what factor sizes change per step, ``(..., 2n)`` in order of the steps to ``(...)``.

    The sum of the last ``n`` over that of the ``n`` before, which lie ``n`` steps apart: its ``n``-th root. It is exact
    for a geometric series, and for sizes that recur after ``n`` steps or a part of ``n``; NaN where all are 0.
    """
    before, after = sizes.chunk(2, dim=-1)
    return (after.sum(-1) / before.sum(-1)) ** (2 / sizes.shape[-1])


def rounding_floor(size: Tensor | float, dtype: torch.dtype) -> Tensor:
    """What one rounding to ``dtype`` can move a state of this norm by: its unit roundoff times the norm.

    A step below this says nothing; a body of several products moves a converged state by a few times as much.
    """
    return measured(torch.as_tensor(size)) * (torch.finfo(dtype).eps / 2)


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)`` over the last dimension, in the precision of measurement."""
    logits = measured(logits)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def kl_divergence(log_p: Tensor, log_p_prev: Tensor, direction: KLDirection = "current_previous") -> Tensor:
    """KL divergence in nats between successive predictions, ``(..., V)`` twice to ``(...)``.

    ``current_previous`` is ``KL(p_k || p_{k-1})``, [P] Eq. 4; ``previous_current`` is ``KL(p_{k-1} || p_k)``,
    which public implementations compute. Rounding below zero is cut off.
    """
    p, q = (log_p, log_p_prev) if direction == "current_previous" else (log_p_prev, log_p)
    if p.device.type != "cpu" or p.numel() <= _CACHED:
        return _kl(p, q)
    # A few rows at a time: temporaries that fit the caches, where asking the system for large ones takes half the time.
    rows = max(1, _CACHED // p.shape[-1])
    flat = (torch.split(x.reshape(-1, p.shape[-1]), rows) for x in (p, q))
    return torch.cat([_kl(*part) for part in zip(*flat, strict=True)]).view(p.shape[:-1])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # p (log p - log q) is 0 where p is 0, also where q is 0 there and the difference is inf or NaN.
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def delta_loop_ratio(handoff: Tensor, step_norms: Tensor) -> Tensor:
    """DLR at a boundary between two regions, [P] Eq. 2: how far the hand-off jumps in units of a loop step.

    Args:
        handoff: the jump, ``(..., D)``: next region's state minus ``x_g^(K)``, by the caller's convention.
        step_norms: ``||d_k||`` of the region before, ``(K, ...)``, for the steps that count.

    Returns:
        ``||handoff|| / mean_k ||d_k||``, ``(...)``.
    """
    return norm(handoff) / step_norms.mean(0)


def entropy(log_p: Tensor) -> Tensor:
    """``-sum p log p`` in nats, ``(..., V)`` to ``(...)``, in [0, log V]; a probability of 0 adds nothing."""
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


def entropy_change(entropy: Tensor, entropy_prev: Tensor) -> Tensor:
    """``abs(H_k - H_{k-1})`` in nats: the criterion ``entropy-diff`` in the code of arXiv 2502.05171.

    Blind to a prediction that moves from one token to another as likely; :func:`kl_divergence` is not.
    """
    return (entropy - entropy_prev).abs()


def going_on(gate: Tensor) -> Tensor:
    """``1 - lambda = sigmoid(-gate)``, the probability of not exiting at this step by a gate's logit; (0, 1)."""
    return torch.sigmoid(-gate)


def margin(log_p: Tensor) -> Tensor:
    """``p_(1) - p_(2)``, the gap between the two most probable, ``(..., V)`` to ``(...)``, in [0, 1].

    The "softmax response" by which CALM exits (arXiv 2207.07061, section 3.5).

    Raises:
        ValueError: fewer than two classes.
    """
    if log_p.shape[-1] < 2:
        raise ValueError(f"a margin between the two most probable of {log_p.shape[-1]} classes: at least 2 are needed")
    first, second = log_p.topk(2).values.exp().unbind(-1)
    return first - second


def min_p(log_p: Tensor, share: float) -> Tensor:
    """Log-probabilities without a tail, ``(..., V)``: what is below ``share`` of the largest becomes ``1 / V``.

    All is normalized again afterwards. The tail then adds nothing to a divergence but for what enters or leaves it: the
    criterion ``minp-kl`` in the code of arXiv 2502.05171, with a share of 0.1.
    """
    floor = log_p.amax(-1, keepdim=True) + math.log(share)
    return torch.log_softmax(torch.where(log_p < floor, -math.log(log_p.shape[-1]), log_p), dim=-1)


def top(logits: Tensor) -> Tensor:
    """The most probable class, ``(..., V)`` to ``(...)`` int64; the first of several."""
    return logits.argmax(-1)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """``1 - cos(a, b)``, ``(..., D)`` twice to ``(...)``, in [0, 2]; ``+inf`` where one of them is zero.

    Half the squared distance of the two directions, which is exact for a small angle where ``1 - cos`` is rounding.
    Of successive states: the criterion ``cosine`` in the code of arXiv 2502.05171; CALM's saturation (arXiv 2207.07061)
    is its complement.
    """
    size_a, size_b = norm(a), norm(b)
    across = measured(a) / size_a.unsqueeze(-1) - measured(b) / size_b.unsqueeze(-1)
    return torch.where((size_a > 0) & (size_b > 0), norm(across).square() / 2, torch.inf)
