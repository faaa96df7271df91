"""A model whose weights are laid out for products with a few rows, on a CPU.

A product of a weight with 2 to 8 rows takes 2 to 5 times as long as with one, though it reads the weight once: the
general kernels pack the weight anew in every call. oneDNN, which PyTorch's compiler uses for frozen weights, packs it
once and takes about half of that time. The results differ from the general kernels' by rounding.
"""

from __future__ import annotations

from copy import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

__all__ = ["can_pack", "packed"]

M = TypeVar("M", bound=nn.Module)
ROWS = 8  # the layout serves other numbers of rows too; this one is best


def can_pack(weight: Tensor) -> bool:
    """Whether a weight can be packed here: float32 on a CPU, in a build of PyTorch that has oneDNN's operators."""
    operators = torch.ops.mkldnn
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and bool(cast(Any, torch.backends.mkldnn).is_available())
        and hasattr(operators, "_reorder_linear_weight")
        and hasattr(operators, "_linear_pointwise")
    )


class _Packed(nn.Module):
    """A linear layer of a packed weight, without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.width, self.bias = weight.shape[0], bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return cast(Tensor, y)


@torch.no_grad()
def packed(model: M) -> M:
    """The model with packed weights for inference: a twin that shares everything else; itself where none can be packed.

    The twin keeps the weights that it was made of: make another one after they have changed.
    """
    head = getattr(model, "wte", None)
    if model.training or not isinstance(head, nn.Embedding) or not can_pack(head.weight):
        return model
    twin = _twin(model)
    tied, norm = _Packed(head.weight, None), cast(Any, model).norm_f
    twin.__dict__["readout"] = lambda x: tied(norm(x))
    return twin


def _twin(module: M) -> M:
    """A copy whose linear layers are packed; parameters and buffers are shared."""
    twin = copy(module)
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        if type(child) is nn.Linear and can_pack(child.weight):
            children[name] = _Packed(child.weight, child.bias)
        else:
            children[name] = None if child is None else _twin(child)
    twin.__dict__["_modules"] = children
    return twin
