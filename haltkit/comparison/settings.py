"""The settings of a comparison: fixed depths, and policies at thresholds that were asked for or picked from scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch

from haltkit.attachment.saved import load_card
from haltkit.card import Card, is_card
from haltkit.comparison.thresholds import PAPER_TAUS, taus_of
from haltkit.driving import Look
from haltkit.protocol import HaltingPolicy, Readout, check_tau, has_logits
from haltkit.recording.replay import readout_of_recordings, replay
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.registry import records
from haltkit.setting import Depth, Setting
from haltkit.specs import (
    Spec,
    UnprintablePolicy,
    other_regions,
    parse_choice,
    parse_choices,
    policy_of,
    spec_of,
    text_of,
)
from haltkit.standing import PLAIN, Standing
from haltkit.subject import Subject

__all__ = ["Candidate", "Sweeps", "candidates", "choose_settings", "in_order", "suggested_depths"]

SUGGESTED = 6  # depths at most
# Thresholds are picked to stop a typical row after these shares of the model's own depth.
TARGET_SHARES = (0.1, 0.2, 0.35, 0.5, 0.75)
# One policy as a user gives it, for all regions or for each.
Given = str | PathLike[str] | Spec | Card | HaltingPolicy[Any] | Mapping[str, str | Spec | HaltingPolicy[Any]]


@dataclass(frozen=True)
class Candidate:
    """One policy to compare, by region: a spec, whose threshold may be open, or a finished policy.

    Attributes:
        name: of its sweep: what was given, without thresholds.
        parts: by region; a single entry named ``""`` is for all regions.
        as_given: whether it is a finished choice, which no default granularity applies to.
        standing: what is promised of it, where it came from a card.
        path: of that card, which names it where another candidate has its name; empty: it came from none.
    """

    name: str
    parts: Mapping[str, Spec | HaltingPolicy[Any]]
    as_given: bool = False
    standing: Standing = PLAIN
    path: str = ""

    @property
    def open(self) -> bool:
        """Whether a threshold is still to be chosen."""
        return any(isinstance(part, Spec) and part.open for part in self.parts.values())


def candidates(policies: str | Sequence[Given] | None, subject: Subject) -> list[Candidate]:
    """The policies to compare.

    Args:
        policies: comma-separated text, or a sequence of specs, policy objects, mappings from regions, cards and their
            paths. None: those that the registry marks as swept, as far as the model can use them.
        subject: the model.

    Raises:
        ValueError: a bad spec, or regions that are not the model's.
    """
    if policies is None:
        usable = [r.name for r in records() if r.swept and (has_logits(subject.readout) or not r.needs_readout)]
        policies = ",".join(sorted(usable))
    given: Sequence[Given] = parse_choices(policies) if isinstance(policies, str) else policies
    return _told_apart([_candidate(one, subject) for one in given])


def _told_apart(made: Sequence[Candidate]) -> list[Candidate]:
    """The same candidates, where no card has the name of another: its path names it, with a number if it comes again.

    A name is that of a sweep, of which a table and a conclusion say one thing.
    """
    clashing = Counter(one.name for one in made)
    named = [replace(o, name=o.standing.mark(o.path)) if o.path and clashing[o.name] > 1 else o for o in made]
    before: Counter[str] = Counter()
    for number, one in enumerate(named):
        before[one.name] += 1
        if one.path and before[one.name] > 1:
            named[number] = replace(one, name=f"{one.name} ({before[one.name]})")
    return named


def _candidate(given: Given, subject: Subject) -> Candidate:
    if isinstance(given, (Card, PathLike)) or (isinstance(given, str) and is_card(given)):
        card = load_card(given)
        standing = card.check(subject.model, subject.regions, subject.full_depth)
        named = _named(card.policies(subject.regions), card.name or None)
        return replace(named, name=standing.mark(named.name), standing=standing, path=card.path)
    parsed: Any = parse_choice(given) if isinstance(given, str) else given
    if isinstance(parsed, Mapping):
        if parsed.keys() != set(subject.regions):
            raise ValueError(other_regions(parsed, subject.regions))
        parts = {r: _part(parsed[r]) for r in subject.regions}
        if not any(isinstance(part, Spec) for part in parts.values()):
            return _named(parts)
        return Candidate(";".join(f"{region}={_without_tau(part)}" for region, part in parts.items()), parts)
    part = _part(parsed)
    return Candidate(_without_tau(part), {"": part}, as_given=not isinstance(part, Spec))


def _part(given: Any) -> Spec | HaltingPolicy[Any]:
    if not isinstance(given, str):
        return given if isinstance(given, Spec) else policy_of(given)
    (text,) = parse_choices(given)
    parsed = parse_choice(text)
    if not isinstance(parsed, Spec):
        raise ValueError(f"{given!r} names regions, and here one policy is expected")
    return parsed


def _without_tau(part: Spec | HaltingPolicy[Any]) -> str:
    try:
        return str((part if isinstance(part, Spec) else spec_of(part)).without("tau"))
    except UnprintablePolicy:
        return type(part).__name__


def _named(policies: Mapping[str, Any], name: str | None = None) -> Candidate:
    """A finished choice of policy objects by region."""
    try:
        name = name or text_of(policies)
    except UnprintablePolicy:
        name = ";".join(f"{region}={type(policy).__name__}" for region, policy in policies.items())
    return Candidate(name, policies, as_given=True)


def choose_settings(
    subject: Subject,
    look: Look,
    wanted: Sequence[Candidate],
    taus: str | Sequence[float] = "both",
    granularity: str | None = None,
) -> list[Setting]:
    """Full depth; other fixed depths and those that the policies suggest, by depth; each policy at its thresholds.

    Args:
        subject: the model.
        look: what it does by itself.
        wanted: those without an open threshold stand for one setting, the others for a sweep.
        taus: ``paper`` (Figure 4's), ``auto`` (picked from the scores that each policy has on the recordings),
            ``both``, or the thresholds.
        granularity: for every policy that does not say its own; one that says another is refused. None: the
            subject's, where a policy says nothing.

    Raises:
        ValueError: a bad spec, a depth beyond full depth, or no threshold for a policy.
    """
    full, sweeps = look.full_depth, Sweeps.on(subject, look, taus, granularity)
    made = [setting for candidate in wanted for setting in sweeps.settings(candidate)]
    asked = [setting.depth for setting in made if setting.depth is not None]
    for depth in asked:
        if depth.deepest > full:
            raise ValueError(f"{Setting(depth).text} is deeper than full depth, {full} steps")
    tried = {k for k in subject.fixed_depths if k < full} | {depth.same for depth in asked if depth.same is not None}
    depths = [Depth.uniform(k, subject.regions) for k in (full, *sorted(tried - {full}))]
    depths += [depth for depth in dict.fromkeys(asked) if depth.same is None]
    policies = [setting for setting in made if setting.depth is None]
    suggested = suggested_depths(policies, look.recordings[0], sweeps.readout, known=depths) if policies else []
    return [*map(Setting, [depths[0], *in_order([*depths[1:], *suggested])]), *policies]


def in_order(depths: Iterable[Depth]) -> list[Depth]:
    """Depths as tables list them: those that are the same in every region, then the others, each from the least on."""
    return sorted(depths, key=lambda depth: (depth.same is None, sorted(depth.steps.values())))


@dataclass(frozen=True)
class Sweeps:
    """Turns candidates into settings, as :func:`choose_settings` does. Make one with :meth:`on`."""

    subject: Subject
    look: Look
    taus: str | Sequence[float]
    granularity: str | None
    readout: Readout | None
    targets: Sequence[int]

    @classmethod
    def on(cls, subject: Subject, look: Look, taus: str | Sequence[float], granularity: str | None = None) -> Sweeps:
        """Sweeps on what was seen of a subject."""
        readout = None if subject.readout is None else readout_of_recordings(subject.readout, subject.model)
        shares = {max(2, math.ceil(look.full_depth * share)) for share in TARGET_SHARES}
        return cls(subject, look, taus, granularity, readout, subject.target_steps or tuple(sorted(shares)))

    def settings(self, candidate: Candidate) -> list[Setting]:
        """One setting for a policy without an open threshold, else one per threshold.

        Raises:
            ValueError: a bad spec, or no threshold.
        """
        parts = self.parts(candidate)
        if not candidate.open:
            alone = parts.get("")
            if isinstance(alone, Spec) and (values := alone.sweep):
                return [self._setting(candidate, {"": spec}, None) for spec in values]
            written = alone.get("tau") if isinstance(alone, Spec) and not alone.parts else None
            built = self._setting(candidate, parts, None)  # what is wrong with the threshold is said there
            return [replace(built, tau=None if written is None else float(written))]
        made = [self._setting(candidate, parts, tau) for tau in self._common(candidate)]
        made += self._picked(candidate, parts)
        if not made:
            raise ValueError(_no_threshold(repr(candidate.name)))
        unique = {setting.text or str(number): setting for number, setting in enumerate(made)}
        return sorted(unique.values(), key=lambda setting: setting.tau or 0.0)

    def parts(self, candidate: Candidate) -> dict[str, Spec | HaltingPolicy[Any]]:
        """The candidate's parts with the granularity that they are run with."""
        return {region: self._with_granularity(part, candidate) for region, part in candidate.parts.items()}

    def _with_granularity(self, part: Any, candidate: Candidate) -> Any:
        if not isinstance(part, Spec) or candidate.as_given or not part.takes("granularity"):
            return part
        if self.granularity is not None:
            return part.with_key("granularity", self.granularity)
        usual = self.subject.granularity
        return part if usual == "token" else part.with_default("granularity", usual)

    def _setting(self, candidate: Candidate, parts: Mapping[str, Any], tau: float | None) -> Setting:
        built = {region: _built(part, tau) for region, part in parts.items()}
        setting = Setting.of(built.get("", built), self.subject.regions)
        return setting.named(candidate.name, tau, candidate.standing)

    def _common(self, candidate: Candidate) -> Sequence[float]:
        """Thresholds that are the same whatever was seen."""
        if isinstance(self.taus, str):
            if self.taus not in ("paper", "auto", "both"):
                raise ValueError(f"taus={self.taus!r}: allowed are paper, auto, both, or a list of numbers")
            return PAPER_TAUS if self.taus in ("paper", "both") else ()
        for tau in self.taus:
            check_tau(tau)
        return sorted(set(self.taus))

    def _picked(self, candidate: Candidate, parts: Mapping[str, Any]) -> list[Setting]:
        """Settings at thresholds picked from scores: in each region its own, if the candidate has a part for each."""
        if self.taus not in ("auto", "both"):
            return []
        found = {
            region: taus_of(part, self.recorded(region), self.readout, self.targets)
            for region, part in parts.items()
            if isinstance(part, Spec) and part.open
        }
        if "" in found:
            return [self._setting(candidate, parts, tau) for tau in sorted(set(found[""].values()))]
        settings = []
        for target in self.targets:
            if all(target in taus for taus in found.values()):
                built = {r: _built(part, found[r][target] if r in found else None) for r, part in parts.items()}
                settings.append(Setting.of(built, self.subject.regions).named(candidate.name))
        return settings

    def grid(self, candidate: Candidate, region: str) -> list[HaltingPolicy[Any]]:
        """A region's policy at each of its own thresholds; the one policy where no threshold is open.

        Raises:
            ValueError: a bad spec, or no threshold.
        """
        parts = self.parts(candidate)
        part = parts.get(region, parts.get(""))
        if not isinstance(part, Spec):
            return [_built(part, None)]
        if not part.open:
            return [spec.build() for spec in part.sweep or [part]]
        taus = set(self._common(candidate))
        if isinstance(self.taus, str):
            taus |= set(taus_of(part, self.recorded(region), self.readout, self.targets).values())
        if not taus:
            raise ValueError(_no_threshold(f"{candidate.name!r} in region {region!r}"))
        return [_built(part, tau) for tau in sorted(taus)]

    def recorded(self, region: str) -> list[RegionTrajectory]:
        """The recordings of one region; of all, where none is named."""
        if region:
            return [recording[region] for recording in self.look.recordings]
        return [one for recording in self.look.recordings for one in recording.values()]


def _no_threshold(what: str) -> str:
    return (
        f"no threshold for {what} could be picked from its scores over the steps that were seen: say which taus to "
        "try, or run more steps"
    )


def _built(part: Any, tau: float | None) -> HaltingPolicy[Any]:
    """The policy of a part, at a threshold if its own is open."""
    if not isinstance(part, Spec):
        built: HaltingPolicy[Any] = part
        return built
    return (part.with_default("tau", repr(tau)) if tau is not None else part).build()


def suggested_depths(
    settings: Sequence[Setting],
    recorded: Mapping[str, RegionTrajectory],
    readout: Readout | None,
    known: Sequence[Depth] = (),
) -> list[Depth]:
    """The fixed depths that policies suggest: in each region the mean of the steps that a policy takes there, rounded.

    What a policy finds may be no more than the depth of each region. A fixed depth has that for nothing, so it is the
    baseline that a policy must beat.

    Args:
        settings: of policies, which are judged on the recording; a table cannot be.
        recorded: the loops at full depth by region, on some sample.
        readout: for recorded states (see :func:`haltkit.readout_of_recordings`).
        known: depths that are there already.

    Returns:
        the ``SUGGESTED`` least deep ones that are not known already.
    """
    found: set[tuple[int, ...]] = set()
    for setting in (one for one in settings if not one.looked_up):
        with torch.no_grad():
            steps = [replay(setting.policies[name], region, readout=readout).steps for name, region in recorded.items()]
        found.add(tuple(max(1, round(float(taken.double().mean()))) for taken in steps))
    new = [Depth(dict(zip(recorded, steps, strict=True))) for steps in sorted(found, key=lambda s: (sum(s), s))]
    return [depth for depth in new if depth not in set(known)][:SUGGESTED]
