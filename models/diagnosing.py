"""The bundled model as a subject of the diagnostics: checkpoints, run folders, snapshots, and its controls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.subject import Subject
from haltkit.diagnostics.survey import survey_layers_once
from haltkit.models.checkpoint import CONFIG_FILE, Checkpoint, build_model, load_checkpoint, read_config
from haltkit.models.config import ModelConfig
from haltkit.models.gpt import LoopedGPT, Region
from haltkit.models.statistics import loop_statistics

__all__ = [
    "Snapshot",
    "Target",
    "control_profile",
    "find_control",
    "find_snapshots",
    "find_target",
    "snapshot_statistics",
    "subject_of",
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
    if (path / CONFIG_FILE).is_file():
        return Target(path, None)
    snapshots = path / SNAPSHOTS
    found = sorted(p.parent for p in snapshots.glob(f"*/{CONFIG_FILE}")) if snapshots.is_dir() else []
    if (path / "final" / CONFIG_FILE).is_file():
        return Target(path / "final", snapshots if found else None)
    if found:
        return Target(found[-1], snapshots)
    raise DiagnosticError(
        f"{str(path)!r} is neither a checkpoint (no {CONFIG_FILE}) nor a run folder with a 'final' or with snapshots"
    )


def subject_of(model: LoopedGPT, name: str, tokenizer: Any = None) -> Subject:
    """The bundled model, with its layers, its injections and its native halting.

    Raises:
        DiagnosticError: a model without regions.
    """
    layers = {
        region: tuple(f"layers.{region}.body.blocks.{i}" for i in range(len(layer.body.blocks)))
        for region, layer in model.regions.items()
    }
    depth = [n if isinstance(layer, Region) else f"layers.{n}" for n, layer in model.layers.items()]

    def text(ids: Tensor) -> list[str]:
        return [tokenizer.decode_single_token_bytes(int(i)).decode("utf-8", "replace") for i in ids]

    def halted(inputs: Tensor, spec: str, loops: int) -> Mapping[str, Tensor]:
        steps = model.forward_adaptive(inputs, spec, max_loops=loops).steps
        return {region: taken[0] for region, taken in steps.items()}

    return Subject.of_modules(
        model, model, model.loop_modules, name=name, injections=model.loop_injections, layers=layers, depth=depth,
        readout=model.readout, tokens=None if tokenizer is None else text, halted=halted,
    )  # fmt: skip


def untrained_subject(config: ModelConfig, seed: int = 0) -> Subject:
    """The same shape with fresh weights: what a finding must differ from to be training's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config).eval()
    return subject_of(model, "untrained")


@dataclass(frozen=True)
class Snapshot:
    """A model at one time of its training: its checkpoint folder, or the statistics that are there already."""

    source: Path
    statistics: dict[str, Any] | None = None


def find_snapshots(folder: Path, loops: int) -> list[Snapshot]:
    """The snapshots in a folder, none of them loaded.

    Args:
        folder: of snapshots, each with the statistics that training wrote beside it or without, or of statistics
            alone, a JSON file a snapshot.
        loops: the depth that statistics must be of. Those of another depth are measured again where the snapshot is
            there.

    Raises:
        DiagnosticError: no snapshots there, a model without regions, a file that is not a snapshot's statistics, or
            statistics of another depth without their snapshot.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        statistics = _read(file)
        if statistics["loops"] != loops:
            raise DiagnosticError(
                f"{str(file)!r} was measured at {statistics['loops']} loops and cannot stand beside {loops}: give "
                f"--loops {statistics['loops']}, or the snapshots themselves"
            )
        # The untrained control is run beside every model, and an annealed release is a run of its own.
        if statistics.get("tokens_seen") and file.stem != "release":
            found.append(Snapshot(file, statistics))
    if found:
        return found
    for file in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        config, trained = read_config(file.parent)
        if not config.regions:
            raise DiagnosticError(f"{str(file.parent)!r} is a model without looped regions")
        beside = file.parent / STATISTICS_FILE
        stored = _read(beside) if beside.is_file() else None
        if trained.get("tokens"):
            found.append(Snapshot(file.parent, stored if stored and stored["loops"] == loops else None))
    if not found:
        raise DiagnosticError(f"{str(folder)!r} holds neither snapshots nor their statistics")
    return found


def snapshot_statistics(snapshot: Snapshot, windows: Callable[[Checkpoint], Tensor], loops: int) -> dict[str, Any]:
    """Reduced loop statistics of one snapshot, with the tokens it has seen; measured now if they are not there.

    Args:
        windows: inputs to measure on, for a checkpoint.
    """
    if snapshot.statistics is not None:
        return snapshot.statistics
    loaded = load_checkpoint(snapshot.source)
    return {"tokens_seen": loaded.trained["tokens"], **loop_statistics(loaded.model, windows(loaded), loops)}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DiagnosticError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(values, dict) or not {"regions", "dlr", "loops"} <= values.keys():
        raise DiagnosticError(f"{str(path)!r} does not hold a snapshot's statistics")
    return values


def find_control(path: Path) -> Path:
    """The checkpoint folder of a loops-off control.

    Raises:
        DiagnosticError: no checkpoint there, or a model with loops.
    """
    checkpoint = find_target(path).checkpoint
    if read_config(checkpoint)[0].regions:
        raise DiagnosticError(f"{str(path)!r} has looped regions: the control is trained with the loops off")
    return checkpoint


def control_profile(checkpoint: Path, windows: Callable[[Checkpoint], Tensor]) -> dict[str, Any]:
    """The attention profile over depth of a loops-off control (see :func:`find_control`)."""
    loaded = load_checkpoint(checkpoint)
    paths = [f"layers.{name}" for name in loaded.model.layers]
    profile = survey_layers_once(loaded.model, paths, lambda ids: loaded.model(ids, {}), windows(loaded))
    return {"tokens_seen": loaded.trained.get("tokens"), **profile}
