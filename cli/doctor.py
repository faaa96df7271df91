"""``haltkit doctor``: what is installed, where models run, and whether halting does here what it should."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from haltkit.cli.device import Device, choose_device, describe_device
from haltkit.cli.terminal import check_writable

# What a feature needs beside torch and numpy, by the names of the distributions.
FEATURES = {
    "checkpoints": ("safetensors", "tiktoken", "tokenizers"),
    "training": ("datasets", "pyyaml", "tensorboard"),
    "figures and pages": ("matplotlib", "plotly"),
    "models of transformers": ("transformers",),
    "lm-eval": ("lm-eval", "transformers", "accelerate"),
}
STEPS = 3


def doctor(
    device: Device = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what was found there, too.")
    ] = None,
) -> None:
    """Tell versions and what is installed for which feature, and check halting on the bundled models (seconds).

    Exit code 1: a check failed.
    """
    import platform

    from haltkit.files import write_json

    json_path = check_writable(json_path)
    place = choose_device(device)
    versions = {name: _version(name) for name in ("haltkit", "torch", "numpy")}
    features = {feature: {name: _version(name) for name in names} for feature, names in FEATURES.items()}
    print(", ".join(f"{name} {version}" for name, version in {"python": platform.python_version(), **versions}.items()))
    print(f"device: {describe_device(place)}")
    for feature, found in features.items():
        missing = [name for name, version in found.items() if version is None]
        print(f"{feature}: {'ready' if not missing else 'missing ' + ', '.join(missing)}")
    checks = {name: _check(name, str(place)) for name in ("text", "chase", "sudoku")}
    for name, check in checks.items():
        print(f"self-check {name}: {'passed' if check['passed'] else 'FAILED'} ({check['found']})")
    if json_path is not None:
        about = {"python": platform.python_version(), "versions": versions, "device": describe_device(place)}
        write_json(json_path, {**about, "features": features, "checks": checks})
    if not all(check["passed"] for check in checks.values()):
        raise typer.Exit(1)


def _version(name: str) -> str | None:
    from importlib import metadata  # not at the top: every command's help would wait for it

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check(name: str, device: str) -> dict[str, Any]:
    """Whether a bundled model, halted by a policy at some step, is the model run with as many steps."""
    import torch

    from haltkit.cli.subjects import resolve

    started = time.perf_counter()
    try:
        subject = resolve(name, {}, set(), device)
        sample = subject.samples[0]
        with torch.no_grad():
            halted = subject.run(sample, f"norm:tau=1e30,min_steps={STEPS}")
            plain = subject.run(sample, STEPS)
            apart = float((subject.losses(halted.output, sample) - subject.losses(plain.output, sample)).abs().max())
    except Exception as error:  # whatever is broken here is what the user asks about
        return {"passed": False, "found": f"{type(error).__name__}: {error}"}
    taken = halted.steps.values()
    deep = bool(taken) and all(bool(steps[steps > 0].eq(STEPS).all()) for steps in taken)
    found = f"losses differ by {apart:.1e}, {'all' if deep else 'not all'} rows halt at step {STEPS}"
    return {"passed": deep and apart < 1e-3, "found": found, "seconds": time.perf_counter() - started}
