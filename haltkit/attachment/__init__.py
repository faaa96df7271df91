"""Halting the loop inside somebody else's model, from outside."""

from haltkit.attachment.description import Loop
from haltkit.attachment.discovery import Discovery, discover
from haltkit.attachment.session import Session, attach
from haltkit.attachment.verify import Report

__all__ = ["Discovery", "Loop", "Report", "Session", "attach", "discover"]
