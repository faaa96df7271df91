"""``haltkit bench``: what halting costs, what it saves, and how much of the theory that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from haltkit.cli.device import Device, describe_device
from haltkit.cli.grid import Column, print_grid
from haltkit.cli.options import (
    JsonPath,
    MaxLoops,
    Model,
    OldCheckpoint,
    Repeats,
    Text,
    check_policies,
    chosen_model,
)
from haltkit.cli.subjects import text_model
from haltkit.cli.terminal import check_writable, make_console, progress, write_results

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

PARTS = ("policies", "overhead", "forward", "decode", "slowest", "break-even", "position", "samplers", "layouts")
LAYOUTS = ("depth-indexed", "last", "modulo:2", "modulo:4")
_MEANING = {
    "policies": "cost of a policy's update, in parts of one body step (a transformer layer)",
    "overhead": "compact execution at full depth over a bare loop",
    "forward": "teacher-forced passes against full depth",
    "decode": "cached decoding against cached decoding at full depth",
    "slowest": "against iterating until the slowest token is done (bare: no policy; Scripted: drawn depths)",
    "break-even": "share of halted rows from which retiring them pays within a step",
    "position": "time per token by its position",
    "samplers": "one text by each sampler against full depth (same: full depth's choices, given the same prefix)",
    "layouts": "KV layouts: what they take, what they lose",
}


def bench(
    model: Model = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Comma-separated specs, also per region, and paths of saved choices; one without tau gets that at "
            "which a typical token takes 6 steps."
        ),
    ] = "accel,kl",
    only: Annotated[str, typer.Option(metavar="LIST", help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    text: Text = None,
    max_loops: MaxLoops = 32,
    repeats: Repeats = 3,
    device: Device = "auto",
    json_path: JsonPath = None,
    checkpoint: OldCheckpoint = None,
) -> None:
    """Measure, side by side in one run, what halting costs and saves on this machine.

    The bound is the speed-up that counted floating-point operations allow for the steps that occurred, layers that do
    not loop included; realised is the measured speed-up over it. "Over bare loop" is the time above that of a loop of
    as many steps that decides nothing. Takes some minutes; run nothing else meanwhile.
    """
    named = chosen_model(model, checkpoint)
    parts = [part.strip() for part in only.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--only {only}: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    check_policies(policies)
    json_path = check_writable(json_path)

    import torch

    from haltkit import timing
    from haltkit.comparison.settings import candidates
    from haltkit.models.gpt import bench as benching
    from haltkit.models.gpt.subject import SAMPLE, gpt_subject, text_windows

    with progress("loading the model"):
        loaded = text_model(named, "bench", device)
    gpt = loaded.model
    if not gpt.regions:
        raise ValueError(f"{named!r} is a model without looped regions: there is nothing to halt")
    context, where = gpt.block_size, gpt.wte.weight.device
    windows = text_windows(loaded, text or SAMPLE, 32 * context)
    windows = windows[torch.arange(32, device=where) % len(windows)]  # a short text repeats
    ids = windows[:, :-1]
    subject = gpt_subject(gpt, windows[:2], max_loops=max_loops)
    with progress("choosing thresholds"):
        chosen = benching.choose_policies(subject, candidates(policies, subject))
    first, half = next(iter(chosen.values())), context // 2
    count, scripted = max(1, min(12, context // 8)), benching.Scripted(min(16, max_loops))
    shares = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
    measure: dict[str, Callable[[], Any]] = {
        "policies": lambda: [
            *benching.policy_cost(
                (256, 768),
                (1, 32, 512, 4096),
                gpt.vocab_size,
                seconds=0.4 * repeats,
                dtypes=[torch.float32],
                device=where,
            ),
            *benching.policy_cost(
                (768,), (512,), gpt.vocab_size, seconds=0.4 * repeats, dtypes=[torch.bfloat16], device=where
            ),
        ],
        "overhead": lambda: benching.full_depth_overhead(
            gpt, ids[:8], loops=min(8, max_loops), repeats=2 * repeats + 1
        ),
        "forward": lambda: [
            row
            for batch in (ids[:1], ids[:8], ids[:, : context // 4])
            for row in benching.forward_speed(gpt, batch, chosen, max_loops=max_loops, repeats=repeats)
        ],
        "decode": lambda: [
            row
            for batch in (ids[:1], ids[:8], ids)
            for row in benching.decode_speed(
                gpt, batch[:, : half + count], chosen, start=half, max_loops=max_loops, repeats=repeats
            )
        ],
        "slowest": lambda: [
            benching.slowest_row(gpt, ids[:16, :half], name, policy, max_loops=max_loops, repeats=repeats)
            for name, policy in {**chosen, f"Scripted:deepest={scripted.deepest}": scripted}.items()
        ],
        "break-even": lambda: benching.break_even(gpt, (8, 32, 128, 1024), shares, repeats=2 * repeats + 1),
        "position": lambda: benching.position_cost(
            gpt,
            ids[:1],
            first,
            (context // 4, context - count),
            count=count,
            max_loops=max_loops,
            repeats=2 * repeats + 1,
        ),
        "samplers": lambda: benching.sampler_speed(
            gpt, ids[0, :half], chosen, count=max(2, min(32, half)), max_loops=max_loops, repeats=repeats
        ),
        "layouts": lambda: benching.approximate_layouts(
            gpt, windows[:1, : half + 1], first, LAYOUTS, max_loops=max_loops
        ),
    }
    console = make_console(json_path)
    about = {
        "model": named or "bundled",
        "text": str(text) if text else "bundled sample",
        "machine": timing.machine(),
        "device": describe_device(where),
        "torch": torch.__version__,
        "dtype": str(next(gpt.parameters()).dtype).removeprefix("torch."),
        "max_loops": max_loops,
        "repeats": repeats,
        "policies": list(chosen),
    }
    console.print(
        f"{about['model']} checkpoint, {about['machine']}, {about['device']}, torch {about['torch']}, "
        f"{about['dtype']}, full depth {max_loops} loops, policies {', '.join(chosen)}",
        highlight=False,
        markup=False,
    )
    results: dict[str, Any] = {}
    for part in PARTS:
        if part not in parts:
            continue
        with progress(part):
            results[part] = measure[part]()
        _print(console, part, results[part])
    write_results(console, json_path, {**about, **results})


def _print(console: Console, part: str, result: Any) -> None:
    rows = [_cells(part, row) for row in _rows(part, result)]
    columns = [Column(name, [row[name] for row in rows], left=i == 0) for i, name in enumerate(rows[0])]
    console.print()
    print_grid(console, columns, title=_MEANING[part])


def _rows(part: str, result: Any) -> list[dict[str, Any]]:
    if part == "overhead":
        return [{**result, "name": name, "overhead": result[name]} for name in ("compact", "compact, accel")]
    return list(result)


def _cells(part: str, row: dict[str, Any]) -> dict[str, str]:
    """What a row of one part shows, by heading."""
    if part == "policies":
        note = "" if row["dtype"] == "float32" else f" {row['dtype']}"
        relative = {name: f"{100 * value:.1f}%" for name, value in row["relative"].items()}
        return {
            "width, rows": f"{row['width']}, {row['rows']:,}{note}",
            "body ms": f"{row['body_ms']:.3f}",
            **relative,
        }
    if part == "overhead":
        return {
            "execution": f"{row['name']}, {row['rows']:,} rows, {row['loops']} loops",
            "overhead": f"{100 * row['overhead']:+.1f}%",
        }
    if part == "break-even":
        return {
            "rows computed": f"{row['rows']:,}",
            "share halted": "never" if row["at"] is None else f"{row['at']:.1%}",
        }
    if part == "position":
        return {
            "position": f"{row['position']}",
            "ms/token": f"{row['ms_per_token']:.2f}",
            "of it attention": f"{row['attention_ms']:.2f}",
        }
    if part == "samplers":
        return {
            "sampler": row["sampler"],
            "policy": row["spec"],
            "ms/token": f"{row['ms_per_token']:.2f}",
            "speed-up": f"{row['speedup']:.2f}x",
            "same": f"{row['same']:.3f}",
        }
    steps = " ".join(f"{mean:.1f}" for mean in row["steps"].values())
    if part in ("forward", "decode"):
        return {
            "batch x tokens": f"{row['batch']} x {row['length']}",
            "policy": row["spec"],
            "steps": steps,
            "full ms/token": f"{row['full_ms_per_token']:.3f}",
            "ms/token": f"{row['ms_per_token']:.3f}",
            "bound": f"{row['bound']:.2f}x",
            "speed-up": f"{row['speedup']:.2f}x",
            "realised": f"{row['realised']:.2f}",
            "over bare loop": f"{100 * row['over_bare_loop']:+.1f}%",
        }
    if part == "slowest":
        return {
            "policy": row["spec"],
            "batch": f"{row['batch']} x {row['length']}",
            "mean steps": steps,
            "slowest": " ".join(map(str, row["slowest"].values())),
            "bound": f"{row['bound']:.2f}x",
            "over bare": f"{row['over_bare']:.2f}x",
            "over masked": f"{row['over_masked']:.2f}x",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
        }
    return {
        "layout": row["layout"],
        "KiB/token": f"{row['bytes_per_token'] / 1024:.1f}",
        "CE change": f"{row['ce_change']:+.5f}",
        "largest logit error": f"{row['max_logit_error']:.4f}",
        "mean": f"{row['mean_logit_error']:.4f}",
        "agreement": f"{row['agreement']:.1%}",
        "steps": steps,
    }
