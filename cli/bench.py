"""``haltkit bench``: what halting costs, what it saves, and how much of the theory that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from haltkit.cli.device import Device, describe_device
from haltkit.cli.grid import Column, print_grid, print_wrapped
from haltkit.cli.options import (
    JsonPath,
    MaxLoops,
    Model,
    OldCheckpoint,
    OldModel,
    Repeats,
    Text,
    WithoutCertificate,
    chosen_model,
    given_policies,
)
from haltkit.cli.subjects import asked_options, is_text, resolve, text_model
from haltkit.cli.terminal import check_writable, make_console, progress, say_standing, write_results

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from haltkit.card import Card

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
    context: typer.Context,
    model: Model = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Comma-separated specs, also per region, and paths of saved choices; one without tau gets that at "
            "which a typical row takes 6 steps. Without predictions to look at, the default is accel,norm."
        ),
    ] = "accel,kl",
    only: Annotated[str, typer.Option(metavar="LIST", help=f"Of {', '.join(PARTS)} (text models).")] = ",".join(PARTS),
    text: Text = None,
    max_loops: MaxLoops = 32,
    repeats: Repeats = 3,
    without_certificate: WithoutCertificate = False,
    device: Device = "auto",
    json_path: JsonPath = None,
    checkpoint: OldCheckpoint = None,
    old_model: OldModel = None,
) -> None:
    """Measure, side by side in one run, what halting costs and saves on this machine.

    The bound is the speed-up that counted floating-point operations allow for the steps that occurred, layers that do
    not loop included; realised is the measured speed-up over it. "Over bare loop" is the time above that of a loop of
    as many steps that decides nothing. Takes some minutes; run nothing else meanwhile.

    Of a looped text model all parts are measured. Of any other model its policies' speed-up, bound and cost are, and
    the mean steps below which each is faster than full depth, as a table in Markdown.
    """
    named = chosen_model(model, checkpoint, old_model)
    given = given_policies(policies, without_certificate)
    if not is_text(named):
        options = {"text": text, "only": only, "max_loops": max_loops}
        _bench_subject(named, options, asked_options(context), given, repeats, device, check_writable(json_path))
        return
    parts = [part.strip() for part in only.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--only {only}: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
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
    block, where = gpt.block_size, gpt.wte.weight.device
    windows = text_windows(loaded, text or SAMPLE, 32 * block)
    windows = windows[torch.arange(32, device=where) % len(windows)]  # a short text repeats
    ids = windows[:, :-1]
    subject = gpt_subject(gpt, windows[:2], max_loops=max_loops)
    with progress("choosing thresholds"):
        wanted = candidates(given, subject)
        chosen = benching.choose_policies(subject, wanted)
        for one in chosen.values():  # what cannot run on this model is refused before anything is measured
            gpt.forward_adaptive(ids[:1, :2], one, max_loops=1)
    first, half = next(iter(chosen.values())), block // 2
    count, scripted = max(1, min(12, block // 8)), benching.Scripted(min(16, max_loops))
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
            for batch in (ids[:1], ids[:8], ids[:, : block // 4])
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
            (block // 4, block - count),
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
        "standing": {one.name: str(one.standing) for one in wanted if str(one.standing)},
    }
    console.print(
        f"{about['model']} checkpoint, {about['machine']}, {about['device']}, torch {about['torch']}, "
        f"{about['dtype']}, full depth {max_loops} loops, policies {', '.join(chosen)}",
        highlight=False,
        markup=False,
    )
    for candidate in wanted:
        say_standing(console, candidate.name, candidate.standing)
    results: dict[str, Any] = {}
    for part in PARTS:
        if part not in parts:
            continue
        with progress(part):
            results[part] = measure[part]()
        _print(console, part, results[part])
    write_results(console, json_path, {**about, **results})


def _bench_subject(
    named: str | None,
    options: dict[str, Any],
    asked: set[str],
    policies: Sequence[str | Card],
    repeats: int,
    device: str,
    json_path: Path | None,
) -> None:
    """Any model with a loop: realised speed-up, cost of deciding and break-even of each policy."""
    with progress("loading the model") as tick:
        subject = resolve(named, options, asked, device)
        from haltkit import timing
        from haltkit.comparison.settings import candidates
        from haltkit.comparison.speed import speeds
        from haltkit.protocol import has_logits

        usual = "policies" not in asked and not has_logits(subject.readout)
        wanted = candidates("accel,norm" if usual else policies, subject)
        tick(description="timing")
        rows = speeds(subject, wanted, repeats=repeats, on_tick=lambda done, total: tick(completed=done, total=total))
    console = make_console(json_path)
    about = {**subject.about, "machine": timing.machine(), "repeats": repeats}
    told = [f"{key.replace('_', ' ')} {about[key]}" for key in ("max_loops", "batch") if key in about]
    where = [str(about[key]) for key in ("model", "machine", "device", "dtype") if about.get(key)]
    print_wrapped(console, ", ".join([*where, *told, f"median of {repeats} interleaved repeats"]))
    console.print()
    cells = [_subject_cells(row, subject.item) for row in rows]
    for line in (list(cells[0]), ["---"] * len(cells[0]), *(list(row.values()) for row in cells)):
        console.print(f"| {' | '.join(line)} |", highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        say_standing(console, f"\n{row['spec']}", row["standing"])
    write_results(console, json_path, {**about, "policies": rows})


def _subject_cells(row: dict[str, Any], item: str) -> dict[str, str]:
    """A row of the table of any model, by heading."""
    even = row["break_even"]
    return {
        "policy": f"`{row['spec']}`".replace("|", "\\|"),
        "steps": " ".join(f"{mean:.1f}" for mean in row["steps"].values()),
        f"full depth, ms/{item}": f"{row['full_ms']:.3f}",
        f"ms/{item}": f"{row['ms']:.3f}",
        "bound": f"{row['bound']:.2f}x",
        "speed-up": f"{row['speedup']:.2f}x",
        "realised": f"{row['realised']:.2f}",
        "over bare loop": f"{100 * row['over_bare_loop']:+.1f}%",
        "faster than full depth below": "never" if even is None else f"{even:.1f} steps",
    }


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
