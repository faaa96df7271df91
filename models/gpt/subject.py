"""The bundled model as a subject: its windows of text, how a pass is run, and where its loops and layers are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.comparison.conclusions import NATS_LEVELS
from haltkit.comparison.thresholds import TARGET_STEPS
from haltkit.driving import ByModules, Pass
from haltkit.kinds import Kinds, per_row
from haltkit.loop import Execution
from haltkit.models.checkpoint import BUNDLED, Checkpoint, load_checkpoint
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.model import LoopedGPT, Region
from haltkit.models.text.data import DataError, TokenData, read_text, windows
from haltkit.protocol import HaltingPolicy, granularity_of
from haltkit.setting import Depth
from haltkit.subject import Subject

__all__ = ["FIXED_DEPTHS", "SAMPLE", "Mode", "check_mode", "checkpoint_subject", "gpt_subject", "text_windows"]

Mode = Literal["forward", "decode"]
FIXED_DEPTHS = (1, 2, 4, 8, 12, 16, 32)
SAMPLE = BUNDLED / "sample.txt"


def text_windows(checkpoint: Checkpoint, path: Path, tokens: int) -> Tensor:
    """About ``tokens`` tokens of a text file in windows of the model's context, spread evenly over the file.

    They are where the model is.

    Returns:
        ``(N, T + 1)``.

    Raises:
        DataError: a file that does not exist, not UTF-8 text, or shorter than one window.
    """
    text = read_text(path)
    length = checkpoint.config.block_size
    try:
        found = windows(checkpoint.tokenizer.encode_ordinary(text), length)
    except DataError as error:
        raise DataError(f"{str(path)!r} is too short: {error}") from None
    wanted = min(len(found), max(1, tokens // length))
    chosen = found[np.linspace(0, len(found) - 1, wanted).round().astype(int)]
    return chosen.to(checkpoint.model.wte.weight.device)


def check_mode(mode: str, execution: str) -> None:
    """Refuse an unknown mode or execution, and a pair that does not go together.

    Raises:
        ValueError: which, and what does.
    """
    if mode not in ("forward", "decode"):
        raise ValueError(f"mode {mode!r}: allowed are forward, decode")
    if execution not in ("masked", "compact"):
        raise ValueError(f"execution {execution!r}: allowed are masked, compact")
    if mode == "decode" and execution == "masked":
        raise ValueError("mode decode computes a token at a time, so nothing is masked: use compact, or mode forward")


def gpt_subject(
    model: LoopedGPT,
    sequences: Tensor | None = None,
    *,
    name: str = "model",
    tokenizer: Any = None,
    batch: int = 1,
    max_loops: int = 32,
    mode: Mode = "forward",
    execution: Execution = "compact",
    ragged: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Subject:
    """A LoopedGPT as a subject, with its layers, its injections and its native halting.

    Args:
        model: in evaluation mode.
        sequences: windows ``(N, T + 1)`` of text; None: no samples.
        name: for tables and titles.
        tokenizer: with ``decode_single_token_bytes``; None: tokens are shown as numbers.
        batch: windows per sample.
        max_loops: full depth, and the budget of each region under a policy.
        mode: ``forward`` is one teacher-forced pass over a window; ``decode`` takes it token by token with a cache,
            the prompt being its first token.
        execution: of a forward pass under a policy.
        ragged: keep windows that do not fill a batch as a smaller last sample; otherwise they are dropped.
        about: what else is known of it, plain values.

    Raises:
        ValueError: a batch that does not fit, an unknown mode or execution, or ones that cannot go together.
    """
    check_mode(mode, execution)
    samples: list[Tensor] = []
    if sequences is not None:
        if batch < 1 or (len(sequences) < batch and not ragged):
            raise ValueError(f"batch={batch} does not fit {len(sequences)} windows of text: lower it or give more text")
        samples = [part for part in torch.split(sequences, batch) if ragged or len(part) == batch]
    running = _Decoding(model, max_loops) if mode == "decode" else _Forward(model, execution)
    driver = ByModules(
        model,
        model,
        model.loop_modules,
        model.loop_injections,
        inputs=_inputs,
        fixed=running.fixed,
        adaptive=running.adaptive,
        by_row=running.by_row if isinstance(running, _Forward) else None,  # a decoder has one budget for all tokens
    )
    layers = {
        region: tuple(f"layers.{region}.body.blocks.{i}" for i in range(len(layer.body.blocks)))
        for region, layer in model.regions.items()
    }

    def text(ids: Tensor) -> list[str]:
        return [tokenizer.decode_single_token_bytes(int(i)).decode("utf-8", "replace") for i in ids]

    return Subject(
        model,
        driver,
        name=name,
        samples=samples,
        loss=_cross_entropy,
        metric="CE",
        unit="nats",
        item="token",
        levels=NATS_LEVELS,
        logits=lambda output: output,
        readout=model.readout,
        labels=lambda window: window[:, 1:],
        kinds=Kinds(_inputs, what="token id") if isinstance(running, _Forward) else None,
        layers=layers,
        depth=[n if isinstance(layer, Region) else f"layers.{n}" for n, layer in model.layers.items()],
        tokens=None if tokenizer is None else text,
        inputs=_inputs,
        full_depth=max_loops,
        fixed_depths=FIXED_DEPTHS,
        target_steps=TARGET_STEPS,
        about=about or {},
    )


def _inputs(window: Tensor) -> Tensor:
    """A window ``(B, T + 1)`` without its last token, which is only predicted."""
    return window[:, :-1]


def _cross_entropy(logits: Tensor, window: Tensor) -> Tensor:
    """Nats of each token, ``(B, T)``."""
    return F.cross_entropy(logits.float().transpose(1, 2), window[:, 1:], reduction="none")


class _Forward:
    """Teacher-forced passes."""

    def __init__(self, model: LoopedGPT, execution: Execution) -> None:
        self.model, self.execution = model, execution

    def fixed(self, ids: Tensor, depth: Depth) -> Tensor:
        logits: Tensor = self.model(ids, depth.steps)  # a fixed depth measures nothing and pays for nothing
        return logits

    def adaptive(self, ids: Tensor, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Pass:
        out = self.model.forward_adaptive(ids, policies, max_loops=budget, execution=self.execution)
        return Pass(out.logits, out.steps, out.outcome)

    def by_row(self, ids: Tensor, steps: Mapping[str, Tensor]) -> Pass:
        """Each token leaves each region after steps of its own."""
        each = {name: per_row(one, ids.shape) for name, one in steps.items()}
        most = Depth({name: int(one.max()) for name, one in each.items()})
        out = self.model.forward_adaptive(
            ids, most.policies, max_loops=most.steps, budget=each, execution=self.execution
        )
        return Pass(out.logits, out.steps, out.outcome)


class _Decoding:
    """Token by token with the exact cache, the text being given."""

    def __init__(self, model: LoopedGPT, max_loops: int) -> None:
        self.model, self.max_loops = model, max_loops

    def fixed(self, ids: Tensor, depth: Depth) -> Tensor:
        """A fixed depth pays for nothing but its loop."""
        decoder = Decoder(self.model, depth.policies, max_loops=max(self.max_loops, depth.deepest))
        first = decoder.prefill(ids[:, :1])
        rest = [decoder.step_fixed(ids[:, i], dict(depth.steps)) for i in range(1, ids.shape[1])]
        return torch.stack([first.logits, *rest], 1)

    def adaptive(self, ids: Tensor, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Pass:
        for policy in policies.values():
            if (granularity := granularity_of(policy)) != "token":
                raise ValueError(
                    f"{policy!r} decides by {granularity}, and a {granularity} is not there yet while it is decoded: "
                    "use granularity=token, or mode forward"
                )
        decoder = Decoder(self.model, policies, max_loops=budget)
        seen = [decoder.prefill(ids[:, :1]), *(decoder.step(ids[:, i]) for i in range(1, ids.shape[1]))]
        return Pass(
            torch.stack([one.logits for one in seen], 1),
            {name: torch.stack([one.steps[name] for one in seen], 1) for name in self.model.regions},
            {name: torch.stack([one.outcome[name] for one in seen], 1) for name in self.model.regions},
        )


def checkpoint_subject(
    folder: Path,
    *,
    name: str,
    device: torch.device | str = "cpu",
    text: Path | None = None,
    data: Path | None = None,
    split: str = "validation",
    max_loops: int = 32,
    tokens: int = 1024,
    sequences: int | None = None,
    batch: int = 1,
    mode: Mode = "forward",
    execution: Execution = "compact",
    ragged: bool = False,
) -> Subject:
    """A checkpoint folder as a subject, on text.

    Args:
        folder: of the checkpoint.
        name: for tables and titles.
        device: where the model goes.
        text: a text file; None: the bundled sample.
        data: a folder made by ``haltkit prepare`` instead, with the checkpoint's tokenizer.
        split: of the data.
        max_loops, batch, mode, execution, ragged: see :func:`gpt_subject`.
        tokens: how much of the text, about.
        sequences: how many windows of the text instead, at most.

    Raises:
        CheckpointError: the folder is no checkpoint, or a damaged one.
        DataError: the text or the data is not there, or does not fit.
    """
    check_mode(mode, execution)
    if data is not None and text is not None:
        raise ValueError(f"--data {data} and --text {text}: give one of them")
    loaded = load_checkpoint(folder, device=device)
    if sequences is not None:
        tokens = sequences * loaded.config.block_size
    if data is not None:
        shards = TokenData(data, split, loaded.config.block_size)
        if shards.vocab_size != loaded.tokenizer.n_vocab:
            raise DataError(
                f"{str(data)!r} was prepared with {shards.vocab_size} tokens, the checkpoint's tokenizer has "
                f"{loaded.tokenizer.n_vocab}: prepare it with --tokenizer {folder}"
            )
        found = shards.spread(max(1, tokens // loaded.config.block_size)).to(loaded.model.wte.weight.device)
        source = f"{data}, {split}"
    else:
        found = text_windows(loaded, text or SAMPLE, tokens)
        source = str(text) if text else "bundled sample"
    about = {
        "trained": loaded.trained,
        "text": source,
        "sequences": len(found),
        "max_loops": max_loops,
        "batch": batch,
        "mode": mode,
        "execution": execution,
    }
    return gpt_subject(
        loaded.model,
        found,
        name=name,
        tokenizer=loaded.tokenizer,
        batch=batch,
        max_loops=max_loops,
        mode=mode,
        execution=execution,
        ragged=ragged,
        about=about,
    )
