"""Judge every claim on a diagnosis, and set the judgements out as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from haltkit.diagnostics.claims import mechanistic, two_scale, two_scale_policies
from haltkit.diagnostics.claims.rules import Claim, Measured
from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.judgement import YES, Judgement, Value, show_values
from haltkit.diagnostics.numbers import finite

__all__ = ["CLAIMS", "claims_table", "judge"]

CLAIMS: tuple[Claim, ...] = (*two_scale.CLAIMS, *two_scale_policies.CLAIMS, *mechanistic.CLAIMS)
SHARED = "the untrained model has it too"


def judge(diagnosis: Diagnosis) -> tuple[Judgement, ...]:
    """Every claim, judged; what the diagnosis lacks is a reason why one cannot tell, no error.

    Where a claim is reproduced the untrained model takes the same test: a finding that it shares is not training's.
    """
    found = []
    # The untrained model in the trained one's place, and nothing that is not about a model.
    fresh = Diagnosis(diagnosis.about, diagnosis.untrained, control=diagnosis.control)
    for claim in CLAIMS:
        answer = claim.test(diagnosis)
        if answer.ruling == YES and claim.test(fresh).ruling == YES:
            answer = replace(answer, reason=f"{answer.reason}; {SHARED}" if answer.reason else SHARED)
        found.append(
            Judgement(
                claim.name,
                claim.paper,
                claim.text,
                claim.quantity,
                claim.rule,
                answer.ruling,
                _values(answer.measured),
                _values(answer.untrained),
                answer.reason,
            )
        )
    return tuple(found)


def _values(measured: Mapping[str, Measured]) -> dict[str, Value]:
    return {label: Value(finite(one.value), finite(one.spread)) for label, one in measured.items()}


def claims_table(diagnosis: Diagnosis) -> str:
    """The claims of a diagnosis as a Markdown document."""
    geometry, limits = diagnosis.trained.geometry, diagnosis.trained.limits
    lines = [
        f"# Claims, judged on {diagnosis.heading}",
        "",
        f"Measured on {geometry.tokens:,} tokens at {geometry.loops} loops and {limits.tokens:,} at {limits.loops}, "
        f"{diagnosis.about.get('dtype') or 'its own dtype'}. ± is one standard deviation over tokens. *Untrained* is "
        "the same shape with fresh weights. Rules stand in `haltkit/diagnostics/claims/`. [P] is arXiv 2509.23314, "
        "[M] arXiv 2604.11791.",
        "",
        "| | claim | quantity and rule | measured | untrained | judgement |",
        "|---|---|---|---|---|---|",
    ]
    for one in diagnosis.claims:
        cells = (
            one.name,
            f"{one.text} {one.paper}",
            f"{one.quantity}; *{one.rule}*",
            show_values(one.measured),
            show_values(one.untrained),
            f"**{one.ruling}**" + (f": {one.reason}" if one.reason else ""),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
