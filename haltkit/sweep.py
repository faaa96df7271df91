"""The settings of a comparison: each policy at the thresholds that were asked for, or that its scores suggest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from haltkit.comparison import PAPER_TAUS, TARGET_STEPS, Setting, observed_taus
from haltkit.offline import replay, scores
from haltkit.protocol import Readout, check_tau
from haltkit.registry import Spec, policy, policy_class
from haltkit.trajectory import RegionTrajectory

__all__ = ["depth_settings", "sweep_settings"]

SUGGESTED = 6  # depths at most


def sweep_settings(
    specs: Sequence[Spec],
    taus: str | Sequence[float],
    recorded: Callable[[], Sequence[RegionTrajectory]],
    readout: Readout | None,
    *,
    granularity: str | None = None,
    default_granularity: str | None = None,
    targets: Sequence[int] = TARGET_STEPS,
) -> list[Setting]:
    """One setting for each spec that has a ``tau``, and a sweep for each of the others.

    Args:
        taus: ``paper`` (Figure 4's), ``auto`` (picked from the scores that each policy has on ``recorded``), ``both``,
            or the thresholds.
        recorded: the loops at full depth, to observe scores on; called only if thresholds are picked from them.
        granularity: for every policy that does not say its own; one that says another is refused. None:
            ``default_granularity``, where a policy says nothing; without one, each token decides for itself.
        targets: steps at which picked thresholds should stop a typical row.

    Raises:
        ValueError: a bad spec, or no threshold for a policy.
    """
    settings: list[Setting] = []
    for spec in specs:
        label = str(replace(spec, keys=tuple((k, v) for k, v in spec.keys if k != "tau")))
        wanted = granularity or (default_granularity if spec.get("granularity") is None else None)
        if wanted is not None and spec.takes("granularity"):
            spec = spec.with_key("granularity", wanted)
        causal = spec.get("granularity") in (None, "token")
        if not spec.takes("tau") or spec.get("tau") is not None:
            spec.build()
            written = spec.get("tau")
            tau = float(written) if written is not None and not spec.parts else None
            settings.append(Setting(label, str(spec), tau, causal=causal))
            continue
        sweep = _sweep(spec, taus, recorded, readout, targets)
        if not sweep:
            raise ValueError(
                f"no threshold for {label!r} could be picked from its scores over the loops that were seen: say which "
                "taus to try, or run more loops"
            )
        built = [(tau, spec.with_key("tau", f"{tau!r}")) for tau in sweep]
        for _, one in built:
            one.build()
        settings += [Setting(label, str(one), tau, causal=causal) for tau, one in built]
    return settings


def depth_settings(
    settings: Sequence[Setting], recorded: Mapping[str, RegionTrajectory], readout: Readout | None
) -> list[Setting]:
    """The fixed depths that policies suggest: in each region the mean of the steps that a policy takes there, rounded.

    What a policy finds may be no more than the depth of each region. A fixed depth has that for nothing, so it is the
    baseline that a policy must beat.

    Args:
        settings: those of policies are judged on the recording; the depths of the others are known already.
        recorded: the loops at full depth by region, on some text.

    Returns:
        the ``SUGGESTED`` least deep ones that are not known already.
    """
    known = {setting.loops for setting in settings if isinstance(setting.loops, int)}
    found: set[tuple[int, ...]] = set()
    for setting in settings:
        if setting.loops is None:
            judge = policy(setting.spec)
            with torch.no_grad():
                steps = [replay(judge, region, readout=readout).steps for region in recorded.values()]
            found.add(tuple(max(1, round(float(taken.double().mean()))) for taken in steps))
    suggested = []
    for depths in sorted(found, key=lambda depths: (sum(depths), depths)):
        if len(set(depths)) > 1:
            by_region = dict(zip(recorded, depths, strict=True))
            spec = ";".join(f"{name}=fixed:steps={depth}" for name, depth in by_region.items())
            suggested.append(Setting("fixed", spec, loops=by_region))
        elif depths[0] not in known:
            suggested.append(Setting("fixed", f"fixed:steps={depths[0]}", loops=depths[0]))
    return suggested[:SUGGESTED]


def _sweep(
    spec: Spec,
    taus: str | Sequence[float],
    recorded: Callable[[], Sequence[RegionTrajectory]],
    readout: Readout | None,
    targets: Sequence[int],
) -> list[float]:
    if not isinstance(taus, str):
        for tau in taus:
            check_tau(tau)
        return sorted(set(taus))
    if taus not in ("paper", "auto", "both"):
        raise ValueError(f"taus={taus!r}: allowed are paper, auto, both, or a list of numbers")
    if spec.parts and taus != "paper":
        raise ValueError(
            f"thresholds for the combination {str(spec)!r} cannot be picked from its scores, whose parts have scales "
            "of their own: give each part a tau, or say which taus to try"
        )
    found = set(PAPER_TAUS) if taus in ("paper", "both") else set()
    if taus in ("auto", "both"):
        judge = spec.with_key("tau", "1").build()
        with torch.no_grad():
            seen = [scores(judge, region, readout=readout).flatten(1) for region in recorded()]
        written = spec.get("patience")
        patience = int(written) if written is not None else getattr(policy_class(spec.name), "patience", 1)
        found |= set(observed_taus(torch.cat(seen, 1), patience, targets))
    return sorted(found)
