"""What can be wrong with a question about a loop."""

from __future__ import annotations

__all__ = ["DiagnosticError"]


class DiagnosticError(ValueError):
    """A model or recording that the question cannot be asked of; the message says why and what would do."""
