"""Which model something was measured on: its structure, its weights, their dtype and its full depth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

__all__ = ["Identity", "SaysItsFunction"]

# Of a transformers config: what was written where and when, the dtype that is known already, and what a call returns.
_VOLATILE = {"architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict"}
_VOLATILE |= {"output_hidden_states", "output_attentions"}


@runtime_checkable
class SaysItsFunction(Protocol):
    """A model whose function depends on more than its class and its weights."""

    @property
    def function_config(self) -> Mapping[str, Any]:
        """What else makes it the function that it is, such as the number of heads: plain values."""
        ...


@dataclass(frozen=True)
class Identity:
    """A model as it is told from others.

    Attributes:
        structure: SHA-256 of the class' name, of the names and shapes of all parameters and persistent buffers, and of
            the config: :attr:`SaysItsFunction.function_config`, or that of a transformers model.
        weights: SHA-256 of their values, wherever they are.
        dtype: those of the values, sorted, such as ``float32``.
        full_depth: steps of full depth, the budget of a policy in each region.
    """

    structure: str
    weights: str
    dtype: str
    full_depth: int

    @classmethod
    def of(cls, model: nn.Module, full_depth: int) -> Identity:
        """The identity of a model that is run to this depth; it reads every weight once."""
        tensors = sorted(model.state_dict().items())
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
        structure = hashlib.sha256(repr((type(model).__name__, shapes, _config(model))).encode())
        weights = hashlib.sha256()
        for name, tensor in tensors:
            plain = tensor.detach().cpu().contiguous().flatten()
            weights.update(name.encode())
            weights.update(plain.view(torch.uint8).numpy().tobytes())
        dtypes = {str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors}
        return cls(structure.hexdigest(), weights.hexdigest(), ", ".join(sorted(dtypes)), full_depth)

    def differences(self, other: Identity) -> list[str]:
        """What another model has different, in words; empty for the same model. A depth of 0 is not known."""
        found = []
        if self.structure != other.structure:
            found.append("another structure or config")
        if self.dtype != other.dtype:
            found.append(f"dtype {other.dtype} instead of {self.dtype}")
        elif self.structure == other.structure and self.weights != other.weights:
            found.append("other weights")
        if 0 not in (self.full_depth, other.full_depth) and self.full_depth != other.full_depth:
            found.append(f"full depth {other.full_depth} instead of {self.full_depth}")
        return found

    def fields(self) -> dict[str, Any]:
        """As plain values; :meth:`of_fields` gives it back."""
        return asdict(self)

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Identity:
        """The identity that :meth:`fields` wrote.

        Raises:
            ValueError: fields missing or unknown, or of a wrong type.
        """
        kinds = {"structure": str, "weights": str, "dtype": str, "full_depth": int}
        if set(fields) != set(kinds) or not all(type(fields[name]) is kind for name, kind in kinds.items()):
            raise ValueError(f"an identity has {', '.join(kinds)}, the last a whole number and the others text")
        return cls(**fields)


def _config(model: nn.Module) -> str:
    """What the model says of itself, as JSON with sorted keys; that of an empty mapping where it says nothing."""
    if isinstance(model, SaysItsFunction):
        found: Any = model.function_config
    else:
        to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
        found = to_dict()
    return json.dumps(_lasting(found), sort_keys=True, default=lambda value: type(value).__name__)


def _lasting(value: Any) -> Any:
    """Plain values without the keys of configs that change while the function stays."""
    if isinstance(value, Mapping):
        kept = {str(key): _lasting(one) for key, one in value.items()}
        return {key: one for key, one in kept.items() if key not in _VOLATILE and not key.startswith("_")}
    return [_lasting(one) for one in value] if isinstance(value, (list, tuple)) else value
