"""Caches of every kind are recognised, remembered from session to session, and refused where depth would differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from haltkit.attachment import errors
from standins import AtDepths, RavenForCausalLM, SlotCache

D, STEPS = 4, 6
Past = tuple[tuple[Tensor, Tensor], ...]


class Attends(nn.Module):
    """Causal attention over what is cached at this step, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def mix(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        t, n = x.shape[1], k.shape[2]
        mask = torch.ones(t, n, dtype=torch.bool).tril(n - t)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return torch.tanh(x + y.squeeze(1)), (k, v)


class ReturnsPast(Attends):
    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.mix(x, past)


class AsValues(nn.Module):
    """Keys and values of each step come in and go out as tuples; ``between`` is what happens to them on the way."""

    def __init__(self, between: Callable[[Past], Past] = tuple) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.between = ReturnsPast(), between

    def forward(self, x: Tensor, past: Past | None = None, n: int = STEPS) -> tuple[Tensor, Past]:
        kept = []
        for k in range(n):
            x, present = self.cell(x, None if past is None else past[k])
            kept.append(present)
        return x, self.between(tuple(kept))


class ReturnsNew(Attends):
    """Only the keys and values of the newest tokens: the model's own code puts them behind the others."""

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        t = x.shape[1]
        x, (k, v) = self.mix(x, past)
        return x, (k[:, :, -t:], v[:, :, -t:])


class JoinedOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = ReturnsNew()

    def forward(self, x: Tensor, past: Past | None = None, n: int = STEPS) -> tuple[Tensor, Past]:
        kept = []
        for k in range(n):
            x, (keys, values) = self.cell(x, None if past is None else past[k])
            if past is not None:
                keys, values = torch.cat([past[k][0], keys], 2), torch.cat([past[k][1], values], 2)
            kept.append((keys.clone(), values.clone()))
        return x, tuple(kept)


def reordered(past: Past) -> Past:
    """As beam search does: other tensors with the same in them."""
    return tuple((k.index_select(0, torch.arange(len(k))), v.clone()) for k, v in past)


class OwnCache:
    """A package's own: no update, no length."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}


class FillsOwn(Attends):
    def forward(self, x: Tensor, cache: OwnCache, step: int) -> Tensor:
        x, cache.kept[step] = self.mix(x, cache.kept.get(step))
        return x


class AsObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = FillsOwn()

    def forward(self, x: Tensor, cache: OwnCache, n: int = STEPS) -> tuple[Tensor, OwnCache]:
        for k in range(n):
            x = self.cell(x, cache, k)
        return x, cache


class FillsTensor(Attends):
    """Keys and values are written into a tensor that was allocated before."""

    def forward(self, x: Tensor, store: Tensor, step: int, start: int) -> Tensor:
        _, (k, v) = self.mix(x, (store[step, 0][:, :, :start], store[step, 1][:, :, :start]))
        store[step, 0, :, :, start : start + x.shape[1]] = k[:, :, start:]
        store[step, 1, :, :, start : start + x.shape[1]] = v[:, :, start:]
        return self.mix(x, (store[step, 0][:, :, :start], store[step, 1][:, :, :start]))[0]


class AsTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.start = FillsTensor(), 0

    def forward(self, x: Tensor, store: Tensor, n: int = STEPS) -> tuple[Tensor, Tensor]:
        for k in range(n):
            x = self.cell(x, store, k, self.start)
        self.start += x.shape[1]
        return x, store


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
PIECES = X[:, :3], X[:, 3:4], X[:, 4:]


def decode(model: Any, first: Any, depths: tuple[int, ...] | None = None) -> list[Tensor]:
    cache, out = first() if callable(first) else first, []
    for piece, n in zip(PIECES, depths or (STEPS,) * 3, strict=True):
        x, cache = model(piece, cache, n)
        out.append(x)
    return out


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "tuples": (AsValues, lambda: None),
    "tuples, reordered": (lambda: AsValues(reordered), lambda: None),
    "tuples, joined outside": (JoinedOutside, lambda: None),
    "object": (AsObject, OwnCache),
    "tensor": (AsTensor, lambda: torch.zeros(STEPS, 2, 2, 1, 8, D)),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


@kinds
@pytest.mark.parametrize("depths", [(2, 6, 6), (6, 2, 6), (3, 3, 4), (1, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize("kv", ["refuse", "copy"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_another_depth_is_refused_for_caches_of_every_kind(
    kind: str, depths: tuple[int, ...], kv: Any, mode: Any
) -> None:
    build, first = KINDS[kind]
    with (
        mode(),
        pytest.raises(errors.KVDepthMismatch),
        haltkit.attach(build().eval(), AtDepths(*depths), body=["cell"], kv=kv) as session,
    ):
        decode(session.model, first)


@kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_depth_is_exact_for_caches_of_every_kind(kind: str, mode: Any) -> None:
    with mode():
        exact_at_one_depth(kind)


def exact_at_one_depth(kind: str) -> None:
    build, first = KINDS[kind]
    expected = decode(build().eval(), first, (3, 3, 3))
    for kv, policy in (("refuse", "fixed:steps=3"), ("uniform", AtDepths(3, 5, 2))):
        model = build().eval()
        with haltkit.attach(model, policy, body=["cell"], kv=kv) as session:
            out = decode(model, first)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        assert session.computed == 9


@torch.no_grad()
@kinds
def test_freeze_fills_every_step_of_caches_of_every_kind(kind: str) -> None:
    """By hand: the state stays, the body runs on."""
    build, first = KINDS[kind]
    model, depths = build().eval(), (2, 6, 3)
    with haltkit.attach(model, AtDepths(*depths), body=["cell"], kv="freeze") as session:
        out = decode(model, first)
    assert session.skipped == 0
    cell = model.get_submodule("cell")
    assert isinstance(cell, Attends)
    past: list[tuple[Tensor, Tensor] | None] = [None] * STEPS
    for piece, depth, result in zip(PIECES, depths, out, strict=True):
        x = piece
        for k in range(STEPS):
            new, past[k] = cell.mix(x, past[k])
            x = new if k < depth else x
        torch.testing.assert_close(result, x, rtol=0, atol=1e-6)


@torch.no_grad()
@kinds
def test_what_is_known_of_a_cache_survives_the_session(kind: str) -> None:
    """One session for each request, as a server has."""
    build, first = KINDS[kind]
    model = build().eval()
    with haltkit.attach(model, "fixed:steps=2", body=["cell"]):
        _, cache = model(PIECES[0], first())
    with haltkit.attach(model, "fixed:steps=2", body=["cell"]):
        _, cache = model(PIECES[1], cache)
    with pytest.raises(errors.KVDepthMismatch), haltkit.attach(model, "fixed:steps=6", body=["cell"]):
        model(PIECES[2], cache)
    with haltkit.attach(model, "fixed:steps=6", body=["cell"]):  # a new request, a new cache
        decode(model, first)


@torch.no_grad()
def test_a_cells_state_that_is_handed_on_between_calls_is_no_cache() -> None:
    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell = nn.LSTMCell(D, D)

        def forward(self, x: Tensor, state: tuple[Tensor, Tensor], n: int = STEPS) -> tuple[Tensor, Tensor]:
            for _ in range(n):
                state = self.cell(x, state)
            return state

    model, x = Chunks().eval(), torch.randn(3, D)
    state = expected = torch.zeros(3, D), torch.zeros(3, D)
    for depth in (2, 5, 3):
        with haltkit.attach(model, f"fixed:steps={depth}", body=["cell"], initial=None):
            state = model(x, state)
        expected = model(x, expected, depth)
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


@torch.no_grad()
def test_a_deeper_call_is_refused_before_its_first_step_beyond() -> None:
    """Not one step late, when attention over an empty slot has raised something of its own."""
    torch.manual_seed(0)
    model, cache = RavenForCausalLM().eval(), SlotCache()
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with haltkit.attach(model, AtDepths(2, 5)), pytest.raises(errors.KVDepthMismatch, match="at 2 iterations"):
        model(ids[:, :6], (6, 0), cache)
        slots = set(cache.slots)
        model(ids[:, 6:7], (6, 0), cache)
    assert set(cache.slots) == slots
    with haltkit.attach(model, "fixed:steps=5"):  # emptied, a cache is new
        cache.slots.clear()
        model(ids[:, :4], (6, 0), cache)


class ConvCache(SlotCache):
    """Keeps a short convolution's state beside keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv: dict[int, Tensor] = {}


@torch.no_grad()
def test_copy_refuses_what_it_would_leave_empty_or_misplace() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))

    class WithConv(RavenForCausalLM):
        def core_block_forward(self, x: Tensor, e: Tensor, block_idx: Tensor, cache: Any) -> Tensor:
            cache.conv[int(block_idx)] = x[:, -1:]
            return super().core_block_forward(x, e, block_idx, cache)

    class FirstApart(RavenForCausalLM):
        """The slots of the first step are its own; those of later ones start at 100."""

        def core_block_forward(self, x: Tensor, e: Tensor, block_idx: Tensor, cache: Any) -> Tensor:
            if int(block_idx) == 2:
                block_idx += 100
            return super().core_block_forward(x, e, block_idx, cache)

    class OneEach(RavenForCausalLM):
        def core_block_forward(self, x: Tensor, e: Tensor, block_idx: Tensor, cache: Any) -> Tensor:
            return super().core_block_forward(x, e, block_idx, cache[int(block_idx) // 2])

        def forward(self, ids: Tensor, num_steps: Any = (8, 0), cache: Any = None) -> Any:
            self.caches = cache
            e = self.embed(ids, cache[-1])
            x, block_idx = self.initial(e), torch.tensor(0)
            for _ in range(num_steps[0]):
                x = self.core_block_forward(x, e, block_idx, cache)
            return x

    cases: list[tuple[RavenForCausalLM, Any, str]] = [
        (WithConv().eval(), ConvCache(), "other states"),
        (FirstApart().eval(), SlotCache(), "slots of its own"),
        (OneEach().eval(), [SlotCache() for _ in range(8)], "several"),
    ]
    for model, cache, message in cases:
        with (
            pytest.raises(errors.KVDepthMismatch, match=message),
            haltkit.attach(model, "fixed:steps=3", kv="copy"),
        ):
            model(ids, (6, 0), cache)
    plain = RavenForCausalLM().eval()
    with (  # after two steps the distance is not known yet: the first may have slots of its own
        pytest.raises(errors.KVDepthMismatch, match="three iterations"),
        haltkit.attach(plain, "fixed:steps=2", kv="copy"),
    ):
        plain(ids, (6, 0), SlotCache())


@torch.no_grad()
def test_copy_knows_the_slots_distance_from_an_earlier_session() -> None:
    """Learned where nothing was skipped, used where two steps would not show it."""
    torch.manual_seed(0)
    model = RavenForCausalLM().eval()
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    pieces = ids[:, :6], ids[:, 6:7], ids[:, 7:]
    caches = SlotCache(), SlotCache()
    for piece, depth in zip(pieces, (4, 1, 4), strict=True):
        with haltkit.attach(model, f"fixed:steps={depth}", kv="copy"):
            out = model(piece, (4, 0), caches[0]).logits
    with haltkit.attach(model, AtDepths(4, 1, 4), kv="copy", kv_stride=2):
        for piece in pieces:
            expected = model(piece, (4, 0), caches[1]).logits
    assert torch.equal(out, expected)
