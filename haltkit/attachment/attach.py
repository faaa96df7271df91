"""``attach`` halts the loops inside a foreign model without editing it; ``verify`` proves that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

from torch import nn

from haltkit.attachment.description import Loop, check_model
from haltkit.attachment.foreign import Halting, HaltingSession
from haltkit.attachment.kv import KVMode
from haltkit.attachment.native import HaltsItself, NativeSession
from haltkit.attachment.observing import ObservingSession
from haltkit.attachment.presets import loops_by_name, preset_for
from haltkit.attachment.regions import ONE, around, checked
from haltkit.attachment.saved import load
from haltkit.attachment.session import Session
from haltkit.attachment.verify import NEVER, Report
from haltkit.card import Card, is_card
from haltkit.loop import Execution, LoopObserver
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, Readout, check_count, granularity_of
from haltkit.specs import Policies, policy_for_regions, regions_named
from haltkit.standing import PLAIN

__all__ = ["Policies", "attach", "verify"]


def attach(
    model: nn.Module,
    policy: Policies | Card | PathLike[str] | None,
    loop: Loop | None = None,
    *,
    loops: Mapping[str, Loop] | None = None,
    readout: Readout | Mapping[str, Readout] | None = None,
    observer: LoopObserver | None = None,
    allow_grad: bool = False,
    kv: KVMode = "refuse",
    kv_stride: int | None = None,
    check: bool = True,
    execution: Execution = "masked",
    max_steps: int | Mapping[str, int] | None = None,
    total_steps: int | None = None,
    **fields: Any,
) -> Session:
    """Halt the loops inside a model, without editing it::

        with haltkit.attach(model, "accel:tau=1e-3", body=["core"]) as session:
            out = model(tokens)
        session.steps["loop"], session.outcome["loop"]

        loops = {"core": haltkit.Loop(["core"]), "refine": haltkit.Loop(["refine"])}
        with haltkit.attach(model, "core=accel:tau=1e-3;refine=norm:tau=0.1", loops=loops) as session:
            out = model(tokens)
        session.steps["core"], session.steps["refine"]

    When a loop's policy has halted every row, the remaining iterations cost next to nothing: the body's modules give
    their outputs of the last complete iteration again, and the model's output is what it gives when run with that
    many loops: :func:`verify` proves it on your model, or tells what the description misses. While rows are still
    running, halted ones keep their state.

    Per-token and per-sequence freezing from outside does not reach into the body's attention: the frozen state is
    fed again and its keys and values are recomputed from it, which differs from the canonical semantics of
    :meth:`~haltkit.models.gpt.model.LoopedGPT.forward_adaptive`, and saves nothing until all rows are done.

    Args:
        model: any module whose loops call modules of its own.
        policy: a spec or a policy, whose granularity decides which rows halt together: one for every loop, or one for
            each region, as a mapping or as ``"region=spec;region=spec"``. A :class:`~haltkit.card.Card`, or the path of
            one, gives the spec and, unless one is given here, the description; on another model than its own that takes
            ``Card.load(path).without_certificate()``, and :attr:`Session.standing` says so. None only observes: forward
            hooks, nothing is overridden, and the model's output is what it was to the bit.
        loop: the description of a single loop, which is the region ``"loop"``.
        loops: several loops by region: one inside the other (the inner one says ``reset_on``), or one after the other.
            With neither, the preset for the model's class is used.
        readout: from the state to logits, for policies that look at predictions, or one for each region that has one.
            It may call the model's own modules.
        observer: a recorder; :attr:`Session.trajectory` is then its recording. None: the newest loops' states are kept
            by reference where they are small.
        allow_grad: allow outputs recorded under ``no_grad`` to be replayed where gradients are on.
        kv: what to do about a KV cache with slots of its own for each iteration, which skipped iterations do not
            fill. ``refuse``: an error once depth differs between calls. ``uniform``: the first call with a cache
            decides the depth for all later ones. ``freeze``: the body runs on with the halted state, which fills the
            cache and saves nothing. ``copy``: skipped iterations write the last one's keys and values again, which
            saves the time and is another function.
        kv_stride: for ``copy``, the distance between the cache slots of successive iterations; None to see it from
            two of them.
        check: in the first loop of each region that halts, see whether what the body's modules are given stands still
            after the halt, and raise if it does not: the model would carry state past them. It costs a copy of these
            inputs in two iterations that are not computed, and one comparison.
        execution: ``masked``: rows that have halted keep their state and are still computed; entries of the batch
            whose rows have all halted also keep what else the body's modules gave them, wherever the batch dimension is
            found, which takes calls of these modules on two entries beside the loop. ``compact``:
            entries of the batch whose rows have all halted are retired from the body's modules, so time falls with
            the mean depth. For models whose entries do not see each other and that have no cache. Which dimension is
            the batch is found, and proved, in the first loop of the session.
        max_steps: the most steps that any loop takes, at least 1, or those of each region, as a mapping (a region that
            it does not name has no budget of its own). A loop that starts over has them again. Rows still active then
            end as ``BUDGET``. None: as many as the model takes by itself, which it never exceeds either way.
        total_steps: the most steps that all loops of one call of the model take together, for each entry of the batch
            (the first dimension of a state), at least one per region. Every step of every loop counts one, an outer
            step beside the inner ones that run in it; an entry takes a step while any of its rows is active. A loop
            goes on only if there is also room for one step of every loop that must run then: those that ran inside its
            last step, and regions that have not begun. Rows still active end as ``BUDGET``. A loop that begins takes at
            least one step, so only a region that runs several times one after the other can exceed the total.
        fields: the description of a single loop by the fields of :class:`Loop`, in place of ``loop``.

    Returns:
        the session, attached; the end of its ``with`` block, or :meth:`Session.detach`, restores the model.

    Raises:
        AttachError: a subclass for each thing that would be wrong; see :mod:`haltkit.attachment.errors`.
        ValueError: no module, a bad policy, one for a region that is not there, a description that contradicts itself,
            a card for another model or full depth, or what would be ignored: how to halt, without a policy or on a
            model that halts itself.
    """
    check_model(model)
    for name, count in _counts(max_steps, total_steps):
        check_count(name, count)
    policy, described, card = _loaded(policy, loop, loops, fields)
    standing = PLAIN
    if card is not None:
        standing = card.check(model, full_depth=max((count for _, count in _counts(max_steps, None)), default=0))
        _check_card(card, max_steps, total_steps)
    halting = _said(allow_grad, kv, kv_stride, execution, max_steps, total_steps)
    told = readout is not None
    found: Mapping[str, Loop] | HaltsItself
    if described is None:
        found, readout = _preset(model, readout, regions_named(policy))
    else:
        found = described
    if isinstance(found, HaltsItself):
        if policy is None:
            raise ValueError(f"to observe a {type(model).__name__} use haltkit.record(model), or give it a policy")
        if halting or told:
            raise ValueError(
                f"a {type(model).__name__} halts itself: leave out {', '.join([*halting, *['readout'] * told])}. Its "
                "readout is its own, and its budget is the depth that it is called with"
            )
        policies = policy_for_regions(policy, tuple(found.looped_regions))
        native = NativeSession(model, found, policies, observer, card, standing)
        return _attached(native.attach, native.detach)
    regions = checked(found)
    if policy is None:
        if halting:
            raise ValueError(
                f"policy=None only observes, and {', '.join(halting)} would be ignored: give a policy, which may be "
                "one that never halts, such as fixed:steps=1000000"
            )
        observing = ObservingSession(model, regions, observer)
        return _attached(observing.attach, observing.detach)
    policies = policy_for_regions(policy, tuple(regions))
    _check_execution(execution, policies, kv)
    _check_observer(execution, observer, regions)
    _check_total(total_steps, policies)
    _check_whole(regions, policies)
    how = Halting(
        regions,
        policies,
        _readouts(readout, tuple(regions)),
        observer,
        allow_grad,
        kv,
        kv_stride,
        check,
        execution,
        _by_region(max_steps, policies),
        total_steps,
        card,
        standing,
    )
    session = HaltingSession(model, how)
    return _attached(session.attach, session.detach)


def verify(
    model: nn.Module,
    run: Callable[[], Any],
    k: int | Mapping[str, int],
    run_at: Callable[[Any], Any] | None = None,
    *,
    loop: Loop | None = None,
    loops: Mapping[str, Loop] | None = None,
    execution: Execution = "masked",
    rows: bool = True,
    **fields: Any,
) -> Report:
    """Prove on a model that attaching is neutral and that a halt at ``k`` is right, before any policy is chosen::

        haltkit.verify(model, lambda: model(x), 4, lambda k: model(x, loops=k), body=["core"])

    Args:
        model: the model.
        run: calls it on some input and returns its output; called at least five times, and must be deterministic.
        k: where to force a halt, below the number of iterations that the model runs: in every region, or by region
            (those not named run to their end).
        run_at: called with ``k``: runs the model on the same input with that many loops, for the comparison that
            settles it.
        loop, loops, execution, fields: as for :func:`attach`.
        rows: whether rows or entries are to halt one by one. Where the loop carries more than its state, in modules
            whose batch dimension is not found, entries get another output then, and only whole batches can halt
            (``rows=False``, ``granularity=batch``).

    Raises:
        AttachError: the loop cannot be halted as described.
        ValueError: a region that is not there, the model ran no more than ``k`` iterations, or ``run`` is not
            deterministic or returns no tensor.
    """
    known = loop is not None or loops is not None or bool(fields)
    policy: Policies = dict.fromkeys(k, NEVER) if isinstance(k, Mapping) and k and not known else NEVER
    with attach(model, policy, loop, loops=loops, execution=execution, **fields) as session:
        return session.verify(run, k, run_at, rows=rows)


def _said(
    allow_grad: bool, kv: KVMode, kv_stride: int | None, execution: Execution, max_steps: Any, total_steps: Any
) -> list[str]:
    """Which arguments were given that say how a foreign model is halted."""
    given = {
        "allow_grad": allow_grad,
        "kv": kv != "refuse",
        "kv_stride": kv_stride is not None,
        "execution": execution != "masked",
        "max_steps": max_steps is not None,
        "total_steps": total_steps is not None,
    }
    return [name for name, said in given.items() if said]


def _check_card(card: Card, max_steps: int | Mapping[str, int] | None, total_steps: int | None) -> None:
    """Check that budgets leave a card's policy what it was when it was measured.

    Raises:
        ValueError: another full depth, or a joint budget under a certificate.
    """
    for _, count in _counts(max_steps, None):
        card.check_depth(count)
    if total_steps is not None and card.certificate is not None:
        raise ValueError(
            f"total_steps={total_steps}: the card's certificate is about its policy without a joint budget. Leave it "
            f"out, or use the policy without its certificate: Card.load(path).without_certificate()"
        )


def _check_execution(execution: Execution, policies: Mapping[str, HaltingPolicy[Any]], kv: KVMode) -> None:
    """Check that rows can be retired from a model with these policies.

    Raises:
        ValueError: they cannot, or there is no such execution.
    """
    if execution == "masked":
        return
    if execution != "compact":
        raise ValueError(f"execution={execution!r}: allowed are 'masked' and 'compact'")
    if kv != "refuse":
        raise ValueError(f"kv={kv!r} is for models with a cache, and execution='compact' for models without one")
    for policy in policies.values():
        if (granularity := granularity_of(policy)) in ("batch", "world"):
            raise ValueError(
                f"execution='compact': with granularity={granularity} all rows halt together, so none is retired "
                "before the others. Use granularity=sequence or token"
            )


def _check_observer(execution: Execution, observer: LoopObserver | None, loops: Mapping[str, Loop]) -> None:
    """Check that an observer is shown whole batches.

    Raises:
        ValueError: it is not.
    """
    if execution != "compact" or observer is None:
        return
    if outer := [name for name, modules in around(loops).items() if modules]:
        raise ValueError(
            f"execution='compact': entries that halt in {', '.join(outer)} leave the loops inside it, so an observer "
            "would be shown other entries from loop to loop. Attach without one, or use execution='masked'"
        )


def _counts(max_steps: int | Mapping[str, int] | None, total_steps: int | None) -> Iterator[tuple[str, Any]]:
    """The numbers of steps that were given, with the names that an error calls them by."""
    if isinstance(max_steps, Mapping):
        yield from ((f"max_steps[{name!r}]", count) for name, count in max_steps.items())
    elif max_steps is not None:
        yield "max_steps", max_steps
    if total_steps is not None:
        yield "total_steps", total_steps


def _by_region(max_steps: int | Mapping[str, int] | None, policies: Mapping[str, Any]) -> dict[str, int]:
    """The budget of each region that has one.

    Raises:
        ValueError: one for a region that is not there.
    """
    if max_steps is None:
        return {}
    if not isinstance(max_steps, Mapping):
        return dict.fromkeys(policies, max_steps)
    if unknown := [str(name) for name in max_steps if name not in policies]:
        raise ValueError(f"max_steps for regions {', '.join(unknown)}; the regions are {', '.join(policies)}")
    return dict(max_steps)


def _check_total(total_steps: int | None, policies: Mapping[str, Any]) -> None:
    """Check that a joint budget has a step for each region.

    Raises:
        ValueError: it has not.
    """
    if total_steps is not None and total_steps < len(policies):
        raise ValueError(
            f"total_steps={total_steps}: every loop takes at least one step, so the regions {', '.join(policies)} take "
            f"at least {len(policies)} in all"
        )


def _check_whole(regions: Mapping[str, Loop], policies: Mapping[str, HaltingPolicy[Any]]) -> None:
    """Check that all rows halt together where the loop goes on until its body says that it is over.

    Raises:
        ValueError: a policy judges row by row there.
    """
    for name, loop in regions.items():
        together = granularity_of(policies[name]) in ("batch", "world") or isinstance(policies[name], Fixed)
        if loop.halts_whole and not together:
            raise ValueError(
                f"region {name}: on_halt has a function, which ends the loop once every row has halted, so rows that "
                "halt alone would keep it going. Say granularity=batch; or give the loop a number of steps (for _ in "
                "range(n)), which needs no such function"
            )


def _attached(begin: Callable[[], Session], undo: Callable[[], None]) -> Session:
    """Begin a session; whatever happens before it is in the caller's hands, the model is restored."""
    try:
        return begin()
    except BaseException:
        undo()
        raise


