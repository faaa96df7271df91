"""``haltkit generate``: continue a text, each token looping until its policy halts it."""

from __future__ import annotations

import codecs
import json
import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from haltkit.cli.device import Device
from haltkit.cli.options import (
    MOST_STEPS,
    JsonPath,
    ModelOption,
    OldCheckpoint,
    WithoutCertificate,
    among,
    check_waiver,
    chosen_model,
    read_policies,
    seed_option,
)
from haltkit.cli.subjects import text_model
from haltkit.cli.terminal import check_writable, progress, write_results

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tiktoken
    from rich.console import Console

    from haltkit.models.gpt.generation import Settings
    from haltkit.models.gpt.model import LoopedGPT
    from haltkit.specs import Policies
    from haltkit.standing import Standing

_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # of Unicode's bidirectional controls
# Steps up to which a shade is used, coldest first; beyond the last, the hottest.
_SHADES = (
    (1, "color(33)"),
    (2, "color(44)"),
    (3, "color(42)"),
    (4, "color(76)"),
    (6, "color(148)"),
    (8, "color(220)"),
    (12, "color(208)"),
    (16, "color(202)"),
    (10**9, "color(196)"),
)


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text to continue. \\[default: standard input]", show_default=False),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file instead.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Continue every line of a file; writes a line of JSON for each, in order.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Lines of --prompts at a time.  \\[default: 8]", show_default=False)
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="When a token has thought enough: a spec, one per region as in '4=accel:tau=0.1;5-6=...', or the "
            "path of a saved choice. \\[default: the mean number of steps used in training, in every region]",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="How many of the most likely tokens to choose among.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the fewest tokens that have this probability.")
    ] = None,
    seed: Annotated[int, seed_option("Of the random choices.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop at this token too (a text that is one token); may be repeated.")
    ] = None,
    max_loops: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Budget of each region.")] = 32,
    total_loops: Annotated[int | None, typer.Option(help="Budget of a token over all regions.")] = None,
    layout: Annotated[
        str, among("depth-indexed|last|modulo:M", "What the KV cache keeps; the first is exact.")
    ] = "depth-indexed",
    sampler: Annotated[
        str,
        among(
            "sequential|speculative|wavefront",
            "Token by token; drafts that are verified (the same text); several positions at once (inexact).",
        ),
    ] = "sequential",
    draft: Annotated[
        str | None,
        typer.Option(help="Policy of speculative drafts.  \\[default: fixed:steps=1]", show_default=False),
    ] = None,
    ahead: Annotated[
        int | None,
        typer.Option(help="Drafts per verifying pass.  \\[default: 4; of a wavefront 8]", show_default=False),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Verify what a wavefront commits: the same text as sequential.")
    ] = False,
    width: Annotated[
        int | None, typer.Option(help="Open positions of a wavefront.  \\[default: 8]", show_default=False)
    ] = None,
    commit: Annotated[
        str | None,
        typer.Option(help="Policy that settles a wavefront's tokens.  \\[default: --policy]", show_default=False),
    ] = None,
    without_certificate: WithoutCertificate = False,
    device: Device = "auto",
    show_depth: Annotated[
        bool, typer.Option("--show-depth", help="Show the steps that each token took (colours, or numbers in a pipe).")
    ] = False,
    json_path: JsonPath = None,
    checkpoint: OldCheckpoint = None,
) -> None:
    """Continue a text with the looped model, as it comes. The text ends at an end-of-text token of the model too."""
    texts = [_read_prompt(prompt, file)] if prompts is None else _read_lines(prompts, prompt, file)
    if slots is not None and prompts is None:
        raise ValueError("--slots is how many lines of --prompts run at a time: give --prompts FILE")
    if json_path is not None and prompts is not None:
        raise ValueError("--prompts writes a line of JSON per text to standard output: leave out --json")
    json_path = check_writable(json_path)
    check_waiver(without_certificate, [policy, draft, commit])

    from haltkit.models.gpt.generation import Settings
    from haltkit.models.gpt.sampling import Sampling

    named = chosen_model(model, checkpoint)
    Sampling(temperature, top_k, top_p, seed)  # what is wrong is said before a checkpoint is read
    with progress("loading the model"):
        loaded = text_model(named, "generate", device)
    gpt, tokenizer = loaded.model, loaded.tokenizer
    usual = f"fixed:steps={min(gpt.mean_loops, max_loops)}"
    asked = {"--policy": policy or usual, "--draft": draft, "--commit": commit}
    read = {
        option: read_policies(text, gpt, list(gpt.regions), max_loops, without_certificate)
        for option, text in asked.items()
        if text is not None
    }
    exact = {"--total-loops": total_loops is None, f"--layout {layout}": layout == "depth-indexed"}
    _check_promise(read["--policy"][1], exact | {f"--sampler {sampler}": sampler != "wavefront" or verify})
    # What is promised of drafts, and of what settles a wavefront's tokens, is not promised of the text.
    told = {str(asked[option]): one for option, (_, one) in read.items() if option == "--policy" or one.without}
    standing = {name: str(one) for name, one in told.items() if str(one)}
    policies = {option: found for option, (found, _) in read.items()}
    settings = Settings(
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, seed, tokenizer.n_vocab),
        stop=[tokenizer.eot_token, *_stops(tokenizer, stop or [])],
        layout=layout,
        max_loops=max_loops,
        total_loops=total_loops,
        sampler=cast(Any, sampler),  # an unknown name is refused there
        draft=policies.get("--draft"),
        ahead=ahead,
        verify=verify or None,
        width=width,
        commit=policies.get("--commit"),
    )
    if prompts is None:
        finite = _write_one(gpt, tokenizer, texts[0], policies["--policy"], settings, show_depth, json_path, standing)
    else:
        finite = _write_each(gpt, tokenizer, texts, policies["--policy"], settings, slots or 8, show_depth, standing)
    for name, one in standing.items():
        print(f"{name}: {one}", file=sys.stderr)
    if not finite:
        raise typer.Exit(1)


