"""Language modelling on a corpus: perplexity, and what the equilibrium costs."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deqzoo.data.text import (
    SOURCES,
    UNKNOWN,
    TextSource,
    describe_stream,
    encode_rows,
    load_rows,
)
from deqzoo.errors import UserError
from deqzoo.evaluation.perplexity import Scorer
from deqzoo.tasks.metrics import equilibrium_summary


def load_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """The tokenizer stored beside a model's weights.

    Raises:
        UserError: there is none.
    """
    folder = model.config._name_or_path
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"no tokenizer beside the weights in {folder or 'memory'}") from error


class TextEvaluator:
    """A language model of a known corpus.

    The split is one stream in reading order, so that a batch size has no influence; the figure is
    the one of `deqzoo perplexity --pretokenized`.

    Raises:
        UserError: the model's vocabulary is that of no known corpus, or the data are missing.
    """

    task = "language-modeling"
    metric = "perplexity"
    unit = "tokens"
    budget_samples = 10_000

    def __init__(
        self,
        model: PreTrainedModel,
        split: str,
        data: str | os.PathLike[str] | None,
        *,
        batch_size: int,
        limit: int | None,
        progress: bool,
    ) -> None:
        self.model = model
        self.progress = progress
        tokenizer = load_tokenizer(model)
        source = corpus_of(tokenizer)
        self.stream = _stream(source, split, data, tokenizer)
        self.description = describe_stream(source, split, self.stream)
        if limit is not None and limit < len(self.stream):
            self.stream = self.stream[:limit]
            self.description |= {"complete": False, "limit": limit}

    def describe(self) -> dict[str, Any]:
        known = {k: v for k, v in self.description.items() if k not in ("split", "tokens")}
        return {"name": known.pop("name"), "samples": len(self.stream), "unit": self.unit} | known

    def environment(self) -> dict[str, Any]:
        return {"segment_length": self.model.config.tgt_len}

    def measure(
        self,
        solver: dict[str, Any] | None = None,
        samples: int | None = None,
        title: str = "evaluating",
    ) -> dict[str, Any]:
        return score(self.model, self.stream[:samples], solver, self.progress, title)


def corpus_of(tokenizer: PreTrainedTokenizerFast) -> TextSource:
    """The corpus whose vocabulary a tokenizer has.

    Raises:
        UserError: it is that of no known corpus.
    """
    for source in SOURCES.values():
        if source.vocabulary_size == len(tokenizer):
            return source
    raise UserError(
        f"a vocabulary of {len(tokenizer)} words is that of no known corpus; "
        f"known are {', '.join(SOURCES)}"
    )


def _stream(
    source: TextSource,
    split: str,
    data: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerFast,
) -> Tensor:
    vocabulary = tokenizer.get_vocab()
    rows: Iterator[list[int]] = encode_rows(
        load_rows(source, split, data), vocabulary, vocabulary[UNKNOWN]
    )
    return torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64)


def score(
    model: PreTrainedModel,
    stream: Tensor,
    solver: dict[str, Any] | None = None,
    progress: bool = False,
    title: str = "evaluating",
) -> dict[str, Any]:
    """Perplexity of a stream of tokens (n,), with the solver's report and the time taken."""
    reports: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(targets: Tensor, outputs: Any) -> None:
        report = outputs.token_steps, outputs.token_residual, outputs.token_converged
        reports.append(tuple(part[0].cpu() for part in report))

    scorer = Scorer(model, solver=solver, on_segment=keep)
    began = time.perf_counter()
    pieces = stream.split(scorer.length)
    for piece in tqdm(pieces, desc=title, unit="segment", disable=not progress):
        scorer.add(piece.tolist())
    report = scorer.finish()
    seconds = time.perf_counter() - began
    steps, residual, converged = (torch.cat(part) for part in zip(*reports, strict=True))
    return {
        "perplexity": report.perplexity,
        "negative_log_likelihood": report.nll / report.tokens,
        **equilibrium_summary(steps, residual, converged),
        "seconds_per_sample": seconds / report.tokens,
    }