def _loaded(
    policy: Policies | Card | PathLike[str] | None,
    loop: Loop | None,
    loops: Mapping[str, Loop] | None,
    fields: Mapping[str, Any],
) -> tuple[Policies | None, Mapping[str, Loop] | None, Card | None]:
    """The policy, the description if one is given or in the card, and the card if the policy is one."""
    given = [what for what in (loop, loops, fields.get("body")) if what is not None]
    if len(given) > 1:
        raise ValueError("give the loop as one value or by its fields, or several as loops=, not both")
    if fields:
        loop = Loop.of(fields)
    if loop is not None:
        loops = {ONE: loop}
    if isinstance(policy, (Card, PathLike)) or (isinstance(policy, str) and is_card(policy)):
        card, saved = load(policy)
        return card.choice, saved if loops is None else loops, card
    return policy, loops, None


def _preset(
    model: nn.Module, readout: Readout | Mapping[str, Readout] | None, regions: tuple[str, ...]
) -> tuple[Mapping[str, Loop] | HaltsItself, Readout | Mapping[str, Readout] | None]:
    """The description that the model gives of itself, or the preset for its class."""
    if isinstance(model, HaltsItself):
        return model, readout
    if by_name := loops_by_name(model, regions):
        return by_name[0], readout or by_name[1]
    described, found = preset_for(model)
    return {ONE: described} if isinstance(described, Loop) else described, readout or found


def _readouts(given: Readout | Mapping[str, Readout] | None, regions: tuple[str, ...]) -> dict[str, Readout]:
    """The readout of each region that has one.

    Raises:
        ValueError: one for a region that is not there.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(regions, given)
    if unknown := [name for name in given if name not in regions]:
        raise ValueError(
            f"readouts for regions {', '.join(unknown)}; the model's regions are {', '.join(regions)}: name these"
        )
    return dict(given)
