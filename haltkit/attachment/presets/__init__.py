"""Descriptions of loops in public models, found by the model's class name; one model family a file."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from haltkit.attachment.errors import AttachError
from haltkit.attachment.presets import torchdeq
from haltkit.attachment.regions import ONE

if TYPE_CHECKING:
    from torch import nn

    from haltkit.attachment.description import Loop
    from haltkit.attachment.native import HaltsItself
    from haltkit.protocol import Readout

__all__ = ["PRESETS", "loops_by_name", "preset_for"]

# Class name to the module here whose describe(model, name) gives the loop and a readout, if the model has one.
PRESETS = {
    "AlbertModel": "albert",
    "AlbertForMaskedLM": "albert",
    "AlbertForMultipleChoice": "albert",
    "AlbertForPreTraining": "albert",
    "AlbertForQuestionAnswering": "albert",
    "AlbertForSequenceClassification": "albert",
    "AlbertForTokenClassification": "albert",
    "HRM": "hrm_pytorch",
    "HrmTextModel": "hrm_text",
    "HrmTextForCausalLM": "hrm_text",
    "TinyRecursiveModel": "tiny_recursive_model",
    "OpenMythos": "open_mythos",
    "OuroModel": "ouro",
    "OuroForCausalLM": "ouro",
    "RavenForCausalLM": "huginn",
    "LoopedGPT": "looped_gpt",
}


def preset_for(
    model: nn.Module, readout: Readout | None = None
) -> tuple[Loop | dict[str, Loop] | HaltsItself, Readout | None]:
    """The description of a model of a known class, and its readout unless one is given.

    A model of any class that contains one of torchdeq's modules is known by that.

    Args:
        model: the model.
        readout: goes before the preset's.

    Returns:
        one loop, several by region, or how the model halts itself; and the readout.

    Raises:
        AttachError: the class is not known; how to describe its loop is said.
    """
    module = _module_for(model)
    if module is not None:
        with _as_known(model):
            described, found = module.describe(model)
        return described, readout or found
    if torchdeq.find_deq(model) is not None:
        return torchdeq.describe(model)
    raise AttachError(
        f"there is no preset for {type(model).__name__}: describe its loop by body=[paths of the modules that one "
        "iteration calls], which haltkit.discover(model, run) proposes"
    )


def loops_by_name(model: nn.Module, names: Collection[str]) -> tuple[dict[str, Loop], dict[str, Readout]] | None:
    """Loops inside each other that a preset knows by name, of which some are asked for, and the readouts of these.

    None where the preset has no such names, or ``names`` are those of :func:`preset_for`.

    Raises:
        ValueError: the preset has names, and these are others; they are listed.
    """
    module = _module_for(model)
    if not names or not hasattr(module, "regions"):
        return None
    with _as_known(model):
        known: dict[str, tuple[Loop, Readout | None]] = module.regions(model)
    if set(names) == {ONE}:
        return None
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"no region {', '.join(unknown)} in a {type(model).__name__}: its loops are {', '.join(known)}. Give each "
            f"of those that are to halt a policy, as in '{next(iter(known))}=SPEC', or one policy without a name "
            "for the outer loop"
        )
    readouts = {name: known[name][1] for name in names}
    return {name: known[name][0] for name in names}, {name: r for name, r in readouts.items() if r is not None}


def _module_for(model: nn.Module) -> Any:
    """The module here that knows a model's class; None: none does."""
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__name__ in PRESETS]
    return importlib.import_module(f"haltkit.attachment.presets.{PRESETS[names[0]]}") if names else None


@contextmanager
def _as_known(model: nn.Module) -> Iterator[None]:
    """While a preset looks at a model: the class may have the name of a known one alone.

    Raises:
        AttachError: it has.
    """
    try:
        yield
    except AttributeError as error:
        raise AttachError(
            f"this {type(model).__name__} is not the one that haltkit knows ({error}): describe its loop by body=[...]"
        ) from None
