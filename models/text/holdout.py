"""Which documents are kept for validation: a function of their text, so that a stream skips the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ENOUGH", "Document", "document_key", "held_out", "more_to_hold_out"]

# Tokens that are worth measuring a loss on, but never more than this share of a small text.
ENOUGH, SMALL_SHARE = 16_384, 0.05
LARGEST_SHARE = 0.2  # of all tokens, that a single document kept for validation may have


@dataclass(frozen=True)
class Document:
    """A tokenized document, by the hash of its text."""

    key: str
    tokens: np.ndarray[Any, Any]


def document_key(text: str) -> str:
    """16 hexadecimal digits of a document's hash."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def held_out(text: str, share: float, also: Collection[str] = ()) -> bool:
    """Whether a document belongs to the validation split.

    Args:
        share: of all documents, chosen by their hash.
        also: keys of further documents that a preparation held out.
    """
    key = document_key(text)
    return int(key, 16) < share * 2**64 or key in also


def more_to_hold_out(train: Sequence[Document], validation: Sequence[Document], share: float) -> set[str]:
    """Keys of training documents to hold out as well, where the hash alone gave too little text.

    Wanted is the share of the tokens, and of a small text 16,384 tokens or a twentieth of it, whichever is less.
    Nothing is changed where half of that is held out already. Otherwise documents are taken in the order of their
    hashes, as long as no more than twice what is wanted is held out; where all are too large for that, the smallest
    one, if it is no more than a fifth of the text. Documents are never divided, and one stays for training.
    """
    kept = sum(document.tokens.size for document in validation)
    total = kept + sum(document.tokens.size for document in train)
    wanted = max(share * total, min(SMALL_SHARE * total, ENOUGH))
    if not share or kept >= wanted / 2:
        return set()
    sizes: dict[str, int] = {}  # documents of one text go together
    for document in train:
        sizes[document.key] = sizes.get(document.key, 0) + document.tokens.size
    chosen: set[str] = set()
    for key in sorted(sizes):
        if len(chosen) < len(sizes) - 1 and kept + sizes[key] <= 2 * wanted:
            chosen.add(key)
            kept += sizes[key]
        if kept >= wanted:
            break
    if not kept and len(sizes) > 1:
        smallest = min(sizes, key=lambda key: (sizes[key], key))
        if sizes[smallest] <= LARGEST_SHARE * total:
            chosen.add(smallest)
    return chosen
