"""Run a model a few times and propose the description of its loop."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.around import LoopAround
from haltkit.attachment.attach import attach, verify
from haltkit.attachment.calls import Calls
from haltkit.attachment.candidate import Candidate, Discovery, Ending, Flag
from haltkit.attachment.dataflow import Reads
from haltkit.attachment.description import Action, call_parts, check_model, find_module
from haltkit.attachment.errors import AttachError, GlueDrift, VaryingInput
from haltkit.attachment.exits import exit_heads
from haltkit.attachment.leaf import Leaf, leaves, parts
from haltkit.attachment.outputs import first_tensor, largest, tensors_in
from haltkit.attachment.verify import ROUNDING, Report

__all__ = ["discover"]

MOST = 24  # outputs that are disturbed, one run each, to see what reads them
STATES = 3  # of those that the next iteration reads, how many are tried as the state


def discover(model: nn.Module, run: Callable[[], Any], run_at: Callable[[Any], Any] | None = None) -> Discovery:
    """Propose how to attach to a model, from a few runs of it.

    Modules that are called more than once in one call of the model are grouped under the module that calls them; those
    that a repeated module calls inside itself are not listed. Then one output after the other is disturbed, to see
    which of them the next iteration reads: that is the state. Last, a halt is tried. Where the model goes on changing
    something outside of its modules, the loop is looked for among the methods that the looping module calls. Where
    ``run`` itself loops around the model, because each call is given numbers that the one before returned, the
    description is one of :class:`haltkit.LoopAround`, and the call to copy makes it. The
    proposal is a starting point, and :func:`~haltkit.attachment.attach.verify` with ``run_at`` tells whether it is
    right: what runs do not show has to be added, such as ``on_halt`` for what the model sums up beside the loop. Where
    the model seems to have an exit head, by a guess at names, how to halt by it is said.

    Args:
        model: any module.
        run: calls the model on some input; called up to some 40 times for each loop, and must be deterministic.
        run_at: called with a number of steps: runs the model on the same input with that many. The halt that is tried
            is then compared with it.

    Raises:
        AttachError: no module is called more than once in one call of the model, and ``run`` does not loop around it.
        ValueError: no model, or one that computes something else in each run.
    """
    check_model(model)
    seen = Calls(model)
    seen.watch(run)
    inside = [c for candidate in _found(seen) for c in _proposed(model, candidate, run, run_at)]
    around = []
    if seen.roots > 1 or not (seen.roots or any(c.holds for c in inside)):
        around = _around(model, run, run_at, bool(inside))
    outer_first = any(c.holds for c in around) or not any(c.holds for c in inside)
    found = [*around, *inside] if outer_first else [*inside, *around]
    if not found and seen.roots > 1:
        raise AttachError(
            f"run calls the whole model {seen.roots} times, nothing repeats within one call, and no call is given "
            "numbers that the one before returned: calls side by side, or tokens chosen one after the other, are no "
            "loop around the model. Where one is meant, what it carries has to be a floating-point tensor in the "
            "model's output (alone, or in tuples, lists, dictionaries or dataclasses), which the next call is given"
        )
    if not found:
        raise AttachError("no module is called more than once in one run: there is no loop of modules to halt")
    return Discovery(tuple(found), exit_heads(model, [path for c in inside for path in c.body]))


def _around(
    model: nn.Module, run: Callable[[], Any], run_at: Callable[[Any], Any] | None, optional: bool
) -> list[Candidate]:
    """The loops of ``run`` itself, around calls of the model or of its parts.

    ``optional``: there are loops inside, and ``run`` may be anything around them, such as a generation whose cache
    cannot be given the same twice.
    """
    looped = LoopAround(model, run)
    seen = Calls(looped)
    seen.watch(looped)
    outermost = [replace(c, around=True) for c in _found(seen) if not c.scope]
    try:
        return [c for candidate in outermost for c in _proposed(looped, candidate, looped, run_at)]
    except Exception:  # whatever the user's own loop raises when it is run again
        if optional:
            return []
        raise


def _found(seen: Calls) -> list[Candidate]:
    """The loops among the calls of one run, the one with the most iterations first."""
    groups: dict[str, list[str]] = {}
    for name, stack in seen.calls:
        groups.setdefault(stack[-1] if stack else "", []).append(name)
    found = [c for scope, names in groups.items() for c in _candidates(scope, names, seen.shapes)]
    # What a repeated module repeats inside itself, once a call, is not a loop of its own.
    entered = {name: sum(1 for called, _ in seen.calls if called == name) for name in groups if name}
    found = [c for c in found if c.iterations > entered.get(c.scope, 1)]
    if seen.method:
        found = [replace(c, scope=f":{seen.method}") if not c.scope else c for c in found]
    return sorted(found, key=lambda c: (-c.iterations, c.scope))


def _proposed(
    model: nn.Module, candidate: Candidate, run: Callable[[], Any], run_at: Callable[[Any], Any] | None
) -> list[Candidate]:
    """The first way to see a loop by which a halt holds, and a loop inside its iterations, if there is one.

    If none holds, the likeliest way, with what is wrong about it.
    """
    likeliest: list[Candidate] = []
    for made, *inner in _ways(model, candidate, run):
        made = _with_verdict(model, made, run, run_at)
        if not made.problem:
            return [made, *inner]
        likeliest = likeliest or [made, *inner]
    return likeliest


def _ways(model: nn.Module, candidate: Candidate, run: Callable[[], Any]) -> Iterator[list[Candidate]]:
    """Ways to see one loop, the likeliest first: by the modules that were seen, with one state or another; by those of
    them alone that run as often as the loop; by methods."""
    yield from _looked_into(model, candidate, run)
    if regular := _regular(candidate):
        yield from _looked_into(model, regular, run)
    owner = "model" if candidate.around else call_parts(candidate.scope)[0]
    methods = [f"{owner}:{name}" for name in _methods(find_module(model, owner))]
    if methods:
        seen = Calls(model, methods)
        seen.watch(run)
        for found in _found(seen):
            if any(path in methods for path in (found.scope, *found.body)):
                yield from _looked_into(model, replace(found, around=candidate.around), run)


def _with_verdict(
    model: nn.Module, candidate: Candidate, run: Callable[[], Any], run_at: Callable[[Any], Any] | None
) -> Candidate:
    """Try a halt of the loop. It needs two iterations before it, if it can have them, and two after it."""
    if candidate.iterations < 3:
        return candidate
    k = 2 if candidate.iterations > 3 else 1
    together = False
    try:
        report = verify(model, run, k, run_at, rows=False, **candidate.fields())
        together = report.together
        problem = "" if report.ok or (report.halted and _is_rounding(report.halted, run)) else _wrong(report)
    except Exception as error:  # whatever the model says to outputs that it does not expect
        problem = f"{type(error).__name__}: {error}"
    check = bool(problem) or run_at is None or _passes_check(model, candidate, run, k)
    return replace(
        candidate, halted_at=k, problem=problem.rstrip("."), compared=run_at is not None, check=check, together=together
    )


def _passes_check(model: nn.Module, candidate: Candidate, run: Callable[[], Any], k: int) -> bool:
    """Whether a session lets this halt pass: an embedding of the step number changes what the body is given."""
    try:
        with torch.no_grad(), attach(model, f"fixed:steps={k}", **candidate.fields()):
            run()
    except (GlueDrift, VaryingInput):
        return False
    return True


def _is_rounding(difference: float, run: Callable[[], Any]) -> bool:
    """Whether two outputs differ no more than products of other sizes do."""
    with torch.no_grad():
        sizes = [largest(tensor) for tensor in tensors_in(run()) if tensor.is_floating_point()]
    return difference <= ROUNDING * max(sizes, default=0.0)


def _wrong(report: Report) -> str:
    """What a report says against a halt."""
    if report.neutral == 0 and not report.halted and not report.beside:
        return "too few iterations came after it to see; give run_at=, the model run with a number of steps"
    return str(report)


def _methods(module: nn.Module) -> list[str]:
    """The methods of a module's own package that might take a step of its loop."""
    own = type(module)
    package = own.__module__.partition(".")[0]
    names: dict[str, None] = {}
    for cls in own.__mro__:
        if cls.__module__.partition(".")[0] == package and cls is not nn.Module:
            names |= dict.fromkeys(name for name in vars(cls) if not name.startswith("__") and name != "forward")
    plain = [name for name in names if inspect.isfunction(inspect.getattr_static(own, name))]
    return [name for name in plain if not inspect.isgeneratorfunction(getattr(own, name))]


