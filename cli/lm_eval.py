"""``haltkit lm-eval``: the lm-evaluation-harness, which then knows the model ``haltkit``."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import typer


def lm_eval(context: typer.Context) -> None:
    """Run EleutherAI's lm-evaluation-harness with a halting policy: all arguments are the harness's own.

    haltkit lm-eval run --model haltkit --model_args pretrained=DIR,policy=norm:tau=0.2 --tasks arc_easy
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install 'haltkit[eval]'")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    importlib.import_module("lm_eval.models")  # registers the harness's own, which it does only while there are none
    if "haltkit" not in model_registry:
        model_registry.register("haltkit", target="haltkit.models.harness:ByPretrained")
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()
