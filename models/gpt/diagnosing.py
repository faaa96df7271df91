"""The bundled model as a subject of the diagnostics: checkpoints, run folders, snapshots, and its controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.plan import Case
from haltkit.diagnostics.results import Control, Snapshot
from haltkit.diagnostics.schema import decode, encode
from haltkit.diagnostics.survey import measure_snapshot, survey_layers_once
from haltkit.files import read_json
from haltkit.models.checkpoint import Checkpoint, build_model, load_checkpoint
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import read_config
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.subject import SAMPLE, gpt_subject, text_windows
from haltkit.models.weights import CHECKPOINT_CONFIG, checkpoint_in
from haltkit.subject import Subject

__all__ = [
    "Target",
    "checkpoint_case",
    "control_profile",
    "find_control",
    "find_snapshots",
    "find_target",
    "loop_statistics",
    "untrained_subject",
]

SNAPSHOTS = "snapshots"
STATISTICS_FILE = "statistics.json"


@dataclass(frozen=True)
class Target:
    """What a path stands for: a checkpoint, and the snapshots of the run it is from, if there are any."""

    checkpoint: Path
    snapshots: Path | None


def find_target(path: Path) -> Target:
    """A checkpoint folder, or a run folder, whose ``final`` or else newest snapshot is the model.

    Raises:
        DiagnosticError: neither.
    """
    checkpoint = checkpoint_in(path)
    if (checkpoint / CHECKPOINT_CONFIG).is_file():
        of_a_run = checkpoint != path and any((path / SNAPSHOTS).glob(f"*/{CHECKPOINT_CONFIG}"))
        return Target(checkpoint, path / SNAPSHOTS if of_a_run else None)
    raise DiagnosticError(
        f"{str(path)!r} is neither a checkpoint (no {CHECKPOINT_CONFIG}) nor a run folder with a 'final' "
        "or with snapshots"
    )


def checkpoint_case(
    folder: Path,
    *,
    name: str,
    tokens: int = 2048,
    seed: int = 0,
    text: Path | None = None,
    snapshots: Path | None = None,
    snapshot_loops: int = 32,
    control: Path | None = None,
    control_windows: int = 2,
) -> Case:
    """A checkpoint or a run folder as a case, with its untrained control.

    Args:
        folder: of the checkpoint or of the run.
        name: for titles.
        tokens: how many tokens of the text to look at.
        seed: of the untrained control's weights.
        text: a text file; None: the bundled held-out sample.
        snapshots: a folder of snapshots (see :func:`find_snapshots`); None: those of the run, if there are any.
        snapshot_loops: the depth that their statistics must be of.
        control: a checkpoint or run folder of a model without loops.
        control_windows: how many windows its attention is measured on.

    Raises:
        ValueError: no checkpoint there, a model without regions, or a text that cannot be read.
    """
    target = find_target(folder)
    loaded = load_checkpoint(target.checkpoint)
    if not loaded.model.regions:
        raise DiagnosticError(
            f"{str(target.checkpoint)!r} is a model without looped regions: there is no loop to look at"
        )

    def windows(checkpoint: Checkpoint) -> Tensor:
        return text_windows(checkpoint, text or SAMPLE, tokens)[:, :-1]

    about = {
        "model": name,
        "regions": list(loaded.model.regions),
        "tokens_seen": loaded.trained.get("tokens"),
        "held_out_loss": loaded.trained.get("held_out_loss"),
        "text": str(text) if text else "bundled sample",
        "dtype": "float32",
        "torch": torch.__version__,
    }
    found = snapshots or target.snapshots
    off = None if control is None else find_control(control)
    return Case(
        gpt_subject(loaded.model, name=name, tokenizer=loaded.tokenizer),
        windows(loaded),
        untrained_subject(loaded.config, seed),
        about,
        () if found is None else find_snapshots(found, windows, snapshot_loops),
        None if off is None else lambda: control_profile(off, lambda one: windows(one)[:control_windows]),
    )


def untrained_subject(config: ModelConfig, seed: int = 0) -> Subject:
    """The same shape with fresh weights: what a finding must differ from to be training's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config).eval()
    return gpt_subject(model, name="untrained")