def _candidates(scope: str, names: list[str], shapes: dict[str, list[tuple[int, ...]]]) -> list[Candidate]:
    """The loops among the calls that one module makes: those of modules that it calls more than once.

    Modules whose calls take turns belong to one loop; where one set is done before the next begins, there are two.
    """
    spans: list[tuple[set[str], int, int]] = []  # modules of a loop, its first and its last call
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            calls = [i for i, called in enumerate(names) if called == name]
            spans.append(({name}, calls[0], calls[-1]))
    merged: list[tuple[set[str], int, int]] = []
    for modules, first, last in spans:  # in the order of their first calls
        if merged and first < merged[-1][2]:
            before, start, end = merged[-1]
            merged[-1] = before | modules, start, max(end, last)
        else:
            merged.append((modules, first, last))
    return [_candidate(scope, [n for n in names if n in modules], shapes) for modules, _, _ in merged]


def _candidate(scope: str, names: list[str], shapes: dict[str, list[tuple[int, ...]]]) -> Candidate:
    """The loop that calls these modules, in this order; its state, as far as shapes tell."""
    body = tuple(dict.fromkeys(names))
    iterations = min(names.count(name) for name in body)
    irregular = tuple(name for name in body if names.count(name) % iterations)
    sizes = {name: set(shapes.get(name, [])) for name in body}
    largest = max((len(shape) for found in sizes.values() for shape in found), default=0)
    states = [name for name in body if len(sizes[name]) == 1 and len(next(iter(sizes[name]))) == largest]
    state = states[-1] if states else body[-1]
    return Candidate(body, iterations, names.count(state) // iterations, scope, state, irregular=irregular)


def _looked_into(model: nn.Module, candidate: Candidate, run: Callable[[], Any]) -> Iterator[list[Candidate]]:
    """The loop with what disturbing its outputs shows, and a loop inside its iterations; once for each of a few outputs
    that may be the state."""
    reads = Reads(model, candidate.body, candidate.scope, run)
    candidate = replace(candidate, copies=any(call.changed_in_place for call in reads.calls[:-1]))
    count = len(reads.calls)
    unknown = [] if candidate.around else [candidate]  # calls around the model are no loop unless one reads another
    if count % candidate.iterations or count < 2:
        yield from ([c] for c in unknown)
        return
    if len(candidate.body) == 1:
        period = _period(reads)
        candidate = replace(candidate, period=period, iterations=count // period)
    size = count // candidate.iterations  # calls in an iteration
    if candidate.iterations < 2:
        yield from ([c] for c in unknown)
        return
    found = 0
    for place, leaf in itertools.islice(_states(reads, size, candidate.around), STATES):
        found += 1
        state = reads.calls[place].module
        made = replace(
            candidate,
            state=state,
            period=[call.module for call in reads.calls[:size]].count(state),
            initial=_initial(reads, size, place, leaf),
            leaf=None if _obvious(reads.calls[place].output, leaf) else leaf,
        )
        beyond = [number for number in reads.of(place, leaf) if number >= 2 * size]
        if candidate.iterations > 2 and beyond:
            made = replace(made, on_halt={state: "zero"})  # the model itself carries it on, as h = h + f(h) does
        else:
            made = replace(made, on_halt=_endings(reads))
        yield [made, *_inner(reads, size, made)]
    if not found:
        yield from ([c] for c in unknown)


def _endings(reads: Reads) -> dict[str, Action]:
    """What has to be said after a halt by a loop's last call, if the model goes on until that says it is over."""
    *earlier, last = [call for call in reads.calls if call.module == reads.calls[-1].module]
    flags = []
    for leaf, part in parts(last.output):
        over = _uniform(part)
        if over is not None and all(_uniform(leaf.get(call.output)) is not over for call in earlier):
            flags.append(Flag(leaf, over))
    if not flags:
        return {}
    ending = Ending.of(flags, last.output)
    return {last.module: ending} if reads.goes_on(ending.goes_on) else {}


def _uniform(value: Any) -> bool | None:
    """What all truths of a value are; None where they differ or are none."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, Tensor) or value.dtype != torch.bool or not value.numel():
        return None
    return True if value.all() else None if value.any() else False


def _regular(candidate: Candidate) -> Candidate | None:
    """The loop by those of its modules that run as often as it has iterations, if some run elsewhere as well."""
    body = tuple(name for name in candidate.body if name not in candidate.irregular)
    if not candidate.irregular or not body:
        return None
    return replace(candidate, body=body, state=candidate.state if candidate.state in body else body[-1], irregular=())


def _states(reads: Reads, size: int, as_numbers: bool) -> Iterator[tuple[int, Leaf]]:
    """Outputs of the first iteration that the second one reads, the last first: the call, and where in its output."""
    for place in list(range(size))[::-1][:MOST]:
        for leaf in _likeliest_first(reads.calls[place].output):
            readers = reads.of(place, leaf).items()
            if any(size <= number < 2 * size and (numbers or not as_numbers) for number, numbers in readers):
                yield place, leaf


def _likeliest_first(output: Any) -> list[Leaf]:
    """Parts of the output before what is deeper inside (a cache, often), those of more dimensions first."""
    return sorted(leaves(output), key=lambda leaf: (len(leaf.path) > 1, -int(leaf.get(output).ndim)))


def _period(reads: Reads) -> int:
    """Calls of a single module that make an iteration: after so many, its role and who reads whom repeat."""
    count = len(reads.calls)
    roles = [call.role for call in reads.calls]
    offsets: list[set[int]] = []
    for number in range(min(count, MOST)):
        found = leaves(reads.calls[number].output)
        offsets.append({n - number for leaf in found for n in reads.of(number, leaf)})
    for period in range(1, count // 2 + 1):
        if count % period or any(roles[i] != roles[i + period] for i in range(count - period)):
            continue
        pairs = [(i, i + period) for i in range(len(offsets) - period)]
        # What the last calls of the loop would be read by is not seen of the later one.
        if pairs and all({n for n in offsets[a] if b + n < count} == offsets[b] for a, b in pairs):
            return period
    return 1


def _initial(reads: Reads, size: int, place: int, leaf: Leaf) -> int | str | None:
    """The argument of an iteration's first call that is the state as it was returned; None if no argument is."""
    state, first = leaf.get(reads.calls[place].output), reads.calls[size]
    for key, given in first.given.items():
        if key in first.bare and given[0].shape == state.shape and torch.equal(given[0], state):
            start = reads.calls[0].given.get(key, [])
            return key if key in reads.calls[0].bare and start[0].shape == state.shape else None
    return None


def _obvious(output: Any, leaf: Leaf) -> bool:
    """Whether :class:`Loop` finds this tensor without being told."""
    found: Tensor | None = first_tensor(output)
    return found is not None and found is leaf.get(output)


def _inner(reads: Reads, size: int, outer: Candidate) -> list[Candidate]:
    """A module that an iteration calls several times in a row before the others: a loop inside."""
    names = [call.module for call in reads.calls[:size]]
    turns = names.count(names[0])
    if len(outer.body) < 2 or turns < 2 or names[:turns] != [names[0]] * turns:
        return []
    enclosing = next(name for name in outer.body if name != names[0])
    return [Candidate((names[0],), turns, 1, outer.scope, names[0], None, reset_on=(enclosing,))]
