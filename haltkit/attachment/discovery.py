"""Run a model a few times and propose the description of its loop."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.attach import attach, verify
from haltkit.attachment.calls import Calls
from haltkit.attachment.dataflow import Leaf, Reads, leaves
from haltkit.attachment.description import Action, call_parts, check_model, find_module
from haltkit.attachment.errors import AttachError, GlueDrift, VaryingInput
from haltkit.attachment.outputs import first_tensor, largest, tensors_in
from haltkit.attachment.verify import ROUNDING, Report

__all__ = ["Candidate", "Discovery", "discover"]

MOST = 24  # outputs that are disturbed, one run each, to see what reads them
STATES = 3  # of those that the next iteration reads, how many are tried as the state


@dataclass(frozen=True)
class Candidate:
    """A group of modules that run again and again, and what was found about the loop that calls them.

    Attributes:
        body, period, scope, state, initial, on_halt, reset_on: see :class:`~haltkit.attachment.description.Loop`.
        iterations: of the loop, in one call of the scope.
        leaf: where the state is in the state module's output, if :class:`Loop` would not look there by itself.
        irregular: modules of the body that also run outside of the loop.
        copies: the model changes what it got in place, so copies must be kept.
        halted_at: the step at which a halt was tried on the model; 0: none was.
        problem: why that halt did not hold; empty if it did.
        compared: the halt was compared with the model run with as many steps.
        together: entries of the batch must halt together, because the loop carries more than its state.
        check: False where the halt equals that, and yet something that the body is given goes on changing.
    """

    body: tuple[str, ...]
    iterations: int
    period: int
    scope: str
    state: str
    initial: int | str | None = 0
    on_halt: dict[str, Action] = field(default_factory=dict)
    reset_on: tuple[str, ...] = ()
    leaf: Leaf | None = None
    irregular: tuple[str, ...] = ()
    copies: bool = False
    halted_at: int = 0
    problem: str = ""
    compared: bool = False
    check: bool = True
    together: bool = False

    @property
    def verdict(self) -> str:
        """What trying a halt has shown, in a sentence."""
        if self.problem:
            return (
                f"A halt at {self.halted_at} does not hold yet: {self.problem}. If no description fits, put the loop "
                "alone into a module or a method of its own, and discover that"
            )
        if self.halted_at:
            how = "equals the model run with as many" if self.compared else "holds; run_at= compares what it gives"
            rest = "; entries of a batch cannot halt alone, so halt whole batches (granularity=batch)"
            return f"A halt at {self.halted_at} of {self.iterations} {how}{rest if self.together else ''}"
        return "No halt was tried, for that takes three iterations"

    def fields(self) -> dict[str, Any]:
        """The description by fields: ``attach(model, policy, **candidate.fields())``."""
        found: dict[str, Any] = {"body": list(self.body)}
        if self.state != self.body[-1]:
            found["state"] = self.state
        others = {"period": self.period, "scope": self.scope, "on_halt": self.on_halt}
        found |= {name: value for name, value in others.items() if value not in (1, "", {})}
        if self.copies:
            found["copies"] = True
        if not self.check:
            found["check"] = False
        if self.initial != 0 or self.initial is None:
            found["initial"] = self.initial
        if self.reset_on:
            found["reset_on"] = list(self.reset_on)
        if self.leaf is not None:
            found["select"], found["put"] = self.leaf.get, self.leaf.put
        return found

    def call(self) -> str:
        """The ``attach`` call to copy."""
        parts = {name: repr(value) for name, value in self.fields().items()}
        if self.leaf is not None:
            parts["select"], parts["put"] = self.leaf.select_text(), self.leaf.put_text()
        return f"haltkit.attach(model, policy, {', '.join(f'{name}={value}' for name, value in parts.items())})"


@dataclass(frozen=True)
class Discovery:
    """What was seen, the likeliest loop first. ``str()`` is a table and the call to copy."""

    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        rows = [f"{'iterations':>10}  {'period':>6}  state, body"]
        rows += [f"{c.iterations:10d}  {c.period:6d}  {c.state}, [{', '.join(c.body)}]" for c in self.candidates]
        first = self.candidates[0]
        what = "Likeliest, and not right yet" if first.problem else "To copy"
        return "\n".join([*rows, "", f"{first.verdict}. {what}:", f"  {first.call()}"])


def discover(model: nn.Module, run: Callable[[], Any], run_at: Callable[[Any], Any] | None = None) -> Discovery:
    """Propose how to attach to a model, from a few runs of it.

    Modules that are called more than once in one call of the model are grouped under the module that calls them; those
    that a repeated module calls inside itself are not listed. Then one output after the other is disturbed, to see
    which of them the next iteration reads: that is the state. Last, a halt is tried. Where the model goes on changing
    something outside of its modules, the loop is looked for among the methods that the looping module calls. The
    proposal is a starting point, and :func:`~haltkit.attachment.attach.verify` with ``run_at`` tells whether it is
    right: what runs do not show has to be added, such as ``on_halt`` for what the model sums up beside the loop.

    Args:
        model: any module.
        run: calls the model on some input; called up to some 40 times for each loop, and must be deterministic.
        run_at: called with a number of steps: runs the model on the same input with that many. The halt that is tried
            is then compared with it.

    Raises:
        AttachError: no module is called more than once in one call of the model.
        ValueError: no model, or one that computes something else in each run.
    """
    check_model(model)
    seen = Calls(model)
    seen.watch(run)
    found = _found(seen)
    if not found and seen.roots > 1:
        raise AttachError(
            f"run calls the whole model {seen.roots} times and nothing repeats within one call: the loop is around the "
            "model. Put it into the forward of a module that has the model as a part, and discover that one"
        )
    if not found:
        raise AttachError("no module is called more than once in one run: there is no loop of modules to halt")
    return Discovery(tuple(c for candidate in found for c in _proposed(model, candidate, run, run_at)))


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
    owner = call_parts(candidate.scope)[0]
    methods = [f"{owner}:{name}" for name in _methods(find_module(model, owner))]
    if methods:
        seen = Calls(model, methods)
        seen.watch(run)
        for found in _found(seen):
            if any(path in methods for path in (found.scope, *found.body)):
                yield from _looked_into(model, found, run)


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
    if count % candidate.iterations or count < 2:
        yield [candidate]
        return
    if len(candidate.body) == 1:
        period = _period(reads)
        candidate = replace(candidate, period=period, iterations=count // period)
    size = count // candidate.iterations  # calls in an iteration
    if candidate.iterations < 2:
        yield [candidate]
        return
    found = 0
    for place, leaf in itertools.islice(_states(reads, size), STATES):
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
        yield [made, *_inner(reads, size, made)]
    if not found:
        yield [candidate]


def _regular(candidate: Candidate) -> Candidate | None:
    """The loop by those of its modules that run as often as it has iterations, if some run elsewhere as well."""
    body = tuple(name for name in candidate.body if name not in candidate.irregular)
    if not candidate.irregular or not body:
        return None
    return replace(candidate, body=body, state=candidate.state if candidate.state in body else body[-1], irregular=())


def _states(reads: Reads, size: int) -> Iterator[tuple[int, Leaf]]:
    """Outputs of the first iteration that the second one reads, the last first: the call, and where in its output."""
    for place in list(range(size))[::-1][:MOST]:
        for leaf in _largest_first(reads.calls[place].output):
            if any(size <= number < 2 * size for number in reads.of(place, leaf)):
                yield place, leaf


def _largest_first(output: Any) -> list[Leaf]:
    return sorted(leaves(output), key=lambda leaf: -int(leaf.get(output).ndim))


def _period(reads: Reads) -> int:
    """Calls of a single module that make an iteration: after so many, its role and who reads whom repeat."""
    count = len(reads.calls)
    roles = [call.role for call in reads.calls]
    offsets: list[frozenset[int]] = []
    for number in range(min(count, MOST)):
        found = leaves(reads.calls[number].output)
        offsets.append(frozenset(n - number for leaf in found for n in reads.of(number, leaf)))
    reach = max(max(seen, default=0) for seen in offsets)
    for period in range(1, count // 2 + 1):
        pairs = [(i, i + period) for i in range(len(offsets) - period) if i + period + reach < count]
        if (
            count % period == 0
            and pairs
            and all(offsets[a] == offsets[b] for a, b in pairs)
            and all(roles[i] == roles[i + period] for i in range(count - period))
        ):
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
