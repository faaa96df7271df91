"""Descriptions of loops in public models, found by the model's class name; one model family a file."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from haltkit.attachment.errors import AttachError
from haltkit.attachment.presets import torchdeq

if TYPE_CHECKING:
    from torch import nn

    from haltkit.attachment.description import Loop
    from haltkit.attachment.native import HaltsItself
    from haltkit.protocol import Readout

__all__ = ["PRESETS", "preset_for"]

# Class name to the module here whose describe(model, name) gives the loop and a readout, if the model has one.
PRESETS = {
    "AlbertModel": "albert",
    "AlbertForMaskedLM": "albert",
    "AlbertForMultipleChoice": "albert",
    "AlbertForPreTraining": "albert",
    "AlbertForQuestionAnswering": "albert",
    "AlbertForSequenceClassification": "albert",
    "AlbertForTokenClassification": "albert",
    "HrmTextModel": "hrm_text",
    "HrmTextForCausalLM": "hrm_text",
    "TinyRecursiveModel": "tiny_recursive_model",
    "OpenMythos": "open_mythos",
    "RavenForCausalLM": "huginn",
    "LoopedGPT": "looped_gpt",
}


def preset_for(
    model: nn.Module, readout: Readout | None = None, regions: Collection[str] = ()
) -> tuple[Loop | dict[str, Loop] | HaltsItself, Readout | None]:
    """The description of a model of a known class, and its readout unless one is given.

    A model of any class that contains one of torchdeq's modules is known by that.

    Args:
        model: the model.
        readout: goes before the preset's.
        regions: which of the model's loops are wanted, where it has several; none asks for those that are halted if
            nothing is said.

    Returns:
        one loop, several by region, or how the model halts itself; and the readout.

    Raises:
        AttachError: the class is not known; how to describe its loop is said.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in PRESETS:
            module = importlib.import_module(f"haltkit.attachment.presets.{PRESETS[cls.__name__]}")
            try:
                described, found = module.describe(model)
                parts = module.regions(model) if hasattr(module, "regions") else {}
            except AttributeError as error:
                raise AttachError(
                    f"this {cls.__name__} is not the one that haltkit knows ({error}): describe its loop by body=[...]"
                ) from None
            if regions and all(name in parts for name in regions):
                described = {name: parts[name] for name in regions}
            return described, readout or found
    if torchdeq.find_deq(model) is not None:
        return torchdeq.describe(model)
    raise AttachError(
        f"there is no preset for {type(model).__name__}: describe its loop by body=[paths of the modules that one "
        "iteration calls], which haltkit.discover(model, run) proposes"
    )
