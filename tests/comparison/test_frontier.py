"""The frontier's picture: labels that can be read, and error bars only where errors are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from haltkit.comparison import Comparison
from haltkit.reporting.frontier import draw_frontier, styles_of

REPRODUCTION = Path(__file__).parents[2] / "examples" / "reproduction"
FILES = ("compare.json", "reasoners/chase/compare.json", "reasoners/sudoku/compare.json")


def comparison(name: str) -> Comparison:
    return Comparison.from_json(json.loads((REPRODUCTION / name).read_text(encoding="utf-8")))


def drawn(result: Comparison, size: tuple[float, float] = (6, 4)) -> Any:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw_frontier(axes, result, styles_of(result.policies))
    figure.draw_without_rendering()
    return axes


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [(4, 3), (6, 4), (11, 8)])
def test_labels_of_depths_can_be_read(name: str, size: tuple[float, float]) -> None:
    result = comparison(name)
    axes = drawn(result, size)
    boxes = {label.get_text(): label.get_window_extent() for label in axes.texts}
    inside, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    points = axes.transData.transform([(row.ms, row.delta) for row in result.rows])
    for box in boxes.values():
        others = [other for other in boxes.values() if other is not box]
        assert box.count_overlaps([*others, legend]) == 0
        assert not any(box.contains(*point) for point in points)
        assert inside.contains(box.x0, box.y0)
        assert inside.contains(box.x1, box.y1)
    depths = [int(name) for name in boxes]
    same = [row.depth for row in result.rows if row.depth is not None and len(set(row.depth.values())) == 1]
    assert {1, max(max(depth.values()) for depth in same)} <= set(depths)


def test_an_error_that_is_not_known_is_not_drawn() -> None:
    result = comparison(FILES[0])
    rows = tuple(replace(row, delta_se=math.inf) for row in result.rows)
    assert max(map(abs, drawn(replace(result, rows=rows)).get_ylim())) < 10
