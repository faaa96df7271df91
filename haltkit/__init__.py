"""haltkit: halting policies for looped (recurrent-depth) models.

Names are loaded when they are first used, so that importing the package, and the command line's help, cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haltkit.attachment import Loop as Loop
    from haltkit.attachment import Session as Session
    from haltkit.attachment import attach as attach
    from haltkit.attachment import discover as discover
    from haltkit.loop import CompactBody as CompactBody
    from haltkit.loop import LoopBody as LoopBody
    from haltkit.loop import LoopObserver as LoopObserver
    from haltkit.loop import LoopResult as LoopResult
    from haltkit.loop import Outcome as Outcome
    from haltkit.loop import run_loop as run_loop
    from haltkit.offline import readout_of_recordings as readout_of_recordings
    from haltkit.offline import replay as replay
    from haltkit.protocol import HaltingPolicy as HaltingPolicy
    from haltkit.protocol import LoopStep as LoopStep
    from haltkit.protocol import Verdict as Verdict
    from haltkit.recorder import Record as Record
    from haltkit.recorder import Recorder as Recorder
    from haltkit.recorder import record as record
    from haltkit.registry import policy as policy
    from haltkit.trajectory import Trajectory as Trajectory
    from haltkit.trial import Trial as Trial
    from haltkit.trial import compare as compare

__version__ = "0.1.0"

_HOMES = {
    "haltkit.attachment": ("Loop", "Session", "attach", "discover"),
    "haltkit.loop": ("CompactBody", "LoopBody", "LoopObserver", "LoopResult", "Outcome", "run_loop"),
    "haltkit.protocol": ("HaltingPolicy", "LoopStep", "Verdict"),
    "haltkit.recorder": ("Record", "Recorder", "record"),
    "haltkit.registry": ("policy",),
    "haltkit.offline": ("readout_of_recordings", "replay"),
    "haltkit.trajectory": ("Trajectory",),
    "haltkit.trial": ("Trial", "compare"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'haltkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
