"""``python -m haltkit.cli``: the same as the ``haltkit`` command."""

from haltkit.cli.main import run

run()
