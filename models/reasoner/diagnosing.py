"""A reasoner as a case of the diagnostics: sequences of its task, and an untrained control."""

from __future__ import annotations

from pathlib import Path

import torch

from haltkit.diagnostics.plan import Case
from haltkit.models.reasoner.checkpoint import load_reasoner
from haltkit.models.reasoner.config import build_reasoner
from haltkit.models.reasoner.subject import reasoner_subject, sequences_of

__all__ = ["checkpoint_case"]


def checkpoint_case(folder: Path, *, name: str, tokens: int = 2048, seed: int = 0) -> Case:
    """A checkpoint folder of a reasoner as a case, on the first test set of its task.

    Args:
        folder: of the checkpoint.
        name: for titles.
        tokens: rows to look at, in whole sequences and at least two of them.
        seed: of the untrained control's weights.

    Raises:
        CheckpointError: the folder is no checkpoint, or a damaged one.
    """
    loaded = load_reasoner(folder)
    test_set, one = sequences_of(loaded.task, 1)
    _, samples = sequences_of(loaded.task, max(2, tokens // one.inputs.shape[1]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_reasoner(loaded.task, loaded.shape).eval()
    about = {
        "model": name,
        "trained": dict(loaded.trained),
        "text": f"test set {test_set!r}",
        "dtype": "float32",
        "torch": torch.__version__,
    }
    size = min(len(samples.inputs), 64)
    subject, untrained = (
        reasoner_subject(model, loaded.task, samples, name=title, batch=size)
        for model, title in ((loaded.model, name), (fresh, "untrained"))
    )
    return Case(subject, samples.inputs, untrained, about)
