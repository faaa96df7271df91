"""What the surveys find, as values: their fields are the schema of ``diagnose.json``.

Lists over k run from the first loop step to the last; None stands for what is not defined, or was not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from haltkit.diagnostics.numbers import Numbers, numbers
from haltkit.diagnostics.schema import FLAT, SPARSE, Curve
from haltkit.diagnostics.unfolding import Unfolding

__all__ = [
    "Attention",
    "Cell",
    "Control",
    "Curve",
    "Cycle",
    "Geometry",
    "LayerCurves",
    "Limits",
    "Paths",
    "Ratio",
    "RegionAttention",
    "RegionGeometry",
    "RegionLimits",
    "Seed",
    "Segment",
    "Snapshot",
    "Spread",
    "Stage",
    "Survey",
    "Tokens",
]


@dataclass(frozen=True)
class Spread:
    """One quantity over tokens: mean, standard deviation, and how many tokens have it."""

    mean: float | None
    std: float | None = None
    tokens: int | None = field(default=None, metadata=SPARSE)


@dataclass(frozen=True)
class Ratio:
    """DLR at a boundary in one convention, over tokens; the spread is not kept in reduced statistics."""

    mean: float | None
    std: float | None = field(default=None, metadata=SPARSE)
    median: float | None = None


@dataclass(frozen=True)
class RegionGeometry:
    """How one region moves, a curve per signal.

    Attributes:
        tokens: how many were measured.
        nonfinite: how many of them ended in a state that is not finite; means are over what was finite of them.
        curves: signal to its curve: ``step_norm``, ``state_norm``, ``acceleration``, ``cosine``, ``turn`` and, of
            recorded states, ``relative_step``, ``normalized_acceleration``, ``curvature``, ``distance_to_last``.
        cosine_of_means: cosine of successive mean steps, which differs from the mean of the cosines.
        contraction: the factor by which a row's steps shrink.
        floor: rounding floor at the mean state norm.
        floor_measured: median of the last mean steps.
    """

    tokens: int | None = field(default=None, metadata=SPARSE)
    nonfinite: int | None = field(default=None, metadata=SPARSE)
    curves: dict[str, Curve] = field(default_factory=dict, metadata=FLAT)
    cosine_of_means: Numbers = field(default=(), metadata=SPARSE)
    contraction: Spread | None = field(default=None, metadata=SPARSE)
    floor: float | None = field(default=None, metadata=SPARSE)
    floor_measured: float | None = field(default=None, metadata=SPARSE)

    def mean(self, signal: str) -> list[float]:
        """A signal's mean at each step, NaN where it is not defined; empty if the signal was not measured."""
        return numbers(self.curves[signal].mean) if signal in self.curves else []

    def std(self, signal: str) -> list[float]:
        """A signal's spread over tokens at each step; empty if it was not measured."""
        return numbers(self.curves[signal].std) if signal in self.curves else []


