"""Agreement with full depth, steps and processor time of any specs on the bundled text model, beside a fixed depth.

    python examples/bench_specs.py --data data "4=fixed:steps=4;5-6=fixed:steps=8;7=fixed:steps=4" norm:tau=0.87

Times are relative to ``--baseline``, the fixed depth 3 8 4 unless given, and of the processor: one thread, all specs in
turn, so that on a machine that others use, too, waiting does not count. Without ``--data``, a folder of ``haltkit
prepare``, the text is the bundled sample.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from haltkit.comparison.measure import measure
from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.models.gpt.subject import SAMPLE, gpt_subject, text_windows
from haltkit.models.text.data import TokenData
from haltkit.setting import Setting
from haltkit.subject import Subject

BASELINE = "4=fixed:steps=3;5-6=fixed:steps=8;7=fixed:steps=4"


def processor_times(subject: Subject, settings: list[Setting], windows: torch.Tensor, repeats: int) -> list[float]:
    """Each setting's time over the first one's, medians over the repeats; the first round warms up."""
    times: list[list[float]] = [[] for _ in settings]
    for repeat in range(repeats + 1):
        for setting, kept in zip(settings, times, strict=True):
            with subject.using(setting) as run:
                start = time.process_time()
                for window in windows.split(1):
                    run(window)
                if repeat:
                    kept.append(time.process_time() - start)
    return [statistics.median(a / b for a, b in zip(one, times[0], strict=True)) for one in times]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=["norm:tau=0.87"])
    parser.add_argument("--baseline", default=BASELINE)
    parser.add_argument("--data", type=Path, help="a folder of haltkit prepare; its validation split is read")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--steps", type=int, default=16, help="full depth, and the budget")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_checkpoint(BUNDLED)
    length = loaded.config.block_size
    if asked.data is not None:
        windows = TokenData(asked.data, "validation", length).spread(asked.windows)
    else:
        windows = text_windows(loaded, SAMPLE, asked.windows * length)
    subject = gpt_subject(loaded.model, windows, batch=min(8, len(windows)), max_loops=asked.steps, ragged=True)
    settings = [Setting.of(spec, subject.regions) for spec in (asked.baseline, *asked.specs)]
    rows = measure(subject, [Setting.of(asked.steps, subject.regions), *settings], repeats=1).rows[1:]
    times = processor_times(subject, settings, windows[:2], asked.repeats)
    print("agreement          time  steps by region   spec")
    for row, ratio, spec in zip(rows, times, (asked.baseline, *asked.specs), strict=True):
        steps = " ".join(f"{taken:.2f}" for taken in row.steps.values())
        print(f"{row.agreement:.4f} ± {row.agreement_se:.4f}  {ratio:5.3f}  {steps:16s}  {spec}")


if __name__ == "__main__":
    main()
