"""The newest loop's states, kept by reference: a trajectory for nothing, where it is small and nobody wrote over it."""

from __future__ import annotations

from torch import Tensor

from haltkit.recording.recorder import Recorder
from haltkit.recording.trajectory import RegionTrajectory

__all__ = ["MAX_BYTES", "Kept"]

MAX_BYTES = 64 * 2**20


class Kept:
    """Observes one loop. Nothing is copied until :attr:`trajectory` is asked for."""

    def __init__(self) -> None:
        self._name = ""
        self._states: list[tuple[Tensor, int]] = []
        self._bytes = 0
        self._lost = ""
        self._end: tuple[Tensor, Tensor] | None = None

    def begin(self, name: str, x0: Tensor) -> None:
        self._name = name
        self._keep(x0)

    def step(self, name: str, k: int, x: Tensor) -> None:
        self._keep(x)

    def end(self, name: str, steps: Tensor, outcome: Tensor) -> None:
        self._end = steps, outcome

    def _keep(self, x: Tensor) -> None:
        if self._lost:
            return
        self._bytes += x.nbytes
        if x.is_inference():
            self._lost = "whether states were overwritten cannot be told under inference_mode"
        elif self._bytes > MAX_BYTES:
            self._lost = f"its states take more than {MAX_BYTES // 2**20} MiB"
        if self._lost:
            self._states = []
        else:
            self._states.append((x, x._version))

    @property
    def trajectory(self) -> RegionTrajectory:
        """The loop's trajectory.

        Raises:
            ValueError: it was too large to keep, or the model has written over a state since.
        """
        lost = self._lost
        if any(x._version != version for x, version in self._states):
            lost = "the model wrote over a state after it was computed"
        if lost or self._end is None:
            raise ValueError(
                f"the newest loop was not kept: {lost or 'it did not end'}. attach(..., observer=haltkit.Recorder()) "
                "records copies"
            )
        recorder = Recorder()
        recorder.begin(self._name, self._states[0][0])
        for k, (x, _) in enumerate(self._states[1:], 1):
            recorder.step(self._name, k, x)
        recorder.end(self._name, *self._end)
        return recorder.trajectory[self._name]
