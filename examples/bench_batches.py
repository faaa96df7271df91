"""What halting realises by batch: forward passes and cached decoding of the bundled text model, on any device.

    python examples/bench_batches.py [--device cuda] [--batches 1 8 32] [--tokens 128] [--repeats 5]

For each batch, everything takes turns within every repeat: the plain model at full depth (16 steps), and policies in
compact execution. ``bound`` is the speed-up that counted operations allow for the steps that the policies take,
``realised`` the measured speed-up over it. With CUDA the default batches are 1 to 256; the targets are 0.85 of the
bound in forward at 8,192 rows on a GPU, and in decoding 0.90 at batch 1 and 0.88 at 8 and 32 on two CPU cores.
"""

from __future__ import annotations

import argparse

import torch

from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.models.gpt.bench import decode_speed, forward_speed
from haltkit.models.gpt.subject import SAMPLE, text_windows
from haltkit.specs import policy

FULL_DEPTH = 16
SPECS = ("norm:tau=0.6", "accel:tau=3")


@torch.inference_mode()
def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256] if cuda else [1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence, in forward")
    parser.add_argument(
        "--decoded", type=int, default=32, help="of each sequence, in decoding, after half of its tokens"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    checkpoint = load_checkpoint(BUNDLED, device=options.device)
    windows = text_windows(checkpoint, SAMPLE, 10**9)
    policies = {spec: policy(spec) for spec in SPECS}
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"full depth {FULL_DEPTH}, float32, {options.device} ({name}), medians of {options.repeats} repeats")
    print("mode     batch   rows policy          ms/token  speed-up  bound  realised")
    for batch in options.batches:
        ids = windows[torch.arange(batch) % len(windows), : options.tokens]
        start = max(1, ids.shape[1] // 2)
        stop = min(ids.shape[1], start + options.decoded)
        found = forward_speed(checkpoint.model, ids, policies, max_loops=FULL_DEPTH, repeats=options.repeats)
        found += decode_speed(
            checkpoint.model, ids[:, :stop], policies, start=start, max_loops=FULL_DEPTH, repeats=options.repeats
        )
        for one in found:
            rows = ids.numel() if one["mode"] == "forward" else batch
            print(
                f"{one['mode']:8} {batch:5d} {rows:6d} {one['spec']:14} {one['ms_per_token']:9.4f} "
                f"{one['speedup']:9.2f} {one['bound']:6.2f} {one['realised']:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
