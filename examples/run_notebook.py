"""Run a notebook's code cells in order, in one namespace, and store what they print and draw; no Jupyter needed.

    python examples/run_notebook.py examples/tour.ipynb            # stores outputs and pictures in the notebook
    python examples/run_notebook.py examples/tour.ipynb --check    # runs it and stores nothing

What is stored is nbformat 4.5: standard output, the value of a cell's last line, and pyplot's figures as PNG.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import time
from pathlib import Path
from typing import Any

import matplotlib

from haltkit.files import read_json, write_json

DPI = 72


def run_cell(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The outputs of one cell, as a notebook stores them."""
    from matplotlib import pyplot

    tree, value = ast.parse(source), None
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    outputs: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if last is not None:
            value = eval(compile(last, f"cell {number}", "eval"), namespace)
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines_of(printed.getvalue())})
    if value is not None:
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        outputs.append({**result, "data": {"text/plain": lines_of(repr(value))}})
    for figure in map(pyplot.figure, pyplot.get_fignums()):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    pyplot.close("all")
    return outputs


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="store nothing")
    options = parser.parse_args()
    matplotlib.use("Agg")
    notebook = read_json(options.notebook, "the notebook", dict)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    started = time.perf_counter()
    for number, cell in enumerate(code, 1):
        outputs = run_cell("".join(cell["source"]), namespace, number)
        cell |= {"execution_count": number, "outputs": outputs}
        print(f"cell {number}: {', '.join(one['output_type'] for one in outputs) or 'no output'}")
    print(f"{len(code)} cells in {time.perf_counter() - started:.1f} s")
    if not options.check:
        write_json(options.notebook, notebook)


if __name__ == "__main__":
    main()
