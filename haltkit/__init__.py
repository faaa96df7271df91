"""haltkit: halting policies for looped (recurrent-depth) models.

Names are loaded when they are first used, so that importing the package, and the command line's help, cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haltkit.attachment import Loop as Loop
    from haltkit.attachment import LoopAround as LoopAround
    from haltkit.attachment import Session as Session
    from haltkit.attachment import discover as discover
    from haltkit.attachment.attach import attach as attach
    from haltkit.attachment.attach import verify as verify
    from haltkit.attachment.generating import generation as generation
    from haltkit.attachment.joining import QueueOutput as QueueOutput
    from haltkit.attachment.wavefront import wavefront as wavefront
    from haltkit.bodies import CompactBody as CompactBody
    from haltkit.bodies import FreezingBody as FreezingBody
    from haltkit.bodies import GuardedBody as GuardedBody
    from haltkit.bodies import LoopBody as LoopBody
    from haltkit.card import Card as Card
    from haltkit.comparison import Comparison as Comparison
    from haltkit.comparison import compare as compare
    from haltkit.kinds import Kinds as Kinds
    from haltkit.loop import LoopObserver as LoopObserver
    from haltkit.loop import LoopResult as LoopResult
    from haltkit.loop import Outcome as Outcome
    from haltkit.loop import run_loop as run_loop
    from haltkit.protocol import HaltingPolicy as HaltingPolicy
    from haltkit.protocol import Heads as Heads
    from haltkit.protocol import LoopStep as LoopStep
    from haltkit.protocol import Verdict as Verdict
    from haltkit.queue import run_queue as run_queue
    from haltkit.recording.recorder import Record as Record
    from haltkit.recording.recorder import Recorder as Recorder
    from haltkit.recording.recorder import record as record
    from haltkit.recording.replay import readout_of_recordings as readout_of_recordings
    from haltkit.recording.replay import replay as replay
    from haltkit.recording.trajectory import Trajectory as Trajectory
    from haltkit.registry import register as register
    from haltkit.setting import Depth as Depth
    from haltkit.setting import Setting as Setting
    from haltkit.slots import QueueItem as QueueItem
    from haltkit.slots import QueueResult as QueueResult
    from haltkit.slots import SlotBody as SlotBody
    from haltkit.specs import policy as policy
    from haltkit.subject import Subject as Subject
    from haltkit.trust import allow_code as allow_code
    from haltkit.watching import watch as watch
    from haltkit.weights import Weights as Weights

__version__ = "0.1.0"

_HOMES = {
    "haltkit.attachment": ("Loop", "LoopAround", "Session", "discover"),
    "haltkit.attachment.attach": ("attach", "verify"),
    "haltkit.attachment.generating": ("generation",),
    "haltkit.attachment.joining": ("QueueOutput",),
    "haltkit.attachment.wavefront": ("wavefront",),
    "haltkit.bodies": ("CompactBody", "FreezingBody", "GuardedBody", "LoopBody"),
    "haltkit.card": ("Card",),
    "haltkit.kinds": ("Kinds",),
    "haltkit.loop": ("LoopObserver", "LoopResult", "Outcome", "run_loop"),
    "haltkit.protocol": ("HaltingPolicy", "Heads", "LoopStep", "Verdict"),
    "haltkit.recording.recorder": ("Record", "Recorder", "record"),
    "haltkit.comparison": ("Comparison", "compare"),
    "haltkit.registry": ("register",),
    "haltkit.setting": ("Depth", "Setting"),
    "haltkit.specs": ("policy",),
    "haltkit.subject": ("Subject",),
    "haltkit.trust": ("allow_code",),
    "haltkit.watching": ("watch",),
    "haltkit.weights": ("Weights",),
    "haltkit.recording.replay": ("readout_of_recordings", "replay"),
    "haltkit.recording.trajectory": ("Trajectory",),
    "haltkit.queue": ("run_queue",),
    "haltkit.slots": ("QueueItem", "QueueResult", "SlotBody"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'haltkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
