"""Weights and moments that FSDP has sharded: written by all processes, read by any number of them.

torch.distributed.checkpoint does both, in safetensors. It reads whatever files are there and leaves what none of them
holds as it was, so a checkpoint's ``progress.json`` lists the files and :func:`check_shards` looks at them first.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.weights import SHARDED, CheckpointUnreadable, check_names_and_shapes

__all__ = ["check_shards", "like", "load_sharded", "read_shards", "save_shards", "stored_shapes"]


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment as its parameter is: on its device, sharded as it is. The count of steps is one number everywhere."""
    value = value.to(parameter.device)
    if type(parameter.data) is Tensor or not value.ndim:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def load_sharded(model: LoopedGPT, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(like(parameter, weights[name]))


def save_shards(folder: Path, model: LoopedGPT, state: Mapping[str, Tensor]) -> None:
    """Collective: each process writes its part.

    Raises:
        OSError: one of them could not; every process raises it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    tensors = {f"model/{name}": weight.detach() for name, weight in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": value.reshape(1) if not value.ndim else value for name, value in state.items()}
    try:
        save_distributed(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise _first_failure(error) from None


def _first_failure(error: Any) -> BaseException:
    """What went wrong in the first process where something did."""
    failures: dict[int, tuple[BaseException, Any]] = error.failures
    return failures[min(failures)][0]


def check_shards(folder: Path, sizes: Mapping[str, int]) -> None:
    """Whether the shards that were written are there, whole as far as their length tells.

    Raises:
        CheckpointUnreadable: it names the file.
    """
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointUnreadable(f"no {name} in {str(folder)!r}")
        if path.stat().st_size != size:
            raise CheckpointUnreadable(
                f"{name} in {str(folder)!r} cannot be read: it ends at byte {path.stat().st_size:,}, it should at "
                f"{size:,}"
            )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder of shards, from the files' headers alone.

    Raises:
        CheckpointUnreadable: a file is damaged.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointUnreadable(f"{folder.name} in {str(folder.parent)!r} cannot be read: {error}") from None
    return {name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def read_shards(
    model: LoopedGPT, path: Path, alone: bool, moments: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read what FSDP wrote, each process its part under FSDP again, the whole otherwise."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

    folder = path / SHARDED
    try:
        found = stored_shapes(folder)
        tensors: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            tensors[f"model/{name}"] = torch.zeros_like(parameter.detach())
            for key in ("exp_avg", "exp_avg_sq", "step") if moments else ():
                if (full := f"optimizer/{name}/{key}") in found:
                    tensors[full] = torch.zeros(1) if key == "step" else torch.zeros_like(parameter.detach())
        own = {name: tuple(t.shape) for name, t in tensors.items()}
        check_names_and_shapes(own, {name: found[name] for name in found if moments or name.startswith("model/")})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: that is meant
            load_distributed(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (OSError, KeyError, SafetensorError, CheckpointException) as error:
        cause = _first_failure(error) if isinstance(error, CheckpointException) else error
        raise CheckpointUnreadable(f"{SHARDED} in {str(path)!r} cannot be read: {cause}") from None
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    state = {
        name.removeprefix("optimizer/"): t[0] if name.endswith("/step") else t
        for name, t in tensors.items()
        if name.startswith("optimizer/")
    }
    return weights, state
