"""Tokenizers, all run by tiktoken: GPT-2's, or a byte-level BPE that a user trained, in tiktoken's file format."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken

__all__ = [
    "END_OF_TEXT",
    "TOKENIZER_FILE",
    "TokenizerError",
    "check_vocabulary_size",
    "copy_tokenizer",
    "encode",
    "fingerprint",
    "load_tokenizer",
    "read_ranks",
    "train_tokenizer",
    "write_ranks",
]

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.tiktoken"
LARGEST_VOCABULARY = 2**20

# GPT-2's split into words: contractions, letters, digits, other marks, white space.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class TokenizerError(ValueError):
    """A tokenizer that cannot be found or read."""


def load_tokenizer(source: str | Path) -> tiktoken.Encoding:
    """A tokenizer by name or place.

    Args:
        source: ``"gpt2"``; a file in tiktoken's format; a checkpoint or data folder that has
            ``tokenizer.tiktoken``; or a folder with GPT-2's own ``vocab.bpe`` and ``encoder.json``.

    Raises:
        TokenizerError: nothing usable there, or ``gpt2`` is neither cached nor downloadable.
    """
    path = Path(source)
    if path.is_dir():
        if (path / TOKENIZER_FILE).is_file():
            path = path / TOKENIZER_FILE
        elif (path / "vocab.bpe").is_file() and (path / "encoder.json").is_file():
            return _build("gpt2", _gpt2_ranks(path))
        else:
            raise TokenizerError(f"{path.name}: no {TOKENIZER_FILE} in this folder, nor vocab.bpe and encoder.json")
    if path.is_file():
        return _build(path.stem, read_ranks(path))
    if str(source) != "gpt2":
        raise TokenizerError(f"no tokenizer {str(source)!r}: give gpt2, a .tiktoken file, or a folder with one")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network stack raises; tiktoken does not wrap it
        raise TokenizerError(
            "tiktoken could not download gpt2 "
            f"({type(error).__name__}). Provide it: pass a folder with GPT-2's vocab.bpe and encoder.json as the "
            "tokenizer, or set TIKTOKEN_CACHE_DIR to a folder filled on a machine with a network"
        ) from None


# A longer run of white space overflows the stack of tiktoken's regular expressions.
_LONG_SPACE = re.compile(r"\s{10000}")
# The trainer's time grows with the square of a word's length.
_LONG_WORD = re.compile(r"\S{1000}|\s{1000}")


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """A document's tokens, without the end of text; any text, of any length.

    White space without end is cut into pieces of 10,000 characters first, which is the only case where the tokens
    differ from tiktoken's own, which would not return.
    """
    if _LONG_SPACE.search(text) is None:
        return encoding.encode_ordinary(text)
    return [token for piece in _cut(text, _LONG_SPACE) for token in encoding.encode_ordinary(piece)]


def _cut(text: str, after: re.Pattern[str]) -> Iterator[str]:
    start = 0
    for match in after.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _build(name: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name=name, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def _gpt2_ranks(folder: Path) -> dict[bytes, int]:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    # tiktoken caches what it reads under a hash of the path, so a changed file would be read stale.
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        return data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a file in tiktoken's format: one ``base64(token) rank`` a line.

    Raises:
        TokenizerError: a line that is not one, ranks that are not ``0 .. n-1``, or a missing byte.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{path.name}, line {number}: not 'base64(token) rank'") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise TokenizerError(f"{path.name}: ranks must be 0 to n-1, each once, and every single byte be a token")
    return ranks


def check_vocabulary_size(size: int) -> None:
    """Check that a tokenizer with this many tokens can be trained.

    Raises:
        TokenizerError: no room for all bytes, or more than any that is in use (the trainer reserves memory for
            all of it before it has read a word).
    """
    if size < 257:
        raise TokenizerError(f"a vocabulary of {size} has no room for 256 bytes and the end-of-text token")
    if size > LARGEST_VOCABULARY:
        raise TokenizerError(
            f"a vocabulary of {size:,} is too large: at most {LARGEST_VOCABULARY:,} tokens are trained"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> tiktoken.Encoding:
    """Train a byte-level BPE and save it in tiktoken's format.

    Args:
        texts: documents to learn the merges from.
        vocab_size: size of the whole vocabulary, the 256 bytes and the end-of-text token included.
        path: where the file goes.

    Raises:
        TokenizerError: ``vocab_size`` under 257 or above 2^20, or a text too short to yield that many tokens.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    check_vocabulary_size(vocab_size)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((piece for text in texts for piece in _cut(text, _LONG_WORD)), trainer)
    vocabulary = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    if len(vocabulary) != vocab_size - 1:
        raise TokenizerError(
            f"the text yields {len(vocabulary) + 1} tokens, fewer than the {vocab_size} asked for: ask for fewer"
        )
    byte_of = _byte_alphabet()
    ranks = {bytes(byte_of[c] for c in token): rank for rank, (token, _) in enumerate(vocabulary)}
    encoding = _build(path.stem, ranks)
    write_ranks(encoding, path)
    return encoding


def write_ranks(encoding: tiktoken.Encoding, path: Path) -> None:
    """Write a tokenizer in tiktoken's format: one ``base64(token) rank`` a line, without the special token."""
    from haltkit.files import atomic_path

    with atomic_path(path) as partial:
        partial.write_bytes(_ranks(encoding))


def _ranks(encoding: tiktoken.Encoding) -> bytes:
    tokens = (encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab - 1))
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens))


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """A hash of a tokenizer's tokens, wherever it was read from."""
    return hashlib.sha256(_ranks(encoding)).hexdigest()[:16]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer of a folder, if it has one of its own and does not use gpt2's, into another folder."""
    if (source / TOKENIZER_FILE).is_file():
        shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)


def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(shifted)}
