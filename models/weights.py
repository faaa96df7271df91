"""The files of a checkpoint folder of any model: a JSON header and safetensors weights.

Nothing here knows a model class. ``config.json`` names the model's type, so that a caller can choose who builds it;
weights are read without running code from the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from haltkit.files import FileError, read_json, usual_mode, write_json

__all__ = [
    "BUNDLED",
    "CHECKPOINT_CONFIG",
    "SHARDED",
    "WEIGHTS_FILE",
    "CheckpointError",
    "CheckpointUnreadable",
    "Header",
    "check_names_and_shapes",
    "checkpoint_in",
    "read_header",
    "read_shapes",
    "read_tensors",
    "read_weights",
    "refuse_pickles",
    "save_tensors",
    "weights_file",
    "write_header",
]

CHECKPOINT_CONFIG, WEIGHTS_FILE, SHARDED = "config.json", "model.safetensors", "sharded"
BUNDLED = Path(__file__).parent / "bundled"
LISTED = 8  # differences that an error names one by one
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not match its config."""


class CheckpointUnreadable(CheckpointError):
    """A file of a checkpoint is missing or cannot be read."""


@dataclass(frozen=True)
class Header:
    """What ``config.json`` of a checkpoint folder says.

    Attributes:
        model_type: which kind of model the weights are for, ``"looped_gpt"`` for the bundled one.
        model: the model's config as plain values; the builder of that kind checks them.
        trained: what is known of the training, empty where nothing is.
    """

    model_type: str
    model: dict[str, Any]
    trained: dict[str, Any] = field(default_factory=dict)


def read_header(folder: Path) -> Header:
    """The header of a checkpoint folder, before anybody has looked at its weights.

    Raises:
        CheckpointError: no ``config.json``, or one that is not a checkpoint's.
    """
    path = folder / CHECKPOINT_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} is not a checkpoint: it has no {CHECKPOINT_CONFIG}")
    where = f"{CHECKPOINT_CONFIG} in {str(folder)!r}"
    try:
        values = read_json(path, "the checkpoint's config", dict)
    except FileError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{where} is not a checkpoint's: it has no mapping 'model'")
    trained, model_type = values.get("trained", {}), values.get("model_type")
    if not isinstance(trained, dict):
        raise CheckpointError(f"{where}: 'trained' is not a mapping")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{where} is not a checkpoint's: it has no text 'model_type'")
    return Header(model_type, values["model"], trained)


def write_header(folder: Path, header: Header) -> None:
    """Write ``config.json`` into a checkpoint folder."""
    write_json(
        folder / CHECKPOINT_CONFIG,
        {"model_type": header.model_type, "model": header.model, "trained": header.trained},
    )


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint in a run folder: its ``final``, or else its newest snapshot; any other folder as it is."""
    if (folder / CHECKPOINT_CONFIG).is_file():
        return folder
    found = [*sorted(folder.glob(f"snapshots/*/{CHECKPOINT_CONFIG}")), *folder.glob(f"final/{CHECKPOINT_CONFIG}")]
    return found[-1].parent if found else folder


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with usual_mode(path):
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file as a dictionary.

    Raises:
        CheckpointUnreadable: the file is missing or is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointUnreadable(f"no {path.name} in {str(path.parent)!r}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointUnreadable(f"{path.name} in {str(path.parent)!r} cannot be read: {error}") from None


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, from its header alone.

    Raises:
        CheckpointUnreadable: the file is missing, is not safetensors, or is shorter than its header says.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointUnreadable(f"no {path.name} in {str(path.parent)!r}")
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointUnreadable(f"{path.name} in {str(path.parent)!r} cannot be read: {error}") from None


def weights_file(folder: Path) -> Path:
    """The weights of a checkpoint folder, as a file to read.

    Raises:
        CheckpointError: they are a pickle, or in shards.
    """
    refuse_pickles(folder)
    if (folder / SHARDED).is_dir() and not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{str(folder)!r} has its weights in shards, as FSDP wrote them: make a whole checkpoint of it with "
            f"'haltkit export {folder} --out DIR'"
        )
    return folder / WEIGHTS_FILE


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder.

    Raises:
        CheckpointError: as :func:`weights_file` and :func:`read_tensors`.
    """
    return read_tensors(weights_file(folder))


def check_names_and_shapes(own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Whether tensors found somewhere are those that the model has.

    Raises:
        CheckpointError: names or shapes differ; the differences are listed, at most the first eight.
    """
    problems = [f"missing {name}" for name in own if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in own]
    problems += [
        f"{name} is {found[name]}, the config says {own[name]}"
        for name in own
        if name in found and found[name] != own[name]
    ]
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(f"weights do not match the config: {'; '.join(problems[:LISTED])}{more}")


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are there as a pickle only: reading one can run any code.

    Raises:
        CheckpointError: it names the file.
    """
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles and not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{str(folder)!r} has its weights in {', '.join(pickles)}: a pickle can run code when it is read, so it is "
            f"refused. Ask for, or convert to, {WEIGHTS_FILE}"
        )
