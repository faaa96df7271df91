"""A session that only observes: forward hooks see every state, and cannot change what the model computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import Tensor, nn

from haltkit.attachment.description import Loop, call_parts, find_module
from haltkit.attachment.errors import BodyOutsideScope
from haltkit.attachment.hooks import Hooks
from haltkit.attachment.session import NOTHING_RAN, Session, trajectory_of
from haltkit.attachment.tally import Tally
from haltkit.attachment.verify import NOTHING, ByRegion, Probe
from haltkit.attachment.watch import Watch, observed_result
from haltkit.loop import LoopObserver, LoopResult
from haltkit.recording.trajectory import Trajectory

__all__ = ["ObservingSession"]


class ObservingSession(Session):
    """Follows the loops of a foreign model, and halts nothing."""

    def __init__(self, model: nn.Module, loops: Mapping[str, Loop], observer: LoopObserver | None) -> None:
        """Nothing about the model is changed yet: :meth:`attach` does that."""
        self.model, self.loops, self.observer = model, dict(loops), observer
        self.regions = tuple(loops)
        self.policies, self.readouts = {}, {}
        self.tally = {name: Tally() for name in loops}
        self._newest: dict[str, tuple[Tensor, int]] = {}  # the last state, and how many iterations led there
        self._passing = False
        self._hooks = Hooks()
        self._watches = {name: Watch(name, loop, observer, partial(self._seen, name)) for name, loop in loops.items()}

    def attach(self) -> ObservingSession:
        """Register the hooks.

        Raises:
            UnknownModule: the model has no such module.
            ValueError: a loop whose scope or body is a method other than forward.
        """
        for loop in self.loops.values():
            for path in (loop.scope, *loop.body, *loop.reset_on):
                if call_parts(path)[1] != "forward":
                    raise ValueError(
                        f"{path!r} is a method, and hooks only see calls of forward. Observe with a policy that never "
                        "halts, such as fixed:steps=1000000, or name modules instead"
                    )
        try:
            for watch in self._watches.values():
                watch.hook(partial(find_module, self.model), self._hooks)
            return self
        except BaseException:
            self._hooks.remove()
            raise

    def _seen(self, name: str, x: Tensor, iterations: int) -> None:
        # The result is made when it is asked for: observing should cost next to nothing.
        if not self._passing:
            self._newest[name] = x, iterations
            self.tally[name].observed(iterations, x.shape[:-1].numel())

    def detach(self) -> None:
        try:
            self._hooks.remove()
        except BaseException:
            self._hooks.remove()
            raise

    @contextmanager
    def detached(self) -> Iterator[None]:
        before, self._passing = self._passing, True
        try:
            yield
        finally:
            self._passing = before

    def _check_ran(self) -> None:
        for name, watch in self._watches.items():
            if name not in self._newest and watch.returned:
                raise BodyOutsideScope(
                    f"{watch.loop.scope or 'the model'!r} was called {watch.returned} times and no hook saw "
                    f"{watch.loop.state_module!r} run in it. Code compiled before does not run hooks that came later: "
                    "attach first, or observe with a policy that never halts"
                )

    @property
    def _results(self) -> dict[str, LoopResult]:
        if not self._newest:
            raise ValueError(NOTHING_RAN)
        return {name: observed_result(*self._newest[name]) for name in self.regions if name in self._newest}

    @property
    def steps(self) -> dict[str, Tensor]:
        return {name: result.steps for name, result in self._results.items()}

    @property
    def outcome(self) -> dict[str, Tensor]:
        return {name: result.outcome for name, result in self._results.items()}

    @property
    def trajectory(self) -> Trajectory:
        return trajectory_of(self.observer)

    def _probe(
        self,
        policies: ByRegion,
        keep: tuple[int, ...] = (),
        disturb_before: Mapping[str, int] = NOTHING,
        state_only: bool = False,
    ) -> AbstractContextManager[Probe]:
        raise NotImplementedError("verify refuses a session without policies")
