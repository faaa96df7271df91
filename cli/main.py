"""The ``haltkit`` command: one file a command, each loaded when it is called.

Help must not need torch, so the command modules import it inside their functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from haltkit.cli import (
    bench,
    calibrate,
    card,
    compare,
    diagnose,
    doctor,
    eval,
    export,
    fit,
    generate,
    headroom,
    lm_eval,
    policies,
    prepare,
    report,
    solve,
    train,
    watch,
)
from haltkit.cli.terminal import starting

app = typer.Typer(
    name="haltkit",
    help="Decide when a looped model has thought enough.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from haltkit import __version__

        print(f"haltkit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    allow_code: bool = typer.Option(
        False, "--allow-code", help="Import code that files name: policies of cards, tasks of checkpoints and configs."
    ),
) -> None:
    """Decide when a looped model has thought enough."""
    if allow_code:
        from haltkit import trust

        context.with_resource(trust.allow_code())
    if context.invoked_subcommand is None:
        print(context.get_help())


COMMANDS: dict[str, Callable[..., None]] = {
    "bench": bench.bench,
    "calibrate": calibrate.calibrate,
    "card": card.card,
    "compare": compare.compare,
    "diagnose": diagnose.diagnose,
    "doctor": doctor.doctor,
    "eval": eval.evaluate,
    "export": export.export,
    "fit": fit.fit,
    "generate": generate.generate,
    "headroom": headroom.headroom,
    "lm-eval": lm_eval.lm_eval,
    "policies": policies.policies,
    "prepare": prepare.prepare,
    "report": report.report,
    "solve": solve.solve,
    "train": train.train,
    "watch": watch.watch,
}
# lm-eval reads its arguments itself, --help too.
SETTINGS = {"lm-eval": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}}
for name, command in COMMANDS.items():
    paragraphs = (command.__doc__ or "").split("\n\n")
    told = "\n\n".join(" ".join(one.split()) for one in paragraphs)  # else lines break in help where they do here
    app.command(name, help=told, context_settings=SETTINGS.get(name))(starting(command))


def run() -> None:
    """Console entry point: what a user got wrong is one line on standard error and exit code 2."""
    sys.path.append("")  # modules in the current folder are found: policies and models as pkg.mod:name
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # haltkit's own errors for bad input are ValueErrors whose messages are made to be read; a usage error of
        # the command line knows its message. Anything else is a defect, and its traceback is wanted; as it is
        # under python -X dev -m haltkit.cli ...
        message = getattr(error, "format_message", error.__str__)()
        # What attaching refuses is a RuntimeError, for it comes in the middle of a model's own run.
        refused = any(cls.__name__ == "AttachError" for cls in type(error).__mro__)
        known = refused or isinstance(error, (ValueError, OSError)) or hasattr(error, "format_message")
        if sys.flags.dev_mode or not known:
            raise
        print(f"haltkit: {' '.join(message.split())}", file=sys.stderr)
        code = 2
    sys.exit(code)
