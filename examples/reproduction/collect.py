"""Bring what run folders know of training into this folder, where it is kept when they are gone.

    python examples/reproduction/collect.py runs/small --control runs/small-control --release runs/small

Writes ``tokens-*.json``, ``untrained.json`` and ``release.json`` into ``snapshots``, and ``training.json``;
``haltkit diagnose`` reads the first. ``--release`` is an annealed copy of the run, or the run itself if it went to its
end. Without ``--release`` or ``--control`` those parts are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from haltkit.files import write_json
from haltkit.models.checkpoint import build_model, load_checkpoint
from haltkit.models.gpt.diagnosing import loop_statistics
from haltkit.models.gpt.files import read_config
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.text.data import TokenData
from haltkit.models.training.evaluation import STATISTICS_FILE, STATISTICS_WINDOWS
from haltkit.models.training.start import read_run_config


def snapshots(run: Path) -> list[Path]:
    """Snapshot folders of a run, by tokens seen."""
    found = sorted((run / "snapshots").glob("tokens-*"))
    if not found:
        raise SystemExit(f"{str(run)!r} has no snapshots")
    return found


def losses(folder: Path) -> dict[str, Any]:
    """Tokens seen, seconds of training and held-out losses, as the checkpoint in ``folder`` records them."""
    _, trained = read_config(folder)
    loss = {loops: round(value, 5) for loops, value in trained["held_out_loss"].items()}
    return {"tokens": trained["tokens"], "seconds": trained["seconds"], "held_out_loss": loss}


def measure(run: Path, model: LoopedGPT) -> dict[str, Any]:
    """Statistics of a model, on the held-out windows that training takes for its snapshots."""
    config = read_run_config(run)
    held_out = TokenData(Path(config.data.path).expanduser(), config.data.eval_split, config.model.block_size)
    seen = {"tokens_seen": model.trained.get("tokens", 0), "steps": model.trained.get("steps", 0)}
    return {**seen, **loop_statistics(model, held_out.spread(STATISTICS_WINDOWS)[:, :-1])}


def collect(run: Path, control: Path | None, release: Path | None, out: Path) -> None:
    (out / "snapshots").mkdir(parents=True, exist_ok=True)
    rows = []
    config = read_run_config(run)
    torch.manual_seed(config.train.seed)  # as training begins
    write_json(out / "snapshots" / "untrained.json", measure(run, build_model(config.model).eval()))
    for folder in snapshots(run):
        rows.append({"run": "looped", **losses(folder)})
        statistics = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
        write_json(out / "snapshots" / f"{folder.name}.json", statistics)
    if release is not None:
        final = release / "final"
        rows.append({"run": "release (annealed)", **losses(final)})
        write_json(out / "snapshots" / "release.json", measure(release, load_checkpoint(final).model))
    if control is not None:
        rows += [{"run": "control", **losses(folder)} for folder in snapshots(control)]
        if (control / "final").is_dir():
            rows.append({"run": "control (annealed)", **losses(control / "final")})
    what = (
        "held-out cross-entropy (nats) at each loop count, on windows spread over the validation split, in the "
        "precision of training; control: the same model with its loops off; seconds: of training, on whatever else "
        "the machine was doing"
    )
    write_json(out / "training.json", {"what": what, "rows": rows})
    print(f"{len(rows)} checkpoints: {out / 'training.json'}\nstatistics: {out / 'snapshots'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--control", type=Path)
    parser.add_argument("--release", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    collect(given.run, given.control, given.release, given.out)