def _check_promise(standing: Standing, exact: dict[str, bool]) -> None:
    """Refuse a certified card for another function than its certificate is about.

    Args:
        standing: of the policy.
        exact: whether each option leaves the model what it was when the card was certified.

    Raises:
        ValueError: some option does not, and the card is not used without its certificate.
    """
    others = [option for option, same in exact.items() if not same]
    if standing.promise and others:
        raise ValueError(
            f"{others[0]} makes another function of the model than the card's certificate is about: leave it out, or "
            "use the card without its certificate, by --without-certificate"
        )


def _write_one(
    gpt: LoopedGPT,
    tokenizer: tiktoken.Encoding,
    text: str,
    policies: Policies,
    settings: Settings,
    show_depth: bool,
    json_path: Path | None,
    standing: dict[str, str],
) -> bool:
    """Write the continuation of one text as it comes; whether the logits stayed finite."""
    from rich.console import Console
    from rich.text import Text

    from haltkit.files import is_stdout
    from haltkit.models.gpt.generation import stream as stream_of

    stream = stream_of(gpt, [tokenizer.encode_ordinary(text)], policies, settings)
    console = Console(highlight=False, quiet=json_path is not None and is_stdout(json_path))
    writer = _Writer(console, tokenizer, show_depth)
    if console.is_terminal:
        console.print(Text(text, style="dim"), end="", soft_wrap=True)
    reason: str | None = None
    started = first = time.perf_counter()
    try:
        for emission in stream:
            [token], [reason] = emission.tokens, emission.finished
            if writer.count == 0:
                first = time.perf_counter()
            if token is not None and reason != "stop":
                writer.add(token, {name: steps[0] for name, steps in emission.steps.items()})
    except KeyboardInterrupt:
        reason = "interrupted"
    ended = time.perf_counter()
    writer.close()
    means = {name: sum(steps) / len(steps) for name, steps in writer.steps.items() if steps}
    mean = ", ".join(f"{name}: {steps:.1f}" for name, steps in means.items())
    ms = 1e3 * (ended - first) / (writer.count - 1) if writer.count > 1 else None
    pace = "" if ms is None else f", {ms:.1f} ms/token after the first"
    why = {
        "stop": "a stop token",
        "length": "--max-new-tokens",
        "context": f"the model's context of {gpt.block_size} tokens is full",
        "nonfinite": "the model's logits are not finite",
        "interrupted": "interrupted",
    }[reason or "interrupted"]
    summary = (
        f"{writer.count} tokens in {ended - started:.1f} s{pace}; mean steps by region {mean or 'none'}; ended: {why}"
    )
    print(summary, file=sys.stderr)
    made = {"prompt": text, "text": tokenizer.decode(writer.tokens), "tokens": writer.tokens, "count": writer.count}
    took = {"steps": writer.steps, "mean_steps": means, "seconds": ended - started, "ms_per_token": ms}
    about = {"ended": reason, "context": gpt.block_size, "standing": standing}
    # Standard output is for what the model wrote alone: the file's name is not said there.
    write_results(Console(quiet=True), json_path, {**made, **took, **about})
    return reason != "nonfinite"


