"""One self-contained HTML page of what ``haltkit diagnose`` found: opens from disk, needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any, cast

from haltkit.diagnostics.errors import DiagnosticError

__all__ = ["render_page"]

_ROW = ("policy", "spec", "tau", "ce", "delta_ce", "delta_ce_se", "steps", "ms_per_token", "speedup")
_MISSING = (
    '<p class="soft">No trade-off plot: write compare.json into the folder with <code>haltkit compare --json</code> '
    "and diagnose again.</p>"
)
_SIGNALS = ("step_norm_mean", "step_norm_std", "cosine_mean", "cosine_std", "floor")


def render_page(results: Mapping[str, Any]) -> str:
    """The page, plotly.js and all, from results as ``haltkit diagnose`` writes them.

    Raises:
        DiagnosticError: results without any geometry to show.
    """
    from plotly.offline import get_plotlyjs

    models = results.get("models") or {}
    if not (models.get("trained") or {}).get("geometry", {}).get("regions"):
        raise DiagnosticError("these results hold nothing to show: run haltkit diagnose to the end of its first part")
    comparison = results.get("comparison")
    data = {
        # A list: JavaScript puts keys that look like numbers before all others.
        "regions": list(models["trained"]["geometry"]["regions"]),
        "comparison": None if comparison is None else [{k: row.get(k) for k in _ROW} for row in comparison["rows"]],
        "geometry": {name: _geometry(found["geometry"]) for name, found in models.items()},
        "paths": models["trained"].get("paths"),
        "tokens": models["trained"].get("tokens"),
    }
    about = results.get("about") or {}
    folder = resources.files("haltkit") / "page"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    script: str = cast(Any, get_plotlyjs)()
    return Template(read("page.html")).substitute(
        title=html.escape(f"The loops of {about.get('model', 'a model')}"),
        about=html.escape(_about(results)),
        partial='<p class="partial">Partial: the diagnosis was interrupted.</p>' if results.get("partial") else "",
        missing=_MISSING if comparison is None else "",
        css=read("page.css"),
        # Inside a script a closing tag would end it, wherever it stands.
        plotly=script.replace("</script", "<\\/script"),
        js=read("page.js"),
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/"),
        claims="\n".join(_claim(one) for one in results.get("claims") or []),
    )  # fmt: skip


def _geometry(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"regions": {n: {k: region.get(k) for k in _SIGNALS} for n, region in found["regions"].items()}}


def _about(results: Mapping[str, Any]) -> str:
    about = results.get("about") or {}
    found = results["models"]["trained"]["geometry"]
    parts = [f"{about['tokens_seen']:,} tokens of training"] if about.get("tokens_seen") else []
    parts += [f"geometry of {found['tokens']:,} tokens at {found['loops']} loops"]
    parts += [f"text: {about['text']}"] if about.get("text") else []
    return "; ".join(parts)


def _claim(one: Mapping[str, Any]) -> str:
    def values(key: str) -> str:
        shown = []
        for label, v in one[key].items():
            number = "?" if v["value"] is None else f"{v['value']:.3g}"
            spread = "" if v["spread"] is None else f" ± {v['spread']:.2g}"
            shown.append(f"{label}: {number}{spread}")
        return html.escape("; ".join(shown))

    verdict = one["verdict"]
    reason = f"<br><span class='soft'>{html.escape(one['reason'])}</span>" if one["reason"] else ""
    rule = html.escape(f"{one['quantity']}; {one['rule']}", quote=True)
    text = f"{html.escape(one['text'])} {one['paper']}{reason}"
    return (
        f'<tr><td>{html.escape(one["name"])}</td><td title="{rule}">{text}</td>'
        f"<td data-name='measured'>{values('measured')}</td><td data-name='untrained'>{values('untrained')}</td>"
        f"<td class='verdict {verdict.split()[0]}'>{verdict.removesuffix(' at this scale')}</td></tr>"
    )
