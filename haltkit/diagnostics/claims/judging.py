"""Judge every claim on a diagnosis, and set the judgements out as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from haltkit.diagnostics.claims import mechanistic, two_scale, two_scale_policies
from haltkit.diagnostics.claims.rules import Claim, Measured
from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.judgement import YES, Judgement, Value, show_values
from haltkit.diagnostics.numbers import finite

__all__ = ["CLAIMS", "claims_by_model", "claims_table", "judge"]

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
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def claims_by_model(diagnoses: Mapping[str, Diagnosis]) -> str:
    """The judgements of several diagnoses side by side, as a Markdown document: a column for each, by its heading."""
    names = list(diagnoses)
    found = {(one.name, one.paper): one for diagnosis in diagnoses.values() for one in diagnosis.claims}
    columns = [{(one.name, one.paper): one for one in diagnosis.claims} for diagnosis in diagnoses.values()]
    lines = [
        f"# Claims, judged on {', '.join(names)}",
        "",
        "The same rules for every model; they stand in `haltkit/diagnostics/claims/`. Brackets have what was measured; "
        "behind the bar stands what the same shape with fresh weights measures. [P] is arXiv 2509.23314, [M] arXiv "
        "2604.11791.",
        "",
        _row(("", "claim", *names)),
        "|---" * (2 + len(names)) + "|",
    ]
    for key, claim in found.items():
        cells = [_judged(column[key]) if key in column else "" for column in columns]
        lines.append(_row((claim.name, f"{claim.text} {claim.paper}", *cells)))
    return "\n".join(lines) + "\n"


def _judged(one: Judgement) -> str:
    numbers = show_values(one.measured)
    if one.untrained:
        numbers += f" | {show_values(one.untrained)}"
    return f"**{one.ruling}**" + (f" ({numbers})" if numbers else "") + (f": {one.reason}" if one.reason else "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
