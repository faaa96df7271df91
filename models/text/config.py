"""Where training text comes from, as a config's ``data`` section says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from haltkit.models.config import ConfigError

__all__ = ["DataConfig"]


@dataclass(frozen=True)
class DataConfig:
    """Where training tokens come from: a folder written by ``haltkit prepare``, or a stream beside it."""

    path: str = ""
    train_split: str = "train"
    eval_split: str = "validation"
    # Train on text read and tokenized on the way instead of the prepared split: a Hub dataset, or local files. The
    # folder at ``path`` still gives the tokenizer and the evaluation split, whose documents the stream skips.
    stream: str = ""
    stream_config: str = ""
    # A commit, tag or branch of the dataset on the Hub. A commit makes sure that a resumed run reads the same text.
    stream_revision: str = ""
    stream_column: str = "text"
    # What a document of the stream that cannot be read does: "stop" the run, or be skipped and counted in the log.
    bad_documents: Literal["stop", "skip"] = "stop"
    # Processes that read and tokenize for each training process; 0 does it between steps.
    stream_workers: int = 1

    def __post_init__(self) -> None:
        if self.stream_revision and not self.stream:
            raise ConfigError("data.stream_revision is of a dataset on the Hub: name that in data.stream")
        if self.stream_workers < 0:
            raise ConfigError(f"data.stream_workers must not be negative, got {self.stream_workers}")
