"""Diagnose a model: all surveys, with the controls that tell what is training's, judged against the papers' claims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from haltkit.comparison import Comparison
from haltkit.diagnostics.claims import judge
from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.plan import Plan, check_subject, run_plan
from haltkit.diagnostics.results import Cell, Control, Snapshot, Survey
from haltkit.diagnostics.stages import stage_numbers
from haltkit.diagnostics.unfolding import Unfolding
from haltkit.subject import Subject

__all__ = ["Progress", "diagnose"]


@dataclass(frozen=True)
class Progress:
    """What a diagnosis is at: ``done`` of ``total`` windows, snapshots or blocks; the total is None if unknown."""

    what: str
    done: int
    total: int | None


def diagnose(
    subject: Subject,
    inputs: Tensor,
    plan: Plan | None = None,
    *,
    untrained: Subject | None = None,
    snapshots: Iterable[Snapshot | Callable[[], Snapshot]] = (),
    control: Control | Callable[[], Control] | None = None,
    grid: Iterable[Cell] = (),
    unfolding: Callable[[], Unfolding] | None = None,
    comparison: Comparison | None = None,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_part: Callable[[Diagnosis], None] | None = None,
) -> Diagnosis:
    """Find out what there is to find out about a model's loops, and judge the papers' claims on it.

    Ctrl-C ends the run early: everything that is done is returned, and the diagnosis is marked ``partial``.

    Args:
        subject: the model.
        inputs: windows of text ``(N, T)``, or whatever the subject takes row by row.
        plan: how much of each survey.
        untrained: the same shape with fresh weights: what a finding must differ from to be training's.
        snapshots: the model across its training, measured already or by a call.
        control: the attention of a model without loops, for stages of inference; measured already or by a call.
        grid: untrained blocks, run one by one as they are asked for.
        unfolding: makes the answers of one problem, step by step, for the page.
        comparison: of policies, made beforehand.
        about: what is known of the model, plain values; ``tokens_seen`` is how long it was trained.
        on_progress: told after each window, snapshot and block.
        on_part: given the diagnosis so far whenever something was added to it, to be saved; its claims are not judged.

    Raises:
        DiagnosticError: inputs without windows, or a question that this model cannot be asked.
    """
    plan = plan or Plan()
    check_subject(subject, inputs)
    run = _Run(
        Diagnosis(about={"model": subject.name, **(about or {})}, comparison=comparison, partial=True),
        on_progress or (lambda progress: None),
        on_part or (lambda diagnosis: None),
    )
    try:
        whole = run.surveys({"trained": subject, "untrained": untrained}, inputs, plan)
        if whole and unfolding is not None:
            run.add(trained=run.found.trained.with_part("unfolding", unfolding()))
        if whole:
            run.snapshots(snapshots)
            run.stages(control)
            run.grid(grid)
    except KeyboardInterrupt:
        whole = False
    found = replace(run.found, partial=not whole)
    return replace(found, claims=judge(found))


class _Run:
    """One diagnosis in the making."""

    def __init__(
        self, found: Diagnosis, on_progress: Callable[[Progress], None], on_part: Callable[[Diagnosis], None]
    ) -> None:
        self.found, self.on_progress, self.on_part = found, on_progress, on_part
        self.ticks = 0

    def add(self, **changes: Any) -> None:
        self.found = replace(self.found, **changes)
        self.on_part(self.found)

    def surveys(self, subjects: Mapping[str, Subject | None], inputs: Tensor, plan: Plan) -> bool:
        """Every survey of every model; False if one was cut short."""
        present = {name: subject for name, subject in subjects.items() if subject is not None}
        total = plan.ticks(inputs) * len(present)
        doing = "geometry of trained"

        def tick() -> None:
            self.ticks += 1
            self.on_progress(Progress(doing, self.ticks, total))

        running = {
            name: run_plan(subject, inputs, plan, tick, tokens=name == "trained") for name, subject in present.items()
        }
        # Part by part, all models: an early end leaves every part that is there with its control.
        while running:
            for name, parts in list(running.items()):
                step = next(parts, None)
                if step is None:
                    del running[name]
                    continue
                part, found = step
                doing = f"{part} of {name}"
                self.on_progress(Progress(doing, self.ticks, total))
                survey: Survey = getattr(self.found, name)
                self.add(**{name: survey.with_part(part, found)})
                if getattr(found, "partial", False):
                    return False
        return True

    def snapshots(self, snapshots: Iterable[Snapshot | Callable[[], Snapshot]]) -> None:
        total = len(snapshots) if isinstance(snapshots, Sized) else None
        for done, one in enumerate(snapshots):
            self.on_progress(Progress("snapshots", done, total))
            self.add(snapshots=(*self.found.snapshots, one if isinstance(one, Snapshot) else one()))

    def stages(self, control: Control | Callable[[], Control] | None) -> None:
        if control is None:
            return
        self.on_progress(Progress("control", 0, None))
        found = control if isinstance(control, Control) else control()
        models = {
            name: survey.with_part("stages", stage_numbers(survey.attention.regions, found.profiles))
            for name, survey in self.found.models.items()
        }
        self.add(control=found, **models)

    def grid(self, grid: Iterable[Cell]) -> None:
        total = len(grid) if isinstance(grid, Sized) else None
        for done, cell in enumerate(grid, 1):
            self.add(grid=(*self.found.grid, cell))
            self.on_progress(Progress("untrained blocks", done, total))
