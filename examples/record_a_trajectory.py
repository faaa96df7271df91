"""Record the bundled model's loops, look at their geometry, and judge policies without running it again.

python examples/record_a_trajectory.py
"""

from __future__ import annotations

import torch

import haltkit
from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.recording.trajectory import delta_loop_ratios


@torch.no_grad()
def main() -> None:
    loaded = load_checkpoint()
    text = (BUNDLED / "sample.txt").read_text(encoding="utf-8")[:600]
    tokens = torch.tensor([loaded.tokenizer.encode_ordinary(text)])[:, :128]

    with haltkit.record(loaded.model) as recording:  # forward hooks; the output is untouched
        loaded.model(tokens, 16)
    regions = recording.trajectory.regions

    for name, region in regions.items():
        norms, angles = region.step_norms().mean((1, 2)), region.step_angles().nanmean((1, 2))
        print(f"region {name}: step norm {norms[0]:.2f} at k=1, {norms[3]:.3f} at 4, {norms[15]:.4f} at 16; ", end="")
        print(f"cosine of successive steps {angles[3]:+.2f} at 4")
    (first, before), (second, after) = list(regions.items())[:2]
    for convention, ratio in delta_loop_ratios(before, after).items():
        print(f"DLR {first} -> {second}, {convention}: median {ratio.median():.1f}")

    # Exact here only up to the attention between tokens: see the docstring of haltkit.replay.
    for spec in ("norm:tau=0.5", "accel:tau=0.5", "kl:tau=1e-3"):
        result = haltkit.replay(haltkit.policy(spec), before, readout=loaded.model.readout)
        print(f"{spec} on region {first}: {result.steps.double().mean():.2f} steps a token")


if __name__ == "__main__":
    main()
