"""Weights of a learned policy: tensors that belong to the policy object and never to its moving state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

__all__ = ["Weights", "WeightsMisfit", "held_by", "is_weights"]


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightsMisfit(ValueError):
    """A policy whose weights cannot be applied to the states it is given."""


class Weights:
    """Named tensors, given to the rows on whatever device and in whatever dtype they are::

        @haltkit.register("learned", formula="sigmoid(w x)")
        @dataclass(frozen=True)
        class Learned:
            tau: float
            weights: haltkit.Weights = field(compare=False, repr=False)

            def update(self, state, step):
                w = self.weights.like(step.x)["w"]  # (D,)

    A spec writes them as ``weights=FILE``, the safetensors file that they were loaded from or saved to. Weights that
    are in no file cannot be written in a spec.

    Args:
        tensors: by name.
        source: the file that contains them, if any.

    Raises:
        ValueError: no tensors, an entry that is none, or a name that is no text; complex numbers, or floating-point
            ones of less than 16 bits.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str | None = None) -> None:
        named = isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
        if not tensors or not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("Weights need at least one tensor: give a mapping from names, which are texts, to tensors")
        for name, tensor in tensors.items():
            if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
                raise ValueError(
                    f"the weights {name!r} are {_plain(tensor.dtype)}: allowed are whole numbers, "
                    f"{', '.join(map(_plain, _FLOATS))}"
                )
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._moved: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        self.source = source

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Weights:
        """The weights in a safetensors file.

        Raises:
            ValueError: the file does not exist, is not safetensors, or holds what weights cannot be or is not finite.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise ValueError(f"no file {str(path)!r} with a policy's weights")
        try:
            found = cls(load_file(path), str(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"the weights in {str(path)!r} cannot be read: {error}") from None
        if not all(bool(tensor.isfinite().all()) for tensor in found.tensors.values()):
            raise ValueError(f"the weights in {str(path)!r} are not finite: a policy with them would never halt")
        return found

    def save(self, path: str | PathLike[str]) -> Weights:
        """Write a safetensors file, which appears whole or not at all.

        Returns:
            the same weights with that file as their source, so that a policy that has them prints as a spec.

        Raises:
            ValueError: the file cannot be written there.
        """
        from haltkit.files import atomic_path, check_output

        with atomic_path(check_output(Path(path))) as partial:
            partial.write_bytes(self._bytes())
        return Weights(self._tensors, str(path))

    @property
    def sha256(self) -> str:
        """SHA-256 of the file that :meth:`save` writes."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def _bytes(self) -> bytes:
        from safetensors.torch import save

        # Clones: safetensors refuses tensors that share memory.
        return save({name: tensor.cpu().contiguous().clone() for name, tensor in self._tensors.items()})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, as they were given."""
        return dict(self._tensors)

    @property
    def regions(self) -> list[str]:
        """The regions R of names ``R/NAME``, in order."""
        return sorted({name.rpartition("/")[0] for name in self._tensors})

    def like(self, x: Tensor) -> Mapping[str, Tensor]:
        """The tensors on the device of ``x``; floating-point ones in its dtype. Each is moved once."""
        key = (x.device, x.dtype)
        if key not in self._moved:
            with torch.inference_mode(False):  # kept for later calls, which may want gradients
                self._moved[key] = {
                    name: tensor.to(x.device, x.dtype if tensor.is_floating_point() else tensor.dtype)
                    for name, tensor in self._tensors.items()
                }
        return self._moved[key]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"Weights({shapes})"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_weights(hint: Any) -> bool:
    """Whether a field of this type holds weights; ``Weights | None`` may do without."""
    return hint is Weights or Weights in get_args(hint)


def held_by(policy: Any) -> list[Weights]:
    """The weights in a policy and in the policies that it wraps or combines."""
    found: list[Weights] = []
    for value in getattr(policy, "__dict__", {}).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Weights):
                found.append(part)
            elif hasattr(part, "update") and hasattr(part, "init"):
                found += held_by(part)
    return found
