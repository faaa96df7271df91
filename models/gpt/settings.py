"""How texts are continued: the settings of ``generate``, and which sampler takes which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from haltkit.models.gpt.sampling import GenerationError, Sampling
from haltkit.specs import Policies

__all__ = ["Settings"]

# The settings that belong to some samplers only.
_OWN: dict[str, tuple[str, ...]] = {
    "sequential": (),
    "speculative": ("draft", "ahead"),
    "wavefront": ("width", "commit", "inner", "verify", "ahead"),
}


@dataclass(frozen=True)
class Settings:
    """How texts are continued.

    Args:
        max_new_tokens: of each sequence; it also ends at a stop token or where the context is full.
        sampling: how a token is drawn.
        stop: token ids that end a sequence and are not returned.
        layout: of the cache: ``depth-indexed``, exact; or a smaller one that is an approximation: ``last``,
            ``modulo:M`` (see :mod:`haltkit.models.gpt.cache`).
        max_loops, total_loops: budgets of each region, and of a token over all regions.
        sampler: ``sequential``: one token after the other. ``speculative``: drafts of few loops, verified several at a
            time, exact (see :mod:`haltkit.models.gpt.speculative`). ``wavefront``: several positions at the same time,
            an approximation (see :mod:`haltkit.models.gpt.wavefront`). The last two continue prompts one after the
            other.
        draft: of speculative sampling, the policy that drafts (None: ``fixed:steps=1``).
        ahead: drafts before a pass verifies them (None: 4, and 8 of a wavefront); of a wavefront only with ``verify``.
        verify: of the wavefront, whether what it commits are drafts, which the policy verifies in one pass: exact.
        width: of the wavefront, the greatest number of open positions (None: 8).
        commit: of the wavefront, what settles a new token (None: the policy that the prompt is read with).
        inner: of the wavefront, steps per sweep in each region (None: 1).

    Raises:
        GenerationError: ``max_new_tokens`` below 1, an unknown sampler, or settings of the other sampler.
    """

    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[int] = ()
    layout: str = "depth-indexed"
    max_loops: int | Mapping[str, int] = 32
    total_loops: int | None = None
    sampler: Literal["sequential", "speculative", "wavefront"] = "sequential"
    draft: Policies | None = None
    ahead: int | None = None
    verify: bool | None = None
    width: int | None = None
    commit: Policies | None = None
    inner: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens={self.max_new_tokens}: it must be at least 1")
        if self.sampler not in _OWN:
            raise GenerationError(f"sampler={self.sampler!r}: allowed are {', '.join(_OWN)}")
        for name in dict.fromkeys(name for names in _OWN.values() for name in names):
            if getattr(self, name) is not None and name not in _OWN[self.sampler]:
                fitting = " or ".join(sampler for sampler, names in _OWN.items() if name in names)
                raise GenerationError(f"{name} is a setting of sampler={fitting}; the sampler is {self.sampler}")
        if self.sampler == "wavefront" and self.ahead is not None and not self.verify:
            raise GenerationError("ahead is how many drafts of a wavefront are verified at a time: it needs verify")

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """From fields of this class and of :class:`~haltkit.models.gpt.sampling.Sampling`, side by side.

        Raises:
            GenerationError: an unknown field, or a value that is not allowed.
        """
        drawn = {f.name for f in fields(Sampling)}
        known = ({f.name for f in fields(cls)} - {"sampling"}) | drawn
        if unknown := sorted(values.keys() - known):
            raise GenerationError(f"generate has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
        sampling = Sampling(**{name: value for name, value in values.items() if name in drawn})
        return cls(sampling=sampling, **{name: value for name, value in values.items() if name not in drawn})