def loop_statistics(model: LoopedGPT, windows: Tensor, loops: int = 32) -> dict[str, Any]:
    """Reduced statistics of a model's loops, in a few kilobytes: what training keeps beside each snapshot.

    Args:
        model: not compiled (hooks added to a compiled module do not fire), in float32 or float64.
        windows: inputs ``(N, T)``, taken one at a time.
        loops: the fixed depth.

    Returns:
        ``{"loops", "tokens", "regions": {name: {statistic: [k = 1 .. K]}}, "dlr": {"a -> b": {convention: ...}}}``.
        Means and standard deviations are over tokens; ``cosine_of_means`` is the cosine of the mean steps. What is
        not defined at k = 1 is null.
    """
    measured = encode(measure_snapshot(gpt_subject(model), windows, loops))
    return {key: value for key, value in measured.items() if key != "tokens_seen"}


def find_snapshots(
    folder: Path, windows: Callable[[Checkpoint], Tensor], loops: int
) -> list[Snapshot | Callable[[], Snapshot]]:
    """The snapshots in a folder, none of them loaded: those with statistics as values, the others as calls.

    Args:
        folder: of snapshots, each with the statistics that training wrote beside it or without; or of statistics
            alone, one JSON file per snapshot.
        windows: inputs to measure on, for a checkpoint.
        loops: the depth that statistics must be of. Those of another depth are measured again where the snapshot is
            there.

    Raises:
        DiagnosticError: no snapshots there, a model without regions, a file that is not a snapshot's statistics, or
            statistics of another depth without their snapshot.
    """
    found: list[Snapshot | Callable[[], Snapshot]] = []
    for file in sorted(folder.glob("*.json")):
        statistics = _read_statistics(file)
        if statistics.loops != loops:
            raise DiagnosticError(
                f"{str(file)!r} was measured at {statistics.loops} loops and cannot stand beside {loops}: give "
                f"--loops {statistics.loops}, or the snapshots themselves"
            )
        # The untrained control is run beside every model, and an annealed release is a run of its own.
        if statistics.tokens_seen and file.stem != "release":
            found.append(statistics)
    if found:
        return found
    for file in sorted(folder.glob(f"*/{CHECKPOINT_CONFIG}")):
        config, trained = read_config(file.parent)
        if not config.regions:
            raise DiagnosticError(f"{str(file.parent)!r} is a model without looped regions")
        if not trained.get("tokens"):
            continue
        beside = file.parent / STATISTICS_FILE
        stored = _read_statistics(beside) if beside.is_file() else None
        if stored is not None and stored.loops == loops and stored.tokens_seen:
            found.append(stored)
        else:
            found.append(partial(_measure, file.parent, windows, loops))
    if not found:
        raise DiagnosticError(f"{str(folder)!r} has neither snapshots nor their statistics")
    return found


def _measure(folder: Path, windows: Callable[[Checkpoint], Tensor], loops: int) -> Snapshot:
    loaded = load_checkpoint(folder)
    subject = gpt_subject(loaded.model, name=folder.name)
    return measure_snapshot(subject, windows(loaded), loops, tokens_seen=loaded.trained["tokens"])


def _read_statistics(path: Path) -> Snapshot:
    values = read_json(path, "the statistics", dict)
    try:
        return decode(Snapshot, values)
    except DiagnosticError as error:
        raise DiagnosticError(f"{str(path)!r} does not have a snapshot's statistics: {error}") from None


def find_control(path: Path) -> Path:
    """The checkpoint folder of a loops-off control.

    Raises:
        DiagnosticError: no checkpoint there, or a model with loops.
    """
    checkpoint = find_target(path).checkpoint
    if read_config(checkpoint)[0].regions:
        raise DiagnosticError(f"{str(path)!r} has looped regions: the control is trained with the loops off")
    return checkpoint


def control_profile(checkpoint: Path, windows: Callable[[Checkpoint], Tensor]) -> Control:
    """The attention profile over depth of a loops-off control (see :func:`find_control`)."""
    loaded = load_checkpoint(checkpoint)
    paths = [f"layers.{name}" for name in loaded.model.layers]
    return survey_layers_once(
        loaded.model,
        paths,
        lambda ids: loaded.model(ids, {}),
        windows(loaded),
        tokens_seen=loaded.trained.get("tokens"),
    )
