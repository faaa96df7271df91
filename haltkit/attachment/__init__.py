"""Halting the loops inside a foreign model, from outside."""

from haltkit.attachment.around import LoopAround
from haltkit.attachment.attach import attach, verify
from haltkit.attachment.candidate import Discovery
from haltkit.attachment.description import Loop
from haltkit.attachment.discovery import discover
from haltkit.attachment.session import Session
from haltkit.attachment.verify import Report

__all__ = ["Discovery", "Loop", "LoopAround", "Report", "Session", "attach", "discover", "verify"]
