"""The outputs of layers inside a loop, one for each time that a layer is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from haltkit.recording.trajectory import TrajectoryError

__all__ = ["LayerStates", "output_state", "record_layers", "watch_layers"]

LayerStates = dict[str, list[Tensor]]


def output_state(output: Any) -> Tensor | None:
    """The state in a layer's output: the output itself or the first entry of a tuple."""
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@contextmanager
def watch_layers(model: nn.Module, paths: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(path, state)`` at every call of the modules at these paths, in the order they run.

    Raises:
        TrajectoryError: an unknown path, or a module whose output contains no tensor.
    """

    def observe(path: str, output: Any) -> None:
        state = output_state(output)
        if state is None:
            raise TrajectoryError(f"{path!r} returns a {type(output).__name__}: name layers that return their state")
        see(path, state.detach())

    handles = []
    try:
        for path in paths:
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise TrajectoryError(f"no module {path!r} in {type(model).__name__}") from None
            handles.append(module.register_forward_hook(lambda _m, _a, out, path=path: observe(path, out)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_layers(model: nn.Module, paths: Sequence[str], max_bytes: int = 2**31) -> Iterator[LayerStates]:
    """Keep the outputs of every call of these modules: ``{path: [(..., D) at step 1, 2, ...]}``, on the CPU.

    Raises:
        TrajectoryError: the recording would exceed ``max_bytes``.
    """
    kept: LayerStates = {path: [] for path in paths}
    size = 0

    def keep(path: str, state: Tensor) -> None:
        nonlocal size
        size += state.nbytes
        if size > max_bytes:
            raise TrajectoryError(
                f"the layers' states would exceed {max_bytes / 2**20:.0f} MiB: shorter windows or fewer steps"
            )
        kept[path].append(state.to("cpu", copy=True))

    with watch_layers(model, paths, keep):
        yield kept
