"""``haltkit doctor``: what is installed, where models run, and whether halting does here what it should."""

from __future__ import annotations

import time
from typing import Any

import typer

from haltkit.cli.device import Device, choose_device, describe_device
from haltkit.cli.options import JsonPath
from haltkit.cli.terminal import check_writable, make_console, progress, say, write_results

# What a feature needs beside torch and numpy, by the names of the distributions, and what to install where it lacks.
FEATURES = {
    "checkpoints": (("safetensors", "tiktoken", "tokenizers"), "haltkit"),
    "training": (("datasets", "pyyaml", "tensorboard"), "haltkit"),
    "figures and pages": (("matplotlib", "plotly"), "haltkit"),
    "models of transformers": (("transformers",), "transformers"),
    "lm-eval": (("lm-eval", "transformers", "accelerate"), "'haltkit[eval]'"),
}
STEPS = 3


def doctor(device: Device = "auto", json_path: JsonPath = None) -> None:
    """Tell versions and what is installed for which feature, and check halting on the bundled models (seconds).

    Exit code 1: a check failed.
    """
    import platform

    json_path = check_writable(json_path)
    with progress("looking for devices"):
        place = choose_device(device)
    console, where = make_console(json_path), describe_device(place)
    versions = {name: _version(name) for name in ("haltkit", "torch", "numpy")}
    features = {feature: {name: _version(name) for name in names} for feature, (names, _) in FEATURES.items()}
    named = {"python": platform.python_version(), **versions}
    say(console, ", ".join(f"{name} {version}" for name, version in named.items()))
    say(console, f"device: {where}")
    for feature, found in features.items():
        missing = ", ".join(name for name, version in found.items() if version is None)
        there = ", ".join(f"{name} {version}" for name, version in found.items())
        said = f"missing {missing}: pip install {FEATURES[feature][1]}" if missing else f"ready ({there})"
        say(console, f"{feature}: {said}")
    checks: dict[str, dict[str, Any]] = {}
    for name in ("text", "chase", "sudoku"):
        with progress(f"self-check {name}"):
            check = checks[name] = _check(name, str(place))
        say(console, f"self-check {name}: {'passed' if check['passed'] else 'FAILED'} ({check['found']})")
    about = {"python": platform.python_version(), "versions": versions, "device": where}
    write_results(console, json_path, {**about, "features": features, "checks": checks})
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