def _write_each(
    gpt: LoopedGPT,
    tokenizer: tiktoken.Encoding,
    texts: Sequence[str],
    policies: Policies,
    settings: Settings,
    slots: int,
    show_depth: bool,
    standing: dict[str, str],
) -> bool:
    """Write a line of JSON for each text, in order; whether all logits stayed finite."""
    from haltkit.models.gpt.generation import check_prompts, generate_stream

    given = [tokenizer.encode_ordinary(text) for text in texts]
    check_prompts(gpt, given)
    count, finite, started = 0, True, time.perf_counter()
    try:
        for made in generate_stream(gpt, given, policies, settings, slots=slots):
            line: dict[str, Any] = {"prompt": texts[made.index], "text": tokenizer.decode(made.tokens)}
            line |= {"tokens": len(made.tokens), "ended": made.finished}
            line |= {"standing": standing} if standing else {}
            print(json.dumps(line | {"steps": made.steps} if show_depth else line), flush=True)
            count, finite = count + len(made.tokens), finite and made.finished != "nonfinite"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
    return finite


def _read_lines(path: Path, prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None or file is not None:
        raise ValueError("--prompts contradicts a prompt and --file: give one of them")
    from haltkit.models.text.data import read_text

    lines = read_text(path, "prompts").removesuffix("\n").split("\n")
    if "" in lines:
        raise ValueError(f"line {lines.index('') + 1} of {str(path)!r} is empty: each line is a prompt")
    return lines


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ValueError("a prompt and --file contradict each other: give one of them")
    if prompt is not None:
        text = prompt
    elif file is not None:
        from haltkit.models.text.data import read_text

        text = read_text(file, "prompt")
    elif sys.stdin.isatty():
        raise ValueError("no prompt: give it as an argument, with --file, or on standard input")
    else:
        text = sys.stdin.read()
    text = text.removesuffix("\n") if prompt is None else text
    if not text:
        raise ValueError("the prompt is empty: give at least one character")
    return text


def _stops(tokenizer: tiktoken.Encoding, texts: Sequence[str]) -> list[int]:
    found = []
    for text in texts:
        ids = tokenizer.encode_ordinary(text)
        if len(ids) != 1:
            raise ValueError(f"--stop {text!r} is {len(ids)} tokens of this model's tokenizer, and must be one")
        found += ids
    return found


def _harmless(piece: str) -> str:
    """What a model writes must not steer the terminal: controls and changes of direction are replaced."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _steers(letter) else letter for letter in piece)


def _steers(letter: str) -> bool:
    control = unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t"
    return control or unicodedata.bidirectional(letter) in _DIRECTIONS


def _shade(steps: float) -> str:
    return next(style for limit, style in _SHADES if steps <= limit)


class _Writer:
    """Writes tokens as they come: bytes of a letter may be spread over several."""

    def __init__(self, console: Console, tokenizer: tiktoken.Encoding, show_depth: bool) -> None:
        self.console, self.tokenizer, self.show_depth = console, tokenizer, show_depth
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.steps: dict[str, list[int]] = {}

    @property
    def count(self) -> int:
        return len(self.pieces)

    def add(self, token: int, steps: dict[str, int]) -> None:
        piece = self.bytes.decode(self.tokenizer.decode_single_token_bytes(token))
        if self.console.is_terminal:
            piece = _harmless(piece)
        self.pieces.append(piece)
        self.tokens.append(token)
        for name, count in steps.items():
            self.steps.setdefault(name, []).append(count)
        style = _shade(sum(steps.values()) / len(steps)) if self.show_depth and steps else ""
        self._write(piece, style, f"[{' '.join(map(str, steps.values()))}]")

    def _write(self, piece: str, style: str, numbers: str) -> None:
        from rich.text import Text

        if self.console.is_terminal:
            self.console.print(Text(piece, style=style), end="", soft_wrap=True)
        elif not self.console.quiet:  # byte for byte what the model wrote
            self.console.file.write(piece + numbers if self.show_depth else piece)
        self.console.file.flush()

    def close(self) -> None:
        """End the line; with depths, the text once more for each region, and what the colours mean."""
        from rich.text import Text

        console = self.console
        console.print(self.bytes.decode(b"", final=True), end="\n", markup=False)
        if not self.show_depth or not self.pieces:
            return
        if not console.is_terminal:
            console.print(f"(in brackets: steps in region {', '.join(self.steps)})", markup=False)
            return
        for name, steps in self.steps.items():
            console.print(f"\nregion {name}", style="bold")
            text = Text()
            for piece, count in zip(self.pieces, steps, strict=True):
                text.append(piece, style=_shade(count))
            console.print(text)
        legend, low = Text("\nsteps: "), 1
        for limit, style in _SHADES:
            label = f"{low}+" if limit == _SHADES[-1][0] else str(low) if limit == low else f"{low}-{limit}"
            legend.append(f" {label} ", style=f"black on {style}")
            low = limit + 1
        console.print(legend)
        console.print("above, first: the mean over the regions", style="dim")
