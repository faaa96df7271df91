"""The command line of haltkit; see :mod:`haltkit.cli.main`."""
