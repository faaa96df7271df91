"""The winner of a comparison, or a certified policy, as a card that every command and ``attach`` read."""

from __future__ import annotations

import platform
from pathlib import Path

from haltkit.attachment.saved import save
from haltkit.comparison.certify import Certified
from haltkit.comparison.fitting import Fitted
from haltkit.comparison.table import Comparison
from haltkit.identity import Identity
from haltkit.specs import text_of
from haltkit.subject import Subject
from haltkit.weights import Weights

__all__ = ["save_certified", "save_fitted", "save_winner"]


def save_winner(path: Path, result: Comparison, subject: Subject, title: str) -> None:
    """Write the fastest policy within the middle level; nothing is written where none is that good.

    Args:
        path: of the card.
        result: the comparison.
        subject: what was compared; its loop is described in the card, so that ``attach`` finds it.
        title: of the comparison, for a reader of the card.

    Raises:
        ValueError: no policy is that good for sure, or the winner cannot be printed as a spec.
    """
    concluded = result.conclusion()
    winner = concluded.winner
    if winner is None:
        raise ValueError(f"--save: no policy is within {concluded.level:g} for sure, so {str(path)!r} was not written")
    if winner.spec is None:
        raise ValueError(f"--save: {winner.label} cannot be printed as a spec, so {str(path)!r} was not written")
    cost = f"{winner.ms:.3f} ms/{result.item}, {winner.speedup:.2f}x full depth"
    save(
        path,
        winner.spec,
        subject.described or None,
        f"chosen by haltkit compare on {title}: {winner.label}: {cost}",
        model=type(subject.model).__name__,
        regions=subject.regions,
    )


def save_certified(path: Path, found: Certified, subject: Subject, title: str) -> None:
    """Write a folder with the certified policy, its certificate and the identity of the model.

    Args:
        path: of the folder.
        found: the calibration.
        subject: what was calibrated.
        title: what it was run on, for a reader of the card.

    Raises:
        ValueError: nothing is certified, or the policy cannot be printed as a spec.
    """
    certificate = found.certificate
    if found.setting is None:
        raise ValueError(f"--save: {certificate.reason}, so {str(path)!r} was not written")
    if found.setting.text is None:
        raise ValueError(f"--save: {found.setting.label} cannot be printed as a spec, so {str(path)!r} was not written")
    units = f"{certificate.units} of unit {certificate.unit}"
    save(
        path,
        found.setting.text,
        subject.described or None,
        f"certified by haltkit calibrate on {units}, {title}: {_cost(found)}",
        model=type(subject.model).__name__,
        regions=subject.regions,
        identity=Identity.of(subject.model, found.full_depth),
        certificate=certificate,
    )


def _cost(found: Certified) -> str:
    steps = " ".join(f"{taken:.2f}" for taken in found.steps.values())
    time = "" if found.time is None else f", {found.time:.2f} of its wall-clock time on {platform.machine()}"
    return f"{steps} of full depth's {found.full_depth} steps{time}"


def save_fitted(path: Path, found: Fitted, subject: Subject, title: str) -> None:
    """Write a folder with a fitted policy, its weights and the identity of the model.

    Args:
        path: of the folder.
        found: the probe.
        subject: what it was fitted on.
        title: what it was run on, for a reader of the card.

    Raises:
        ValueError: something that is no card stands there.
    """
    named = found.policies(Weights(found.weights.tensors, "weights.safetensors"))
    steps = " ".join(f"{taken:.2f}" for taken in found.row.steps.values())
    save(
        path,
        text_of(named),
        subject.described or None,
        f"fitted by haltkit fit on {title}: agreement {found.row.agreement:.4f} at {steps} steps of {found.full_depth}",
        model=type(subject.model).__name__,
        regions=subject.regions,
        identity=Identity.of(subject.model, found.full_depth),
        weights=found.weights,
    )
