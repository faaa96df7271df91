"""The winner of a comparison, or a certified policy, as a card that every command and ``attach`` read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haltkit import timing
from haltkit.attachment.regions import ONE
from haltkit.attachment.saved import save
from haltkit.calibration import Certificate
from haltkit.comparison.certify import Certified
from haltkit.comparison.fitting import Fitted
from haltkit.comparison.possible import Possible
from haltkit.comparison.table import Comparison
from haltkit.identity import Identity
from haltkit.measured import LEVEL, Measured
from haltkit.setting import Setting
from haltkit.specs import UnprintablePolicy, packed
from haltkit.subject import Subject
from haltkit.weights import Weights

__all__ = ["save_certified", "save_fitted", "save_winner", "undescribed"]


def save_winner(path: Path, result: Comparison, subject: Subject, title: str) -> None:
    """Write the fastest policy within the middle level; nothing is written where none is that good.

    The card has the identity of the model where the policy has weights, or came from a card for this model alone.

    Args:
        path: of the card; of its folder, where the policy has weights.
        result: the comparison.
        subject: what was compared; its loop is described in the card, so that ``attach`` finds it, unless
            :func:`undescribed` says why not.
        title: of the comparison, for a reader of the card.

    Raises:
        ValueError: no policy is that good for sure, the winner cannot be printed as a spec, or the comparison was read
            from a file.
    """
    concluded = result.conclusion()
    winner = concluded.winner
    if winner is None:
        raise ValueError(f"--save: no policy is within {concluded.level:g} for sure, so {str(path)!r} was not written")
    if winner.setting is None:
        raise ValueError("--save: these results were read from a file, which has no policies: compare again")
    text, weights = _packed(winner.setting, path)
    full_depth = max((result.rows[0].depth or {}).values())  # the first row is full depth
    bound = winner.setting.standing.bound or bool(weights)
    _save(
        path,
        subject,
        text,
        f"chosen by haltkit compare on {title}: {winner.label}",
        identity=Identity.of(subject.model, full_depth) if bound else None,
        weights=weights,
        measured=_measured(result.item, winner.ms, result.rows[0].ms, winner.steps, result.headroom),
    )


def save_certified(path: Path, found: Certified, subject: Subject, title: str) -> None:
    """Write a folder with the certified policy, its weights if it has any, its certificate and the model's identity.

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
    text, weights = _packed(found.setting, path)
    units = f"{certificate.units} of unit {certificate.unit}"
    _save(
        path,
        subject,
        text,
        f"certified by haltkit calibrate on {units}, {title}: {_steps(found)}",
        identity=Identity.of(subject.model, found.full_depth),
        certificate=certificate,
        weights=weights,
        measured=_measured(subject.item, found.ms, found.full_ms, found.steps, found.headroom, _level(certificate)),
    )


def undescribed(subject: Subject) -> str:
    """Why a card cannot hold the description of the loops, and what to do; empty: it can, or needs none.

    Functions are code, which no file contains; the description then stays with the subject.
    """
    found = [field for loop in subject.described.values() for field in loop.functions]
    if not found:
        return ""
    how = "loop=" if list(subject.described) == [ONE] else "loops="
    return (
        f"the card does not describe the loop, whose description has functions ({', '.join(dict.fromkeys(found))}): "
        f"give it to attach beside the card, as {how}"
    )


def _level(certificate: Certificate) -> float:
    """The agreement that a certificate promises; the usual level where it is about something else."""
    agreement = certificate.loss in ("disagreement", "disagreement-anywhere")
    return float(f"{1 - certificate.epsilon:.6g}") if agreement else LEVEL


def _save(path: Path, subject: Subject, policy: str, about: str, **more: Any) -> None:
    """Write a card for the subject's model, with the description of its loops where a file can hold it.

    ``more``: other arguments of :func:`haltkit.attachment.saved.save`.
    """
    described = None if undescribed(subject) else subject.described or None
    save(path, policy, described, about, model=type(subject.model).__name__, regions=subject.regions, **more)


def _packed(setting: Setting, path: Path) -> tuple[str, dict[str, Weights]]:
    """A setting as :func:`haltkit.specs.packed` gives it, for the card at ``path``."""
    try:
        return packed(setting.policies)
    except UnprintablePolicy as error:
        raise ValueError(f"--save: {error}, so {str(path)!r} was not written") from None


def _steps(found: Certified) -> str:
    taken = " ".join(f"{mean:.2f}" for mean in found.steps.values())
    return f"{taken} of full depth's {found.full_depth} steps"


def _measured(
    item: str,
    ms: float | None,
    full_ms: float | None,
    steps: Mapping[str, float],
    headroom: Mapping[str, Possible],
    level: float = LEVEL,
) -> Measured | None:
    """What a card says of speed and headroom; None where no time is known. ``level``: of the fixed depths."""
    if ms is None or full_ms is None:
        return None
    known = {name: one.headroom for name, one in headroom.items()}
    return Measured(
        timing.machine(),
        item,
        ms,
        full_ms,
        steps,
        {name: one.mean_depth for name, one in known.items()},
        {name: one.fixed_depth(level) for name, one in known.items()},
        level if known else None,
    )


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
    text, weights = packed(found.policies())
    steps = " ".join(f"{taken:.2f}" for taken in found.row.steps.values())
    _save(
        path,
        subject,
        text,
        f"fitted by haltkit fit on {title}: agreement {found.row.agreement:.4f} at {steps} steps of {found.full_depth}",
        identity=Identity.of(subject.model, found.full_depth),
        weights=weights,
        measured=_measured(
            subject.item,
            found.row.ms,
            found.row.ms * found.row.speedup,
            found.row.steps,
            found.headroom,
            found.level,
        ),
    )
