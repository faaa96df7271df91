"""``haltkit.compare``: which policy and threshold, on a model of yours?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment import Loop
from haltkit.comparison.baselines import has_few_kinds, with_baselines
from haltkit.comparison.kept import with_live
from haltkit.comparison.measure import measure
from haltkit.comparison.possible import Possible, possible_if_known
from haltkit.comparison.settings import Given, candidates, choose_settings
from haltkit.comparison.table import Comparison
from haltkit.subject import Subject

__all__ = ["DEFAULT_TAUS", "compare"]

DEFAULT_TAUS = "both"
RECORDED = 512


def compare(
    model: nn.Module | Subject,
    run: Callable[[Any], Any] | None = None,
    policies: str | Sequence[Given] | None = None,
    taus: str | Sequence[float] = DEFAULT_TAUS,
    loss: Callable[[Any, Any], Tensor | float] | None = None,
    *,
    samples: Sequence[Any] = (),
    granularity: str | None = None,
    repeats: int = 3,
    timed: int = 1,
    recorded: int = RECORDED,
    on_tick: Callable[[int, int], None] | None = None,
    on_doing: Callable[[str], None] | None = None,
    **about: Any,
) -> Comparison:
    """Compare policies, thresholds and fixed depths at equal quality::

        result = haltkit.compare(model, samples=batches, loss=loss, body=["core"])
        result.conclusion().winner

    Full depth is the model as it is; fixed depths and policies halt it earlier.

    Args:
        model: the model, or a :class:`~haltkit.subject.Subject` that says everything about it.
        run: one pass of the model on a sample; None: the model itself.
        policies: specs, comma-separated or as a sequence, policy objects, mappings from regions to either, or paths of
            saved choices; those without a tau are swept. None: the policies that ``haltkit policies`` marks as swept.
        taus: thresholds for the sweep: ``paper``, ``auto`` (picked from scores observed on the first samples),
            ``both``, or a list.
        loss: from (output, sample) to what is lost; see :class:`~haltkit.subject.Subject`.
        samples: what the model is run on.
        granularity: for every policy that does not say its own: token, sequence, batch or world.
        recorded: headroom and regret are measured on the first samples, until so many rows were recorded, and on all
            samples where rows can be given depths of their own; 0: they are not measured, and neither the oracle nor
            depths by kind are tried.
        repeats, timed, on_tick: see :func:`haltkit.comparison.measure.measure`.
        on_doing: is told what is being done, whenever that is something else.
        about: ``loop``, ``loops``, ``body`` and the other fields of a description, and further attributes of a
            :class:`~haltkit.subject.Subject`.

    Raises:
        AttachError: the loop is not described, or cannot be halted as described.
        ValueError: bad policies, thresholds or loss, or kinds of rows of which nothing can be known.
    """
    if isinstance(model, Subject):
        given = [name for name, value in {"run": run, "loss": loss, **about}.items() if value is not None]
        if given or samples:
            raise ValueError(f"a Subject says {', '.join(given) or 'samples'} itself: use dataclasses.replace")
        subject = model
    else:
        described = {f.name: about.pop(f.name) for f in fields(Loop) if f.name in about}
        if "body" in described:
            about["loop"] = Loop(**described)
        elif described:
            raise ValueError(f"{', '.join(described)} belong to a description by fields, which needs body=")
        if not samples:
            raise ValueError("compare needs at least one sample to run the model on, or a Subject that has them")
        subject = Subject.attached(model, run, samples=samples, loss=loss, **about)
    wanted = candidates(policies, subject)
    doing = on_doing or (lambda what: None)
    look = subject.look()
    subject = replace(subject, full_depth=look.full_depth)
    with torch.no_grad():
        settings = choose_settings(subject, look, wanted, taus, granularity)
        for setting in (settings[0], settings[-1]):  # warm up before anything is timed
            subject.run(subject.samples[0], setting)
        oracles: list[Mapping[str, Tensor]] = []
        doing("recording at full depth")
        headroom, unknown = _headroom(subject, recorded, oracles)
        if recorded:
            tried = itertools.count(1)
            doing("looking for fixed depths")
            settings = with_baselines(
                subject,
                settings,
                oracles,
                unknown,
                on_try=lambda: doing(f"looking for fixed depths by kind, try {next(tried)}"),
            )
    doing(f"measuring {len(settings)} settings")
    result = measure(
        subject, settings, depths=look.depths, oracles=oracles, timed=timed, repeats=repeats, on_tick=on_tick
    )
    told = {"kinds": subject.kinds.what} if subject.kinds is not None and has_few_kinds(subject) else {}
    headroom = with_live(headroom, result.rows)
    return replace(result, headroom=headroom, no_headroom=unknown, about={**result.about, **told})


def _headroom(subject: Subject, recorded: int, oracles: list[Mapping[str, Tensor]]) -> tuple[dict[str, Possible], str]:
    """What halting could save by region, or why that is not known; the oracle depths are added to ``oracles``."""
    if not recorded:
        return {}, "it was not asked for"
    enough = None if subject.driver.rows_leave else recorded
    return possible_if_known(subject, enough=enough, on_sample=oracles.append)
