"""``haltkit train``: train a text model or a reasoner from a config."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from haltkit.cli.terminal import check_writable, make_console, write_results

# Exit codes besides 0 (done) and 2 (bad input): the run was asked to stop and has saved itself (128 + the signal's
# number, as shells count), or it stopped by itself and its last checkpoint is from before.
STOPPED = {"SIGINT": 130, "SIGTERM": 143}
FAILED = 1


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of one that ships with haltkit: paper, small, tiny, ... for text models; "
            "chase, sudoku, sudoku-9x9 for reasoners.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, logs, snapshots.")] = Path("runs/train"),
    data: Annotated[Path | None, typer.Option(help="Folder made by 'haltkit prepare'; overrides data.path.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in --out; CONFIG is then not needed.")] = False,
    auto_resume: Annotated[
        bool, typer.Option(help="Continue if --out has a checkpoint, else start: for schedulers that run it again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would cost, from three real steps; write nothing.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Overrides train.max_steps.")] = None,
    anneal_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Anneal a copy of this run's last checkpoint into --out.")
    ] = None,
    anneal_steps: Annotated[int, typer.Option(min=1, help="Length of the anneal.")] = 500,
    init_from: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Go on from these weights with a fresh optimizer and a new warmup."),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="With --dry-run: write what it would cost as JSON; - as elsewhere."
        ),
    ] = None,
) -> None:
    """Train a text model or a reasoner. Ctrl-C and SIGTERM save; --resume goes on bit for bit as if never interrupted.

    Several processes: torchrun --nproc-per-node 8 -m haltkit.cli train CONFIG ...; the batch is that of all together.

    Exit codes: 0 done; 130 (Ctrl-C) and 143 (SIGTERM) stopped and saved; 1 diverged, or the disk is full; 2 bad input.
    """
    from rich.console import Console

    from haltkit.cli.text_run import TextProgress, forecast_text
    from haltkit.models.training.config import load_config
    from haltkit.models.training.distributed import join
    from haltkit.models.training.loop import TrainingDiverged
    from haltkit.models.training.loop import train as run_training
    from haltkit.models.training.runs import WriteFailed, checkpoints
    from haltkit.models.training.start import anneal, annealing, continue_from, read_run_config

    # What the readers of `datasets` log beside the exception that they raise is said again in haltkit's one line.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    out, json_path = out.expanduser(), check_writable(json_path)
    if json_path is not None and not dry_run:
        raise ValueError("--json is for --dry-run: what a run measures is written to log.jsonl in --out")
    given = {"--data": data, "--anneal-from": anneal_from, "--init-from": init_from}
    refused = {option for option, value in given.items() if value is not None}
    if _of_a_reasoner(config, out, resume or auto_resume):
        _train_reasoner(config, out, resume, auto_resume, dry_run, steps, refused, json_path)
        return
    # Under torchrun one process talks for all.
    first = int(os.environ.get("RANK", "0")) == 0
    console = make_console(json_path) if first else Console(quiet=True)
    if anneal_from is not None:
        if config is not None or resume or steps is not None or init_from is not None:
            raise ValueError(
                "--anneal-from takes its config from the run: give no CONFIG, --resume, --steps and --init-from"
            )
        run_config = annealing(anneal_from, anneal_steps, data)
    elif config is not None:
        run_config = load_config(config)
        if init_from is not None and resume:
            raise ValueError("--init-from begins a run folder; once it exists, --resume alone goes on with it")
    elif init_from is not None:
        raise ValueError("--init-from needs the CONFIG that the checkpoint was trained with")
    elif resume or (auto_resume and checkpoints(out)):
        run_config = read_run_config(out)
    else:
        raise ValueError("no config: name a YAML file or a shipped config (paper, small, tiny), or add --resume")
    if data is not None:
        run_config = replace(run_config, data=replace(run_config.data, path=str(data)))
    if steps is not None:
        run_config = replace(run_config, train=replace(run_config.train, max_steps=steps))
    if dry_run:
        found = forecast_text(console, run_config)
        write_results(console, json_path if first else None, found)
        return
    resume = resume or (auto_resume and bool(checkpoints(out)))
    try:
        with join():  # one group of processes for making the folder and for training in it
            if anneal_from is not None:
                run_config, resume = anneal(anneal_from, out, anneal_steps, data), True
            elif init_from is not None and not resume:
                run_config, resume = continue_from(init_from, run_config, out), True
            with TextProgress(run_config, console) as progress:
                finished = run_training(run_config, out, resume=resume, on_event=progress.show)
    except (TrainingDiverged, WriteFailed) as error:
        print(f"haltkit: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if not finished:
        console.print(f"Stopped and saved. Go on with: haltkit train --resume --out {out}", soft_wrap=True)
        raise typer.Exit(STOPPED[progress.signal])
    console.print(f"Done: {out / 'final'} is a MODEL for haltkit compare", soft_wrap=True)


def _of_a_reasoner(config: str | None, out: Path, resume: bool) -> bool:
    """Whether the config, or that of the run to go on with, is a reasoner's."""
    from haltkit.models.reasoner.config import is_reasoner_config

    if config is not None:
        return is_reasoner_config(config)
    return resume and is_reasoner_config(out / "config.yaml")


def _train_reasoner(
    config: str | None,
    out: Path,
    resume: bool,
    auto_resume: bool,
    dry_run: bool,
    steps: int | None,
    refused: set[str],
    json_path: Path | None,
) -> None:
    from haltkit.cli.reasoner_run import forecast, run
    from haltkit.models.reasoner.config import load_reasoner_config
    from haltkit.models.reasoner.step import Diverged
    from haltkit.models.reasoner.train import has_run
    from haltkit.models.training.runs import WriteFailed

    if refused:
        raise ValueError(f"{min(refused)} is for text models: a reasoner makes its own data and starts from nothing")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a reasoner is trained by one process: call it without torchrun")
    loaded = load_reasoner_config(out / "config.yaml" if config is None else config)
    if steps is not None:
        loaded = replace(loaded, train=replace(loaded.train, max_steps=steps))
    console = make_console(json_path)
    if dry_run:
        write_results(console, json_path, forecast(console, loaded))
        return
    try:
        stopped = run(console, loaded, out, resume or (auto_resume and has_run(out)))
    except (Diverged, WriteFailed) as error:
        print(f"haltkit: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if stopped is not None:
        console.print(f"Stopped and saved. Go on with: haltkit train --resume --out {out}", soft_wrap=True)
        raise typer.Exit(STOPPED[stopped.name])
    console.print(f"Done: {out / 'final'} is a MODEL for haltkit compare and haltkit solve", soft_wrap=True)