@dataclass(frozen=True)
class Geometry:
    """The geometry of every region at a fixed depth, and the DLR: ``{"a -> b": {convention: ...}}``."""

    loops: int = 0
    tokens: int = 0
    partial: bool = False
    regions: dict[str, RegionGeometry] = field(default_factory=dict)
    dlr: dict[str, dict[str, Ratio]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Reduced geometry of a model at one time of its training: what the figures across training need.

    Attributes:
        tokens_seen: by the model until then.
        steps: optimizer steps until then, where it is known.
        loops, tokens: the depth of the measurement, and how many tokens were measured.
    """

    tokens_seen: int
    steps: int | None = field(default=None, metadata=SPARSE)
    loops: int
    tokens: int | None = field(default=None, metadata=SPARSE)
    regions: dict[str, RegionGeometry]
    dlr: dict[str, dict[str, Ratio]]


@dataclass(frozen=True)
class LayerCurves:
    """One layer of a cycle: how its output moves over steps, and how far it is from its last."""

    curves: dict[str, Curve] = field(default_factory=dict, metadata=FLAT)


Counts = dict[str, int]


@dataclass(frozen=True)
class RegionLimits:
    """Where one region's loop ends, in a long run.

    Attributes:
        curves: ``distance`` to the last state, and ``relative_distance``.
        limits: measure (``cosine``, ``distance``) to how many tokens have each type of limit.
        periods: length of an orbit to how many tokens have it.
        settled_at: the step from which the relative distance stays within the tolerance.
        norm_growth: the last state's norm over that half way.
        distance_over_small_step: distance to the last state over the step, at the first small step.
        layer_limits: layer to how many tokens have each type of limit, by cosine.
        layers: layer to its curves.
        least_cosine: least cosine between the layers' last states; None for one layer.
        distinct: share of tokens whose layers rest at distinct points; None for one layer.
    """

    limits: dict[str, Counts]
    distance_over_small_step: Spread
    curves: dict[str, Curve] = field(default_factory=dict, metadata=FLAT)
    nonfinite: int = 0
    periods: Counts = field(default_factory=dict)
    settled_at: Spread = Spread(None)
    norm_growth: Spread = Spread(None)
    layer_limits: dict[str, Counts] = field(default_factory=dict)
    layers: dict[str, LayerCurves] = field(default_factory=dict)
    least_cosine: Spread | None = None
    distinct: float | None = None

    def mean(self, signal: str) -> list[float]:
        return numbers(self.curves[signal].mean) if signal in self.curves else []


@dataclass(frozen=True)
class Limits:
    """The long run: where each region's loop ends, and by which bounds that was judged."""

    loops: int = 0
    tokens: int = 0
    partial: bool = False
    tolerance: float = 0.0
    share: float = 0.0
    small_step: float = 0.0
    regions: dict[str, RegionLimits] = field(default_factory=dict)


@dataclass(frozen=True)
class RegionAttention:
    """How the attention of one region's layers settles. Lists are ``[step][layer]``.

    Attributes:
        layers: their names, in the order of the cycle.
        frobenius: distance between the matrices of all (step, layer) pairs, step by step.
        successive: change of a layer's attention from the step before, from the second one on.
        to_last: distance of a layer's attention to the last step's.
        moved: mean norm of the change of a layer's states, from the second step on.
        profiles: statistic to its values.
    """

    layers: tuple[str, ...]
    successive: tuple[Numbers, ...]
    moved: tuple[Numbers, ...]
    profiles: dict[str, tuple[Numbers, ...]]
    frobenius: tuple[Numbers, ...] = ()
    to_last: tuple[Numbers, ...] = ()


@dataclass(frozen=True)
class Attention:
    """Attention inside every region; ``unseen`` names the regions whose attention could not be captured."""

    loops: int = 0
    windows: int = 0
    tokens: int = 0
    partial: bool = False
    unseen: tuple[str, ...] = ()
    regions: dict[str, RegionAttention] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """States of the chosen tokens in a plane: ``points[token][k]``, a point having two coordinates."""

    name: str
    loop: bool
    points: tuple[tuple[Numbers, ...], ...]


@dataclass(frozen=True)
class Cycle:
    """The last token's states inside one region, in a plane of their own: ``points[step][layer]``."""

    layers: tuple[str, ...]
    explained: Numbers
    points: tuple[tuple[Numbers, ...], ...]


@dataclass(frozen=True)
class Paths:
    """One sequence's states over depth and loop steps in the plane of two principal components.

    Attributes:
        explained: share of the variance along each component.
        positions: of the chosen tokens, whose ``text`` stands beside them.
        segments: the residual stream from bottom to top.
        cycles: region of two or more layers to its cycle.
    """

    explained: Numbers = ()
    positions: tuple[int, ...] = ()
    text: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()
    cycles: dict[str, Cycle] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """One window, token by token.

    Attributes:
        text: of each token.
        loops: depth of the recording.
        curves: region to signal to ``[token][k]``.
        steps: policy to region to the steps each token took.
        how: ``native`` if the model halted the tokens itself; ``replayed`` if the recording was judged.
        left_out: policy to the reason why it has no steps.
    """

    text: tuple[str, ...] = ()
    loops: int = 0
    curves: dict[str, dict[str, tuple[Numbers, ...]]] = field(default_factory=dict)
    steps: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    how: Literal["native", "replayed"] = "replayed"
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One pass of a region matched with a feed-forward profile (see :class:`haltkit.diagnostics.StageMatch`)."""

    correlation: float | None
    shuffled_mean: float | None
    shuffled_high: float | None


@dataclass(frozen=True)
class Survey:
    """Everything that was found out about one model; a part that was not run is empty.

    ``stages`` is region to statistic to one match per pass.
    """

    geometry: Geometry = field(metadata=SPARSE, default_factory=Geometry)
    limits: Limits = field(metadata=SPARSE, default_factory=Limits)
    attention: Attention = field(metadata=SPARSE, default_factory=Attention)
    paths: Paths = field(metadata=SPARSE, default_factory=Paths)
    tokens: Tokens = field(metadata=SPARSE, default_factory=Tokens)
    stages: dict[str, dict[str, tuple[Stage, ...]]] = field(metadata=SPARSE, default_factory=dict)
    unfolding: Unfolding = field(metadata=SPARSE, default_factory=Unfolding)

    def with_part(self, name: str, found: Any) -> Survey:
        """The same survey with one more part."""
        return replace(self, **{name: found})


@dataclass(frozen=True)
class Control:
    """A model without loops: statistic of its attention to the profile over its layers."""

    layers: tuple[str, ...]
    profiles: dict[str, Numbers]
    tokens_seen: int | None = None


@dataclass(frozen=True)
class Seed:
    """One untrained block: tokens by type of limit, by each measure, and the type of most of them."""

    limit: str
    cosine: Counts = field(default_factory=dict)
    distance: Counts = field(default_factory=dict)
    growth: float | None = None
    least_cosine: float | None = None
    distinct: float | None = None


@dataclass(frozen=True)
class Cell:
    """One cell of the grid of untrained blocks.

    Attributes:
        limit: that of most seeds, ``mixed`` on a tie.
        fixed: measure to the share of tokens at a fixed point.
        growth: ratio of the last state's norm to that half way.
        least_cosine, distinct: as in :class:`RegionLimits`.
    """

    norm: str
    injection: str
    layers: int
    limit: str
    fixed: dict[str, float | None]
    growth: float | None = None
    least_cosine: float | None = None
    distinct: float | None = None
    seeds: tuple[Seed, ...] = ()
