"""Every line of the gallery's page: the first proposal of discover, and the steps at which a halt is exact."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import haltkit

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("gallery", EXAMPLES / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module
    spec.loader.exec_module(module)
    return module


gallery = _load()
ROWS = {
    row[1]: row[2:5]
    for line in (EXAMPLES / "gallery.md").read_text(encoding="utf-8").splitlines()
    if len(row := [cell.strip() for cell in line.split("|")]) > 4
}
pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like


def test_the_page_has_a_line_for_every_model() -> None:
    names = {entry.name for entry in gallery.ENTRIES}
    assert names == set(ROWS) - {"model", "---"}
    exact = [entry for entry in gallery.ENTRIES if entry.exact is None and not entry.rounds]
    assert len(gallery.ENTRIES) >= 25
    assert len(exact) >= 20


@pytest.mark.parametrize("entry", gallery.ENTRIES, ids=lambda entry: entry.name)
def test_the_first_proposal_is_exact_where_the_page_says_so(entry: Any) -> None:
    if not entry.installed:
        pytest.skip(f"{entry.needs} is not installed")
    found, case = gallery.look(entry), entry.case()
    call, where, alone = ROWS[entry.name]
    assert f"`{found.call}`" == call
    assert gallery.steps_text(found, entry, case) == where
    assert found.alone_text == alone
    assert found.exact == list(entry.steps(case))
    assert ("does not hold yet" in found.verdict) == (not found.exact)


@torch.no_grad()
def test_each_step_matters_to_every_model() -> None:
    """Otherwise a halt that does nothing would be found exact."""
    for entry in gallery.ENTRIES:
        if not entry.installed or not entry.steps(case := entry.case()):
            continue
        full = case.run()
        assert torch.equal(case.run_at(case.loops), full), entry.name
        for k in range(1, case.loops):
            assert (case.run_at(k) - full).abs().max() > 1e-6, (entry.name, k)


@torch.no_grad()
def test_a_transformer_with_a_cache_is_decoded_as_one_with_fewer_loops() -> None:
    """x-transformers keeps one cache slot for each execution of a layer."""
    pytest.importorskip("x_transformers")
    entry = next(entry for entry in gallery.ENTRIES if "execute_order" in entry.name)
    model: Any = entry.case(gallery.Size(32, 2, 16)).model
    prompt = torch.randint(0, gallery.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))

    def decode() -> torch.Tensor:
        logits, cache = model(prompt, return_intermediates=True)
        ids, seen = prompt, [logits]
        for _ in range(4):
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            logits, cache = model(ids, cache=cache, return_intermediates=True)
            seen.append(logits)
        return torch.cat(seen, 1)

    fields = haltkit.discover(model, lambda: model(prompt)).candidates[0].fields()
    for k in (1, 3, 5):
        with gallery.changed(model.attn_layers, layers_execute_order=(0, 1) * k):
            fewer = decode()
        with haltkit.attach(model, f"fixed:steps={k}", **fields) as session:
            assert torch.equal(decode(), fewer)
        assert session.skipped == 5 * (6 - k)
    with haltkit.attach(model, "fixed:steps=2", **fields):
        _, cache = model(prompt, return_intermediates=True)
    longer = torch.cat([prompt, prompt[:, :1]], 1)
    with (
        haltkit.attach(model, "fixed:steps=3", **fields),
        pytest.raises(haltkit.attachment.errors.KVDepthMismatch),
    ):
        model(longer, cache=cache, return_intermediates=True)
