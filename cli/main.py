"""The ``haltkit`` command: one file a command, each loaded when it is called.

Help must not need torch, so the command modules import it inside their functions.
"""

from __future__ import annotations

import sys

import typer
from haltkit.cli import compare, policies, prepare, train

app = typer.Typer(
    name="haltkit",
    help="Decide when a looped model has thought enough.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from haltkit import __version__

        print(f"haltkit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Decide when a looped model has thought enough."""


app.command("compare")(compare.compare)
app.command("policies")(policies.policies)
app.command("prepare")(prepare.prepare)
app.command("train")(train.train)


def run() -> None:
    """Console entry point: what a user got wrong is one line on standard error and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        # Every error that haltkit raises for bad input is a ValueError whose message is made to be read.
        # A traceback for anyone who wants it: python -X dev -m haltkit.cli ...
        if sys.flags.dev_mode:
            raise
        print(f"haltkit: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
