"""``haltkit solve``: give a bundled reasoner a problem, and see how many steps it takes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haltkit.cli.options import MOST_STEPS, JsonPath, WithoutCertificate, check_waiver, read_policies
from haltkit.cli.subjects import reasoner
from haltkit.cli.terminal import check_writable, make_console, progress, say_standing, write_results

if TYPE_CHECKING:
    from rich.console import Console

    from haltkit.models.reasoner.solving import Solved
    from haltkit.models.reasoner.task import Problem, Task

CARD = "halting.yaml"  # the policy chosen for the weights beside it
FRAME_SECONDS = 0.25  # --watch shows a step for so long


def solve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="sudoku, chase, or the folder of a reasoner of yours.")],
    problem: Annotated[
        str,
        typer.Argument(
            metavar="PROBLEM",
            help="A board ('1....6...', . for an empty cell), a forest ('a>b b>c c a?'), a file of them, or - for "
            "standard input.",
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            help="A spec, or the path of a saved choice. \\[default: the one beside the model's weights]",
            show_default=False,
        ),
    ] = None,
    without_certificate: WithoutCertificate = False,
    max_loops: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_STEPS,
            help="Most steps per row. \\[default: 48 for chase, 28 for sudoku]",
            show_default=False,
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Boards that run at a time.")] = 64,
    watch: Annotated[bool, typer.Option("--watch", help="Show the answers after every step.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Solve a problem, or many: print the answers and the steps they took.

    Of a file, each line is a problem; boards may also be written as blocks with blank lines between them.
    """
    json_path = check_writable(json_path)
    from haltkit.models.reasoner.solving import solve as solve_all
    from haltkit.models.reasoner.solving import watch as watch_one

    with progress("loading the model"):
        folder, checkpoint = reasoner(model, "solve")
    if policy is None and not (folder / CARD).is_file():
        raise ValueError(f"{model!r} has no policy beside its weights: give --policy, for instance norm:tau=0.1")
    spec = str(folder / CARD) if policy is None else policy
    check_waiver(without_certificate, [spec])
    budget = checkpoint.task.full_depth if max_loops is None else max_loops
    regions = list(checkpoint.model.regions)
    policies, standing = read_policies(spec, checkpoint.model, regions, budget, without_certificate)
    (chosen,) = policies.values()
    problems = _read(checkpoint.task, problem)
    if watch and (len(problems) > 1 or json_path == Path("-")):
        raise ValueError("--watch shows one problem, on the terminal: give one problem, without --json -")
    console = make_console(json_path)
    for one in problems:
        if one.note:
            print(f"haltkit: {one.note}", file=sys.stderr)
    if watch:
        with _frames(console, problems[0]) as show:
            solved = [watch_one(checkpoint, problems[0], chosen, show, max_loops=budget)]
    else:
        solved = []
        with progress("solving") as tick:
            for found in solve_all(checkpoint, problems, chosen, max_loops=budget, slots=slots):
                solved.append(found)
                tick(completed=len(solved), total=len(problems))
    whole = checkpoint.task.granularity == "sequence"
    _print(console, solved, whole)
    say_standing(console, spec, standing)
    write_results(console, json_path, [{**_values(one, whole), "standing": str(standing)} for one in solved])


def _read(task: Task, given: str) -> list[Problem]:
    """The problems that were given as text, in a file or on standard input; one that cannot be read is named."""
    if given == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("PROBLEM -: standard input is a terminal; pipe problems into it")
        text = sys.stdin.read()
    else:
        text = _text_of(given)
    parts = task.split(text)
    if not parts:
        raise ValueError("PROBLEM is empty")
    problems = []
    for number, part in enumerate(parts, 1):
        try:
            problems.append(task.read(part))
        except ValueError as error:
            raise ValueError(f"problem {number}: {error}" if len(parts) > 1 else str(error)) from None
    return problems


def _text_of(given: str) -> str:
    """The text in a file of this name, or what was given where it is no name of a file."""
    path = Path(given)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        named = path.exists() or path.suffix == ".txt" or os.sep in given
    except UnicodeDecodeError:
        raise ValueError(f"{given!r} is not text") from None
    except (OSError, ValueError):  # too long for a name, or a zero byte
        return given
    if named and given and not set(given) & set(" >\n"):
        raise ValueError(f"{given!r} is not a regular file" if path.exists() else f"there is no file {given!r}")
    return given


@contextmanager
def _frames(console: Console, problem: Problem) -> Iterator[Callable[[int, tuple[int, ...]], None]]:
    """Show the answers after every step in one place; what the last step changed stands out."""
    from rich.live import Live
    from rich.text import Text

    before: tuple[int, ...] = ()
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(k: int, answers: tuple[int, ...]) -> None:
            nonlocal before
            changed = sum(a != b for a, b in zip(answers, before, strict=True)) if before else len(answers)
            before = answers
            live.update(Text(f"step {k}, {changed} answers changed\n{problem.show(answers)}"), refresh=True)
            if console.is_terminal:
                time.sleep(FRAME_SECONDS)

        yield show


def _print(console: Console, solved: Sequence[Solved], whole: bool) -> None:
    from haltkit.loop import Outcome

    for one in solved:
        console.print(one.show(), markup=False, highlight=False)
        judged = "right" if one.right else "not right"
        end = f"{judged}, {one.steps[0]} steps" if whole else judged
        if Outcome.BUDGET in one.outcome:
            end += ", some not settled within --max-loops" if not whole else ", not settled within --max-loops"
        console.print(end + "\n" * (len(solved) > 1), highlight=False)
    if len(solved) > 1:
        steps = [step for one in solved for step in one.steps]
        right = sum(one.right for one in solved)
        console.print(
            f"{right} of {len(solved)} right, {sum(steps) / len(steps):.1f} steps on average", highlight=False
        )


def _values(one: Solved, whole: bool) -> dict[str, Any]:
    steps, outcome = list(one.steps), [end.name for end in one.outcome]
    return {
        "answer": one.problem.show(one.answers),
        "right": one.right,
        "steps": steps[0] if whole else steps,
        "outcome": outcome[0] if whole else outcome,
    }
