"""A reasoner as a case of the diagnostics: sequences of its task, and an untrained control."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from haltkit.diagnostics.plan import Case
from haltkit.diagnostics.unfolding import Unfolding
from haltkit.models.reasoner.checkpoint import ReasonerCheckpoint, load_reasoner
from haltkit.models.reasoner.config import build_reasoner
from haltkit.models.reasoner.measure import predictions, settled_after
from haltkit.models.reasoner.subject import reasoner_subject, sequences_of
from haltkit.models.reasoner.task import Batch

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
    return Case(subject, samples.inputs, untrained, about, unfolding=partial(_unfold, loaded, samples, test_set))


@torch.no_grad()
def _unfold(loaded: ReasonerCheckpoint, samples: Batch, test_set: str) -> Unfolding:
    """The sequence of the test set that takes longest among the first eight, answered step by step to full depth."""
    task, model = loaded.task, loaded.model
    first = Batch(samples.inputs[:8], samples.labels[:8], samples.needed[:8])
    predicted, asked = predictions(model, first, task.full_depth), first.asked  # (K, B, T)
    one = int((settled_after(predicted) * asked).amax(1).argmax())
    whole = task.granularity == "sequence"
    shown = torch.ones_like(asked[one]) if whole else asked[one]
    rows = shown.nonzero().squeeze(-1).tolist()
    words = task.words(first.inputs[one])

    right = first.labels[one].tolist()
    # A cell that says its own answer is given.
    open_ = [bool(asked[one, row]) and words[row] != task.answer(right[row]) for row in range(len(words))]

    def said(labels: list[int]) -> tuple[str, ...]:
        return tuple(task.answer(labels[row]) if open_[row] else words[row] for row in rows)

    return Unfolding(
        f"{'A ' + task.item if whole else f'The {task.item}s of one sequence'} of test set {test_set!r}",
        task.across,
        tuple(words[row] for row in rows),
        tuple(open_[row] for row in rows),
        tuple(said(step[one].tolist()) for step in predicted),
        said(right),
    )
