"""The dependency order, and what importing costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import haltkit

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {"haltkit": ROOT / "haltkit", "haltkit.models": ROOT / "models", "haltkit.cli": ROOT / "cli"}
# Bottom to top. A module imports only from layers below its own, or from its own part of the house.
CORE = [
    {"locks"},
    {"timing", "signals", "files", "trust", "identity", "measured", "standing"},
    {"weights", "headroom"},
    {"protocol", "folders", "calibration"},
    {"policies", "wrappers", "stepwise", "rows", "bodies", "parts", "front", "kinds"},
    {"registry"},
    {"specs"},
    {"loop"},
    {"slots"},
    {"queue"},
    {"cardfile"},
    {"setting", "card"},
    {"recording"},
    {"attachment"},
    {"driving"},
    {"subject"},
    {"watching"},
    {"comparison"},
    {"diagnostics"},
    {"reporting"},
]

MODELS = [
    {"config", "weights"},
    {"text"},
    {"gpt.config", "gpt.draws", "gpt.layers", "gpt.sampling"},
    {"gpt.cost", "gpt.files", "gpt.memory", "gpt.packed", "gpt.settings"},
    {"gpt.cache"},
    {"gpt.chunk", "gpt.open_rows"},
    {"gpt.passes"},
    {"gpt.decoding", "gpt.hub"},
    {"gpt.wavefront"},
    {"gpt.speculative"},
    {"gpt.generation"},
    {"gpt.model"},
    {"checkpoint", "gpt", "gpt.bench", "gpt.evaluate", "gpt.grid"},
    {"gpt.subject"},
    {"gpt.diagnosing"},
    {"training"},
    {"reasoner"},
    {"chase", "sudoku"},
    {"harness"},
]


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Each module of a package by its full name; what stands in for a package is its ``__init__``."""
    root = PACKAGES[package]
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join([package, *(part for part in parts if part != "__init__")]), path


HOUSE = {name: path for package in PACKAGES for name, path in modules(package)}


@cache
def imported(path: Path, top_level: bool = False) -> tuple[str, ...]:
    """Names that a file imports, wherever it does so (``top_level``: when it is loaded)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[str] = []
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def home(name: str) -> str | None:
    """The module of the house that an imported name is of, or None."""
    while name and name not in HOUSE:
        name = name.rpartition(".")[0]
    return name or None


def imports(module: str) -> set[str]:
    """Modules of the house that a module imports, also inside functions and for type checkers."""
    return {found for name in imported(HOUSE[module]) if (found := home(name))} - {module}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which imports, over others, itself."""
    reach = {start: set(ends) for start, ends in graph.items()}
    for middle in graph:
        for ends in reach.values():
            if middle in ends:
                ends |= reach[middle]
    found: list[set[str]] = []
    for start, ends in reach.items():
        if start in ends and not any(start in circle for circle in found):
            found.append({other for other in ends if start in reach[other]})
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_over_others() -> None:
    assert circles({module: imports(module) for module in HOUSE}) == []


def test_nothing_inside_goes_through_the_front_door() -> None:
    """``import haltkit`` from inside would hide what a module depends on."""
    through = {module for module in HOUSE if "haltkit" in imports(module)}
    assert through <= {"haltkit.cli.main", "haltkit.models.training.logs"}  # these ask for the version


def test_every_package_is_in_the_wheel() -> None:
    """A package that pyproject does not list is there in a clone and missing once installed."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^packages = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r'"(.+?)"', listed)) == {name for name, path in HOUSE.items() if path.name == "__init__.py"}


def level_of(module: str, package: str, order: list[set[str]]) -> tuple[int, str] | None:
    """The level of a module and the part it belongs to: itself or the nearest package around it that is listed."""
    level = {name: i for i, layer in enumerate(order) for name in layer}
    part = module.removeprefix(f"{package}.")
    while part and part not in level:
        part = part.rpartition(".")[0]
    return (level[part], part) if part else None


@pytest.mark.parametrize(("package", "order"), [("haltkit", CORE), ("haltkit.models", MODELS)], ids=["core", "models"])
def test_modules_import_downwards_only(package: str, order: list[set[str]]) -> None:
    inside = [module for module, path in modules(package) if path != PACKAGES[package] / "__init__.py"]
    found = {module: level_of(module, package, order) for module in inside}
    assert not [module for module, level in found.items() if level is None], "modules that are in no layer"
    listed = {name for layer in order for name in layer}
    assert listed == {level[1] for level in found.values() if level is not None}, "layers without a module"
    up = [
        (module, other)
        for module, own in found.items()
        for other in imports(module)
        if (theirs := found.get(other)) and own and theirs[1] != own[1] and theirs[0] >= own[0]
    ]
    assert up == []


def test_the_core_knows_neither_models_nor_command_line() -> None:
    for module, _ in modules("haltkit"):
        assert not [name for name in imports(module) if name.startswith(("haltkit.models", "haltkit.cli"))], module


def test_the_models_do_not_know_the_command_line() -> None:
    for module, _ in modules("haltkit.models"):
        assert not [name for name in imports(module) if name.startswith("haltkit.cli")], module


def test_the_core_imports_torch_and_numpy_only() -> None:
    for _, path in modules("haltkit"):
        for name in imported(path, top_level=True):
            top = name.partition(".")[0]
            assert top in {"torch", "numpy", "haltkit", "__future__"} | sys.stdlib_module_names, (path, name)


def loaded_after(code: str) -> set[str]:
    script = f"import sys; {code}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_haltkit_loads_nothing_heavy() -> None:
    assert not {"torch", "numpy", "typer", "matplotlib", "safetensors"} & loaded_after("import haltkit")


def test_using_the_core_loads_torch_and_nothing_optional() -> None:
    names = ", ".join(f"haltkit.{name}" for name in haltkit.__all__)
    loaded = loaded_after(f"import haltkit; {names}")
    assert "torch" in loaded
    assert not {"typer", "matplotlib", "safetensors", "datasets", "tiktoken", "yaml", "haltkit.models"} & loaded


def test_help_needs_no_torch() -> None:
    code = "from typer.testing import CliRunner; from haltkit.cli.main import app; "
    code += "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
    code += "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0"
    assert not {"torch", "numpy", "datasets"} & loaded_after(code)


def test_public_names_are_there() -> None:
    for name in haltkit.__all__:
        assert getattr(haltkit, name) is not None
    assert set(haltkit.__all__) <= set(dir(haltkit))
