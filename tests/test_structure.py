"""The dependency order, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import haltkit

ROOT = Path(__file__).parent.parent
CORE = ROOT / "haltkit"
# Bottom to top; a module imports only from layers below its own, or beside it within one.
LAYERS = [
    {"clock", "signals"},
    {"protocol"},
    {"policies", "wrappers"},
    {"loop"},
    {"registry"},
    {"trajectory"},
    {"recorder", "offline"},
    {"attachment"},
    {"comparison", "diagnostics"},
    {"sweep"},
    {"trial"},
    {"plots", "figures", "report"},
]


def imports(path: Path, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_core_knows_neither_models_nor_command_line() -> None:
    for path in CORE.rglob("*.py"):
        names = imports(path)
        assert not [n for n in names if n.startswith(("haltkit.models", "haltkit.cli"))], path


def test_the_core_imports_torch_and_numpy_only() -> None:
    for path in CORE.rglob("*.py"):
        for name in imports(path, top_level=True):
            top = name.partition(".")[0]
            assert top in {"torch", "numpy", "haltkit", "__future__"} | sys.stdlib_module_names, (path, name)


def test_core_modules_import_downwards_only() -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    modules = [p for p in CORE.rglob("*.py") if p != CORE / "__init__.py"]
    assert {p.relative_to(CORE).parts[0].removesuffix(".py") for p in modules} == set(level)
    for path in modules:
        own = path.relative_to(CORE).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "haltkit" and len(parts) > 1 and parts[1] in level and parts[1] != own:
                assert level[parts[1]] < level[own], f"{own} imports {parts[1]}"


def test_the_models_do_not_know_the_command_line() -> None:
    for path in (ROOT / "models").rglob("*.py"):
        assert not [n for n in imports(path) if n.startswith("haltkit.cli")], path


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
