"""Bring what run folders know of training into this folder, where it is kept when they are gone.

    python examples/reproduction/collect.py runs/small --control runs/small-control --release runs/release

Writes ``snapshots/tokens-*.json``, ``snapshots/release.json`` and ``training.json``; ``haltkit diagnose`` reads the
first two. Without ``--release`` or ``--control`` those parts are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from haltkit.models.checkpoint import load_checkpoint, read_config
from haltkit.models.data import TokenData
from haltkit.models.files import write_json
from haltkit.models.statistics import loop_statistics
from haltkit.models.train import STATISTICS_FILE, STATISTICS_WINDOWS, read_run_config


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


def measure(run: Path, checkpoint: Path) -> dict[str, Any]:
    """Statistics of a checkpoint, on the held-out windows that training takes for its snapshots."""
    config, loaded = read_run_config(run), load_checkpoint(checkpoint)
    held_out = TokenData(Path(config.data.path).expanduser(), config.data.eval_split, config.model.block_size)
    seen = {"tokens_seen": loaded.trained["tokens"], "steps": loaded.trained["steps"]}
    return {**seen, **loop_statistics(loaded.model, held_out.spread(STATISTICS_WINDOWS)[:, :-1])}


def collect(run: Path, control: Path | None, release: Path | None, out: Path) -> None:
    (out / "snapshots").mkdir(parents=True, exist_ok=True)
    rows = []
    for folder in snapshots(run):
        rows.append({"run": "looped", **losses(folder)})
        statistics = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
        write_json(out / "snapshots" / f"{folder.name}.json", statistics)
    if release is not None:
        final = release / "final"
        rows.append({"run": "release (annealed)", **losses(final)})
        write_json(out / "snapshots" / "release.json", measure(release, final))
    if control is not None:
        rows += [{"run": "control", **losses(folder)} for folder in snapshots(control)]
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
