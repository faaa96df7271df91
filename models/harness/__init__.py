"""The lm-evaluation-harness with a halting policy: the model ``haltkit`` of ``lm-eval``.

``lm-eval run --model haltkit --model_args pretrained=DIR,policy=norm:tau=0.2,max_steps=32 --tasks ...`` runs the
harness itself, with its own scoring. Versions of lm-eval after 0.4.13 find the class by haltkit's entry point in the
group ``lm_eval.models``; ``haltkit lm-eval run ...`` works with all of them. Which class runs the model depends on what
``pretrained`` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import simple_parse_args_string

__all__ = ["ByPretrained"]


class ByPretrained(LM):
    """Makes the model that ``pretrained`` names, as the harness asks a class of models to; it has no own instances."""

    @classmethod
    def create_from_arg_obj(cls, arguments: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Any:
        """A looped text model of haltkit (``text``, or its checkpoint folder), or else a model of transformers."""
        from haltkit.models.harness.own import LoopedLM, own_folder

        given = {**arguments, **{name: value for name, value in (more or {}).items() if value is not None}}
        folder = own_folder(given.get("pretrained"))
        if folder is not None:
            return LoopedLM(**{**given, "pretrained": folder})
        from haltkit.models.harness.foreign import HaltedLM

        return HaltedLM(**given)

    @classmethod
    def create_from_arg_string(cls, arguments: str, more: Mapping[str, Any] | None = None) -> Any:
        """The same from ``name=value,name=value``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arguments), more)
