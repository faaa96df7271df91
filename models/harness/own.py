"""Looped text models of haltkit in the harness, through their own tokenizer and their own halting."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from haltkit.card import Card
from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.models.gpt.generation import Settings, stream
from haltkit.models.gpt.sampling import Sampling
from haltkit.models.harness.report import (
    Depths,
    Report,
    asked_policy,
    check_batch,
    log_standing,
    rolling_windows,
)
from haltkit.models.text.tokenizer import encode, fingerprint
from haltkit.models.weights import CHECKPOINT_CONFIG, checkpoint_in, read_header
from haltkit.specs import policy_for_regions
from haltkit.standing import PLAIN

__all__ = ["LoopedLM", "own_folder"]

NAME, MODEL_TYPE = "text", "looped_gpt"
# What a task may ask of generation.
DRAWN = ("temperature", "top_k", "top_p", "do_sample")


def own_folder(pretrained: Any) -> Path | None:
    """The folder of a looped text model of haltkit that ``pretrained`` names; None: it names another model.

    Raises:
        CheckpointError: a damaged checkpoint.
        ValueError: a checkpoint of haltkit that does not continue text.
    """
    if pretrained == NAME:
        return BUNDLED
    folder = checkpoint_in(Path(str(pretrained)))
    if not (folder / CHECKPOINT_CONFIG).is_file():
        return None
    kind = json.loads((folder / CHECKPOINT_CONFIG).read_text(encoding="utf-8")).get("model_type", "")
    if str(kind).startswith("haltkit-"):
        raise ValueError(f"pretrained={pretrained} is a reasoner, which reads no text: give text or a text checkpoint")
    return folder if kind == MODEL_TYPE and read_header(folder) else None


class LoopedLM(TemplateLM):
    """A looped text model of haltkit, as the harness wants it.

    Args:
        pretrained: its checkpoint folder.
        policy: a spec, one per region, or the path of a card; None: the mean number of steps used in training.
        without_certificate: use the card also on another model than its own; see
            :meth:`haltkit.card.Card.without_certificate`.
        max_steps: budget of each region.
        steps: see :class:`~haltkit.models.harness.report.Report`.
        batch_size: requests per pass, the longest first.
        device: where the model goes; None: a CUDA device if there is one.
        max_gen_toks: of tasks that do not say it; None: half the context.
        seed: of the draws of tasks that sample.
        max_batch_size: what the harness gives for ``batch_size=auto``, which is refused.
        unknown: arguments of other models, which are refused.

    Raises:
        CheckpointError: a damaged checkpoint.
        FileError: ``steps`` cannot be written.
        ValueError: a bad policy, one that pools tokens at another batch size than 1, a batch size below 1, an unknown
            argument.
    """

    def __init__(
        self,
        pretrained: str | Path = BUNDLED,
        *,
        policy: str | None = None,
        without_certificate: bool = False,
        max_steps: int = 32,
        steps: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_gen_toks: int | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(
                f"{min(unknown)} has no meaning for a model of haltkit: give pretrained, policy, without_certificate, "
                "max_steps, steps, max_gen_toks or seed"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: models of haltkit take a number of 1 or more here")
        self.given, self.policy = policy, asked_policy(policy, without_certificate)
        self.report, self.batch_size, self.standing = Report(steps), int(batch_size), PLAIN
        loaded = load_checkpoint(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.encoding = loaded.model, loaded.tokenizer
        self.max_steps, self.seed = max_steps, seed
        self.max_length = self.model.block_size
        self.max_gen_toks = max_gen_toks or self.max_length // 2
        regions = list(self.model.regions)
        if isinstance(self.policy, Card):
            self.standing = self.policy.check(self.model, regions, max_steps)
            self.policies = self.policy.policies(regions)
            log_standing(self.standing)
        else:
            own_depth = f"fixed:steps={min(self.model.mean_loops, max_steps)}"
            self.policies = policy_for_regions(self.policy or own_depth, regions)
        check_batch(self.policies.values(), batch_size)
        self._pairs: list[tuple[Depths, int]] = []  # of the requests scored last, with the length of the continuation

    # --- tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.encoding.eot_token)

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of tokenized requests."""
        return f"haltkit-{fingerprint(self.encoding)}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a model of haltkit has no special tokens before a text."""
        return encode(self.encoding, string)

    # --- scoring

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation and whether it is the most likely one, in the order of the requests."""
        requests = list(requests)
        answers: list[Any] = [None] * len(requests)
        pairs: list[Any] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            given = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :][:-1] for i in batch]
            for i, (logits, depths) in zip(batch, self._passed(given), strict=True):
                continuation = torch.tensor(requests[i][2])
                count = len(continuation)
                if not 0 < count <= len(logits):
                    raise ValueError(f"a continuation of {count} tokens does not fit the context of {self.max_length}")
                log_p = logits[-count:].log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
                likely = bool((log_p.argmax(-1) == continuation).all())
                answers[i] = (float(log_p.gather(-1, continuation.unsqueeze(-1)).sum()), likely)
                pairs[i] = (depths, count)
        self._pairs += pairs
        return answers

    def _passed(self, given: Sequence[list[int]]) -> Iterator[tuple[Tensor, Depths]]:
        """Of each text the logits ``(T, V)``, on the CPU, and the steps of its positions."""
        device = self.model.wte.weight.device
        tokens = pad_sequence([torch.tensor(ids) for ids in given], batch_first=True)
        rows = torch.arange(tokens.shape[1]) < torch.tensor([len(ids) for ids in given]).unsqueeze(1)
        out = self.model.forward_adaptive(
            tokens.to(device), self.policies, max_loops=self.max_steps, rows=rows.to(device), execution="compact"
        )
        for b, ids in enumerate(given):
            yield out.logits[b, : len(ids)].cpu(), Depths.of_row(out.steps, out.outcome, b).cut(0, len(ids))

    # --- requests

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._pairs.clear()
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self.report.add((request, [pair]) for request, pair in zip(requests, self._pairs, strict=True))
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        self._pairs.clear()
        windows = [rolling_windows(self, request) for request in requests]
        scores = iter(self._loglikelihood_tokens([(None, *window) for some in windows for window in some]))
        pairs = iter(self._pairs)
        answers = [sum(next(scores)[0] for _ in some) for some in windows]
        self.report.add((request, [next(pairs) for _ in some]) for request, some in zip(requests, windows, strict=True))
        return answers

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = []
        for asked, alike in groupby(requests, key=lambda request: request.args[1]):
            some = list(alike)
            for start in range(0, len(some), self.batch_size):
                batch = some[start : start + self.batch_size]
                contexts = [request.args[0] for request in batch]
                texts, parts = self._continued(contexts, asked, self.seed + len(answers))
                answers += texts
                self.report.add((request, [part]) for request, part in zip(batch, parts, strict=True))
        return answers

    def _continued(self, contexts: Sequence[str], asked: Any, seed: int) -> tuple[list[str], list[tuple[Depths, int]]]:
        """Continuations up to a text of ``until``, each with the steps of its tokens."""
        wanted = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        until, count = [text for text in wanted.pop("until") if text], wanted.pop("max_gen_toks")
        if unknown := sorted(set(wanted) - set(DRAWN)):
            raise ValueError(f"generation_kwargs {unknown[0]}: a model of haltkit takes until, max_gen_toks, {DRAWN}")
        if not 0 < count < self.max_length:
            raise ValueError(
                f"max_gen_toks={count} does not fit the model's context of {self.max_length}: say less with "
                "--gen_kwargs max_gen_toks=N"
            )
        drawn = {name: wanted.get(name) for name in ("top_k", "top_p")}
        sampling = Sampling(wanted.get("temperature", 0.0), **drawn, seed=seed, vocabulary=self.encoding.n_vocab)
        settings = Settings(count, sampling, [self.eot_token_id], max_loops=self.max_steps)
        prompts = [(self.tok_encode(text) or [self.eot_token_id])[-(self.max_length - count) :] for text in contexts]
        made: list[list[int]] = [[] for _ in prompts]
        found = [Depths({name: [] for name in self.policies}, {name: [] for name in self.policies}) for _ in prompts]
        going = set(range(len(prompts)))
        for emission in stream(self.model, prompts, self.policies, settings):
            for b in sorted(going):
                token, reason = emission.tokens[b], emission.finished[b]
                if token is not None and reason != "stop":
                    made[b].append(token)
                    for name in self.policies:
                        found[b].steps[name].append(emission.steps[name][b])
                        found[b].outcomes[name].append(emission.outcomes[name][b])
                if reason is not None or any(text in self.encoding.decode(made[b]) for text in until):
                    going.discard(b)
            if not going:
                break
        texts = [postprocess_generated_text(self.encoding.decode(tokens), until, None) for tokens in made]
        return texts, [(depths, len(depths)) for depths in found]

    def get_model_info(self) -> dict[str, Any]:
        """The model's size and dtype, and ``haltkit``: policy, card, and the steps of context and continuation."""
        parameters = list(self.model.parameters())
        return {
            "model_num_parameters": sum(one.numel() for one in parameters),
            "model_dtype": str(parameters[0].dtype),
            "haltkit": self.report.summary(self.given, self.policy, self.standing, {"max_steps": self.max_steps}),
        }
