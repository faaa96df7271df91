"""One self-contained HTML page of what ``haltkit diagnose`` found: opens from disk, needs no network.

Everything that comes from the results is one block of JSON in which ``<`` is encoded, and the page's script puts it
into the page as text; nothing of it is ever parsed as HTML. Beyond that, the page allows no script but its own two.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from importlib import resources
from string import Template
from typing import Any, cast

from haltkit.comparison import Comparison
from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.judgement import Judgement, show_values
from haltkit.diagnostics.numbers import finite
from haltkit.diagnostics.results import Geometry
from haltkit.diagnostics.schema import encode
from haltkit.diagnostics.unfolding import Unfolding

__all__ = ["render_page"]

_SIGNALS = ("step_norm", "cosine")


def render_page(diagnosis: Diagnosis) -> str:
    """The page, plotly.js and all.

    Raises:
        DiagnosticError: a diagnosis without any geometry to show.
    """
    from plotly.offline import get_plotlyjs

    if not diagnosis.trained.geometry.regions:
        raise DiagnosticError("these results have nothing to show: run haltkit diagnose to the end of its first part")
    folder = resources.files("haltkit.reporting") / "page"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    library: str = cast(Any, get_plotlyjs)()
    # Inside a script a closing tag would end it, and "<!--" begin another mode, wherever they stand.
    scripts = {"plotly": library.replace("</script", "<\\/script").replace("<!--", "<\\!--"), "js": read("page.js")}
    return Template(read("page.html")).substitute(
        scripts,
        css=read("page.css"),
        allowed=" ".join(_fingerprint(script) for script in scripts.values()),
        data=_embedded(_data(diagnosis)),
    )


def _fingerprint(script: str) -> str:
    """How a content security policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """JSON that no HTML parser sees anything in: the only character that could end or change a script is encoded."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _data(diagnosis: Diagnosis) -> dict[str, Any]:
    """What the page shows, as plain values."""
    return {
        "title": f"Diagnosis of {diagnosis.name}",
        "about": _about(diagnosis),
        "partial": diagnosis.partial,
        # A list: JavaScript puts keys that look like numbers before all others.
        "regions": list(diagnosis.trained.geometry.regions),
        "comparison": None if diagnosis.comparison is None else _compared(diagnosis.comparison),
        "geometry": {name: _geometry(survey.geometry) for name, survey in diagnosis.models.items()},
        "paths": encode(diagnosis.trained.paths) if diagnosis.trained.paths.segments else None,
        "tokens": encode(diagnosis.trained.tokens) if diagnosis.trained.tokens.steps else None,
        "unfolding": _unfolding(diagnosis.trained.unfolding),
        "claims": [_claim(one) for one in diagnosis.claims],
    }


def _unfolding(found: Unfolding) -> dict[str, Any] | None:
    return {**encode(found), "settled": list(found.settled)} if found.answers else None


def _about(diagnosis: Diagnosis) -> str:
    seen, text = diagnosis.about.get("tokens_seen"), diagnosis.about.get("text")
    geometry = diagnosis.trained.geometry
    parts = [f"{seen:,} tokens of training"] if seen else []
    parts += [f"geometry of {geometry.tokens:,} tokens at {geometry.loops} loops"]
    parts += [f"text: {text}"] if text else []
    return "; ".join(parts)


# Lines of their own for depths that not all rows share.
_SHOWN = {"kind": "fixed depth by kind", "oracle": "oracle (needs full depth)"}


def _compared(compared: Comparison) -> dict[str, Any]:
    return {
        "metric": compared.metric,
        "unit": compared.unit,
        "item": compared.item,
        "level": compared.levels[len(compared.levels) // 2],
        "rows": [
            {
                "policy": _SHOWN.get(row.decided, row.policy),
                "setting": row.spec or row.label or row.policy,
                "tau": row.tau,
                "loss": row.loss,
                "delta": row.delta,
                "delta_se": finite(row.delta_se),
                "steps": row.steps,
                "ms": row.ms,
                "speedup": row.speedup,
            }
            for row in compared.rows
        ],
    }


def _geometry(geometry: Geometry) -> dict[str, Any]:
    return {
        name: encode(replace(region, curves={key: region.curves[key] for key in _SIGNALS if key in region.curves}))
        for name, region in geometry.regions.items()
    }


def _claim(one: Judgement) -> dict[str, str]:
    return {
        "name": one.name,
        "text": f"{one.text} {one.paper}",
        "rule": f"{one.quantity}; {one.rule}",
        "measured": show_values(one.measured),
        "untrained": show_values(one.untrained),
        "ruling": one.ruling,
        "reason": one.reason,
    }
