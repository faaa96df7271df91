"""Can anything inside a loop tell that a row's final prediction has settled? The text model's regions, cut one by one.

    python examples/bench_effect.py --sequences 16                              # on the bundled sample
    python examples/bench_effect.py --data data --sequences 128 --keep cut.pt   # on a folder of haltkit prepare

A region is cut after k steps for all rows, and everything else runs to full depth. A row has settled at step k if from
k on the model's own prediction, not the region's readout, is that of full depth. Printed for each region:

- the agreement with full depth of a cut at each k, and the oracle's mean depth;
- how well signals, a linear probe and a network tell settled rows at each step (AUC, clustered by sequence), fitted on
  half of the sequences and judged on the others;
- the fewest mean steps at which a rule on each of them agrees with full depth on enough of those others, the threshold
  and the budget chosen with hindsight: a bound on what a rule can save, before it costs anything.

``--keep`` writes the recordings to a file, or reads them from it where it is there. ``--save`` writes the linear probe
of each region, as weights for ``probe:tau=TAU,weights=FOLDER/REGION.safetensors``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haltkit import signals
from haltkit.headroom import auc, fit_logistic
from haltkit.headroom.oracles import from_then_on
from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.models.gpt.layers import Region
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.subject import SAMPLE, text_windows
from haltkit.models.text.data import TokenData
from haltkit.policies.probe import FEATURES, features
from haltkit.protocol import LoopStep
from haltkit.weights import Weights

LEVELS = (0.98, 0.985, 0.99, 0.993)
PAIRS = 200_000  # at most, that a probe or a network is fitted on


def rest(model: LoopedGPT, x: Tensor, after: str, full: int) -> Tensor:
    """Logits from what the region ``after`` hands on, everything behind it at full depth."""
    names = list(model.layers)
    for name in names[names.index(after) + 1 :]:
        layer = model.layers[name]
        x = layer(x, full, model.noise) if isinstance(layer, Region) else layer(x)
    return model.readout(x)


def cut(model: LoopedGPT, ids: Tensor, name: str, deepest: int, full: int) -> dict[str, Tensor]:
    """One region of tokens ``(B, T)``, cut at 1 to ``deepest`` steps with the others at full depth.

    Returns:
        ``states`` ``(K + 1, B, T, D)``; ``gap``, the margin of the region's own readout, and ``same``, whether the
        model's prediction is full depth's, both ``(K, B, T)``; ``end``, full depth's own margin, ``(1, B, T)``.
    """
    x = model.embed(ids)
    for other, layer in model.layers.items():
        if other == name:
            break
        x = layer(x, full, model.noise) if isinstance(layer, Region) else layer(x)
    region = model.regions[name]
    states = [region.initial_state(x, model.noise)]
    for k in range(1, full + 1):
        states.append(region.step(states[-1], x, k, model.noise))
    end = rest(model, region.exit(states[-1]), name, full)
    top = signals.top(end)
    same = [signals.top(rest(model, region.exit(state), name, full)) == top for state in states[1 : deepest + 1]]
    gap = [signals.margin(signals.log_probabilities(model.readout(state))) for state in states[1 : deepest + 1]]
    return {
        "states": torch.stack(states[: deepest + 1]).half(),
        "gap": torch.stack(gap),
        "same": torch.stack(same),
        "end": signals.margin(signals.log_probabilities(end)).unsqueeze(0),
    }


def record(model: LoopedGPT, windows: Tensor, deepest: Mapping[str, int], full: int) -> dict[str, dict[str, Tensor]]:
    """Every region of all sequences, four at a time."""
    parts = [
        {name: cut(model, ids, name, most, full) for name, most in deepest.items()} for ids in windows[:, :-1].split(4)
    ]
    return {name: {key: torch.cat([p[name][key] for p in parts], 1) for key in parts[0][name]} for name in deepest}


def seen(states: Tensor, gap: Tensor) -> Tensor:
    """What the policy ``probe`` sees at each step besides the state, ``(K, B, T, 4)``."""
    before, found = torch.zeros_like(states[0]), []
    for k in range(1, len(states)):
        step = LoopStep(k, states[k], states[k - 1], torch.ones_like(gap[0], dtype=torch.bool))
        step.margin = gap[k - 1]
        found.append(features(step, before, FEATURES))
        before = step.d
    return torch.stack(found)


def network(inputs: Tensor, target: Tensor) -> nn.Module:
    """A network of one hidden layer, ``(N, F)`` and ``(N,)`` bool: what a probe of more than a line could know."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs.shape[1], 128), nn.SiLU(), nn.Dropout(0.2), nn.Linear(128, 1))
    batches = len(inputs) // 2048 + 1
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=6 * batches)
    with torch.enable_grad():
        for _ in range(6):
            for rows in torch.randperm(len(inputs)).tensor_split(batches):
                loss = F.binary_cross_entropy_with_logits(net(inputs[rows])[:, 0], target[rows].float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    return net.eval()


def judges(
    region: str, states: Tensor, gap: Tensor, settled: Tensor, fits: Tensor
) -> tuple[dict[str, Tensor], Weights]:
    """Scores ``(K, B, T)`` that are small where a row should have settled; ``fits``, ``(B,)``, are fitted on.

    Returns:
        the scores by name, and the weights of the linear probe that does not see the margin.
    """
    sees = seen(states, gap)
    found = {"step norm": sees[..., 0], "margin of the region": -gap}
    steps = F.one_hot(torch.arange(len(gap)), len(gap)).float().view(len(gap), 1, 1, -1).expand(*gap.shape, -1)
    weights: dict[str, Tensor] = {}
    for name, extra in (("", sees[..., :-1]), (" + margin", sees)):
        inputs = torch.cat([states[1:], extra], -1)
        drawn = torch.randperm(settled[:, fits].numel(), generator=torch.Generator().manual_seed(0))[:PAIRS]
        known, target = inputs[:, fits].flatten(0, -2)[drawn], settled[:, fits].flatten()[drawn]
        probe = fit_logistic(known, target, 1e-4)
        if not name:
            of = dict(zip(FEATURES, [*probe.weight[-extra.shape[-1] :], torch.zeros(())], strict=True))
            known_of = {"state": probe.weight[: -extra.shape[-1]], "bias": probe.bias, **of}
            weights = {f"{region}/{key}": one.reshape(-1).float() for key, one in known_of.items()}
        found[f"linear probe{name}"] = -probe.logit(inputs).float()
        mean, spread = known.mean(0), known.std(0).clamp_min(1e-6)
        wide = torch.cat([(inputs - mean) / spread, steps], -1)
        net = network(wide[:, fits].flatten(0, -2)[drawn], target)
        found[f"network{name}"] = torch.stack([-net(step)[..., 0] for step in wide])
    return found, Weights(weights)


def fewest(scores: Tensor, same: Tensor) -> dict[float, float]:
    """Mean steps at each level of a rule that halts below a threshold, or at a budget, both chosen with hindsight."""
    best: dict[float, float] = {}
    for budget in range(1, len(same) + 1):
        shares = torch.linspace(0, 0.9, 46, dtype=torch.float64)
        values = scores[:budget].flatten().double()
        values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[:PAIRS]]
        for tau in [-torch.inf, *torch.quantile(values, shares).tolist()]:
            below = scores[:budget] < tau
            taken = torch.where(below.any(0), below.int().argmax(0), budget - 1)
            agreed = float(same.gather(0, taken.unsqueeze(0)).double().mean())
            for level in LEVELS:
                if agreed >= level:
                    best[level] = min(best.get(level, torch.inf), float(taken.double().mean()) + 1)
    return best


