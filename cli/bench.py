"""``haltkit bench``: what halting costs, what it saves, and how much of the theory that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from haltkit.cli.device import Device, choose_device, describe_device
from haltkit.cli.terminal import check_writable, make_console

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

PARTS = ("policies", "overhead", "forward", "decode", "slowest", "break-even", "position", "layouts")
LAYOUTS = ("depth-indexed", "last", "modulo:2", "modulo:4")
_MEANING = {
    "policies": "cost of a policy's update, in parts of one body step (a transformer layer)",
    "overhead": "compact execution at full depth over a bare loop",
    "forward": "teacher-forced passes against full depth",
    "decode": "cached decoding against cached decoding at full depth",
    "slowest": "against iterating until the slowest token is done (bare: no policy; Scripted: drawn depths)",
    "break-even": "share of halted rows from which leaving them behind pays within a step",
    "position": "time a token by its position",
    "layouts": "KV layouts: what they take, what they lose",
}


def bench(
    policies: Annotated[
        str, typer.Option(help="Comma-separated; one without tau gets that at which a typical token takes 6 steps.")
    ] = "accel,kl",
    only: Annotated[str, typer.Option(metavar="LIST", help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder. \\[default: the bundled one]", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file. \\[default: the bundled held-out sample]", show_default=False)
    ] = None,
    max_loops: Annotated[int, typer.Option(min=1, help="Full depth: the budget of each region.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved timing repeats.")] = 3,
    device: Device = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the measurements as JSON.")
    ] = None,
) -> None:
    """Measure, side by side in one run, what halting costs and saves on this machine.

    The bound is the speed-up that counted floating-point operations allow for the steps that occurred, layers that do
    not loop included; realised is the measured speed-up over it. Takes some minutes; leave the machine alone.
    """
    from haltkit.registry import parse_spec_list

    parts = [part.strip() for part in only.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--only {only}: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    specs = parse_spec_list(policies)
    check_writable(json_path)

    import torch

    from haltkit.models import benching, comparing
    from haltkit.models.checkpoint import BUNDLED, load_checkpoint
    from haltkit.models.files import write_json

    loaded = load_checkpoint(checkpoint or BUNDLED, device=choose_device(device))
    model = loaded.model
    if not model.regions:
        raise ValueError(f"{str(checkpoint)!r} is a model without looped regions: there is nothing to halt")
    context, where = model.block_size, model.wte.weight.device
    windows = comparing.text_windows(loaded, text or comparing.SAMPLE, 32 * context)
    windows = windows[torch.arange(32, device=where) % len(windows)]  # a short text repeats
    ids = windows[:, :-1]
    chosen = benching.choose_specs(loaded, specs, windows, max_loops)
    first, half = chosen[0], context // 2
    count = max(1, min(12, context // 8))
    shares = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
    measure: dict[str, Callable[[], Any]] = {
        "policies": lambda: [
            *benching.policy_cost(
                (256, 768),
                (1, 32, 512, 4096),
                model.vocab_size,
                seconds=0.4 * repeats,
                dtypes=[torch.float32],
                device=where,
            ),
            *benching.policy_cost(
                (768,), (512,), model.vocab_size, seconds=0.4 * repeats, dtypes=[torch.bfloat16], device=where
            ),
        ],
        "overhead": lambda: benching.full_depth_overhead(
            model, ids[:8], loops=min(8, max_loops), repeats=2 * repeats + 1
        ),
        "forward": lambda: [
            row
            for batch in (ids[:1], ids[:8], ids[:, : context // 4])
            for row in benching.forward_speed(model, batch, chosen, max_loops=max_loops, repeats=repeats)
        ],
        "decode": lambda: [
            row
            for batch in (ids[:1], ids[:8], ids)
            for row in benching.decode_speed(
                model, batch[:, : half + count], chosen, start=half, max_loops=max_loops, repeats=repeats
            )
        ],
        "slowest": lambda: [
            benching.slowest_row(model, ids[:16, :half], spec, max_loops=max_loops, repeats=repeats)
            for spec in (*chosen, f"haltkit.models.benching:Scripted:deepest={min(16, max_loops)}")
        ],
        "break-even": lambda: benching.break_even(model, (8, 32, 128, 1024), shares, repeats=2 * repeats + 1),
        "position": lambda: benching.position_cost(
            model,
            ids[:1],
            first,
            (context // 4, context - count),
            count=count,
            max_loops=max_loops,
            repeats=2 * repeats + 1,
        ),
        "layouts": lambda: benching.approximate_layouts(
            model, windows[:1, : half + 1], first, LAYOUTS, max_loops=max_loops
        ),
    }
    console = make_console()
    about = {
        "model": str(checkpoint) if checkpoint else "bundled",
        "text": str(text) if text else "bundled sample",
        "machine": machine(),
        "device": describe_device(where),
        "torch": torch.__version__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "max_loops": max_loops,
        "repeats": repeats,
        "policies": chosen,
    }
    console.print(
        f"{about['model']} checkpoint, {about['machine']}, {about['device']}, torch {about['torch']}, "
        f"{about['dtype']}, full depth {max_loops} loops, policies {', '.join(chosen)}",
        highlight=False, markup=False,
    )  # fmt: skip
    results: dict[str, Any] = {}
    for part in PARTS:
        if part not in parts:
            continue
        with console.status(part):
            results[part] = measure[part]()
        _print(console, part, results[part])
    if json_path is not None:
        write_json(json_path, {**about, **results})
        console.print(f"measurements: {json_path}", soft_wrap=True, highlight=False)


def machine() -> str:
    """The processor's name and how many cores may be used."""
    import os
    import platform

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        name += " with AMX" if "amx_bf16" in flags else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def _print(console: Console, part: str, result: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    def table(*headings: str) -> Table:
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, heading in enumerate(headings):
            grid.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
        return grid

    def steps_of(row: dict[str, Any]) -> str:
        return " ".join(f"{mean:.1f}" for mean in row["steps"].values())

    console.print()
    console.print(Text(_MEANING[part], style="bold"))
    if part == "policies":
        grid = table("width, rows", "body ms", *result[0]["relative"])
        for row in result:
            note = "" if row["dtype"] == "float32" else f" {row['dtype']}"
            relative = (f"{100 * value:.1f}%" for value in row["relative"].values())
            grid.add_row(f"{row['width']}, {row['rows']:,}{note}", f"{row['body_ms']:.3f}", *relative)
    elif part == "overhead":
        grid = table("", "overhead")
        for name in ("compact", "compact, accel"):
            grid.add_row(f"{name}, {result['rows']:,} rows, {result['loops']} loops", f"{100 * result[name]:+.1f}%")
    elif part in ("forward", "decode"):
        grid = table("batch x tokens", "policy", "steps", "full ms/token", "ms/token", "bound", "speed-up", "realised")
        for row in result:
            grid.add_row(
                f"{row['batch']} x {row['length']}", row["spec"], steps_of(row), f"{row['full_ms_per_token']:.3f}",
                f"{row['ms_per_token']:.3f}", f"{row['bound']:.2f}x", f"{row['speedup']:.2f}x",
                f"{row['realised']:.2f}",
            )  # fmt: skip
    elif part == "slowest":
        grid = table("policy", "batch", "mean steps", "slowest", "bound", "over bare", "over masked", "tokens/s")
        for row in result:
            grid.add_row(
                row["spec"].removeprefix("haltkit.models.benching:"),
                f"{row['batch']} x {row['length']}",
                steps_of(row),
                " ".join(map(str, row["slowest"].values())),
                f"{row['bound']:.2f}x",
                f"{row['over_bare']:.2f}x",
                f"{row['over_masked']:.2f}x",
                f"{row['tokens_per_second']:,.0f}",
            )
    elif part == "break-even":
        grid = table("rows at hand", "share halted")
        for row in result:
            grid.add_row(f"{row['rows']:,}", "never" if row["at"] is None else f"{row['at']:.1%}")
    elif part == "position":
        grid = table("position", "ms/token", "of it attention")
        for row in result:
            grid.add_row(f"{row['position']}", f"{row['ms_per_token']:.2f}", f"{row['attention_ms']:.2f}")
    else:
        grid = table("layout", "KiB/token", "CE change", "largest logit error", "mean", "agreement", "steps")
        for row in result:
            grid.add_row(
                row["layout"], f"{row['bytes_per_token'] / 1024:.1f}", f"{row['ce_change']:+.5f}",
                f"{row['max_logit_error']:.4f}", f"{row['mean_logit_error']:.4f}", f"{row['agreement']:.1%}",
                steps_of(row),
            )  # fmt: skip
    console.print(grid)