def report(name: str, kept: Mapping[str, Tensor], save: Path | None) -> None:
    """Print what was found in one region."""
    states, gap, same = kept["states"].float(), kept["gap"], kept["same"]
    deepest, count = len(same), same.shape[1]
    depths = from_then_on(torch.cat([same, torch.ones_like(same[:1])]))  # K + 1: later than was recorded
    settled = depths <= torch.arange(1, deepest + 1).view(-1, 1, 1)
    fits = torch.zeros(count, dtype=torch.bool)
    fits[torch.randperm(count, generator=torch.Generator().manual_seed(1))[: count // 2]] = True
    print(f"\nRegion {name}, {count} sequences of {same.shape[-1]}: oracle {depths.double().mean():.2f} steps")
    print("  agreement by cut:", *(f"{share:.4f}" for share in same.double().mean((1, 2)).tolist()))
    sequence = torch.arange(count).view(-1, 1).expand(same.shape[1:])[~fits]
    print(f"  {'AUC by step, and fewest steps at agreement':44s}", *(f"{level:g}" for level in LEVELS))
    scored, weights = judges(name, states, gap, settled, fits)
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        weights.save(save / f"{name}.safetensors")
    late = {"margin at full depth": -kept["end"].expand_as(gap)}  # what no rule can know
    for what, scores in {"fixed depth": torch.zeros_like(gap), **scored, **late}.items():
        areas = [auc(scores[k][~fits], settled[k][~fits], sequence) for k in range(min(deepest, 6))]
        told = [f"{area.value:.3f}±{area.error:.3f}" for area in areas] if what != "fixed depth" else []
        steps = {} if what in late else fewest(scores[:, ~fits], same[:, ~fits])
        print(f"  {what:22s}", *told, "|", *(f"{steps[level]:.2f}" if level in steps else "-" for level in LEVELS))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of haltkit prepare; its validation split is read")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16, help="full depth")
    parser.add_argument("--deepest", default="4=4;5-6=10;7=6", help="the last cut of each region")
    parser.add_argument("--keep", type=Path, help="file of recordings")
    parser.add_argument("--save", type=Path, help="folder for the weights of the linear probes")
    asked = parser.parse_args()
    if asked.keep is not None and asked.keep.is_file():
        kept = torch.load(asked.keep, weights_only=True)
    else:
        loaded = load_checkpoint(BUNDLED)
        length = loaded.config.block_size
        if asked.data is not None:
            windows = TokenData(asked.data, "validation", length).spread(max(1024, asked.sequences))
        else:
            windows = text_windows(loaded, SAMPLE, asked.sequences * length)
        drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(7))[: asked.sequences]
        deepest = {name: int(most) for name, _, most in (part.partition("=") for part in asked.deepest.split(";"))}
        kept = record(loaded.model, windows[drawn], deepest, asked.steps)
        if asked.keep is not None:
            torch.save(kept, asked.keep)
    for name, recorded in kept.items():
        report(name, recorded, asked.save)


if __name__ == "__main__":
    main()
