"""Language modelling on a corpus: perplexity, and what the equilibrium costs."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deqzoo.data.own import read_record
from deqzoo.data.own_text import OwnText, lines_of_split, load_own_text, text_digest
from deqzoo.data.text import (
    SOURCES,
    SPLITS,
    UNKNOWN,
    TextSource,
    corpus_files,
    describe_stream,
    encode_rows,
    load_rows,
    row_words,
)
from deqzoo.errors import UserError
from deqzoo.evaluation.base import Evaluator
from deqzoo.evaluation.perplexity import Scorer
from deqzoo.models.deq_transformer.tokenization_deq_transformer import (
    in_corpus_case,
    prepare_text,
    text_style,
)
from deqzoo.models.readers import load_tokenizer
from deqzoo.tasks.metrics import equilibrium_summary

_ROWS_TO_KNOW, _FOREIGN_SHARE = 10_000, 0.01
"""Rows of a folder that are looked at, and the share of words above which it is no known corpus."""


class TextEvaluator(Evaluator):
    """A language model on its corpus, or on a text of one's own.

    The split is one stream in reading order, so that a batch size has no influence; the figure is
    the one of `deqzoo perplexity --pretokenized`.

    Args:
        arguments, how: see `Evaluator`.
        column: of the texts in a table; if None the one that the model was trained on.

    Raises:
        UserError: the data are missing, and the vocabulary is that of no known corpus.
    """

    task = "language-modeling"
    metric = "perplexity"
    unit = "tokens"
    budget_samples = 10_000

    def __init__(self, *arguments: Any, column: str | None = None, **how: Any) -> None:
        self.column = column
        super().__init__(*arguments, **how)

    def load(self, split: str, data: str | os.PathLike[str] | None, limit: int | None) -> None:
        tokenizer = load_tokenizer(self.model)
        self.stream, self.description = _stream_of(self.model, tokenizer, split, data, self.column)
        self.count = len(self.stream)
        self.limit_to(limit)
        self.stream = self.stream[: self.count]

    def environment(self) -> dict[str, Any]:
        return {"segment_length": self.model.config.tgt_len}

    def measure(
        self,
        solver: dict[str, Any] | None = None,
        samples: int | None = None,
        title: str = "evaluating",
    ) -> dict[str, Any]:
        stream = self.stream[:samples]
        figures = score(self.model, stream, solver, self.progress, title)
        n_measured = figures.pop("tokens")
        self.interrupted = n_measured if n_measured < len(stream) else 0
        return figures


def _stream_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    data: str | os.PathLike[str] | None,
    column: str | None,
) -> tuple[Tensor, dict[str, Any]]:
    """Word indices (n,) of a text of one's own or of the model's corpus, and what they are."""
    record = read_record(model.config._name_or_path)
    if data is None or (record is None and not _is_text(tokenizer, data, split)):
        if column is not None:
            raise UserError("--column is of texts of your own: name a table of them with --data")
        source = corpus_of(tokenizer)
        stream = corpus_stream(source, split, data, tokenizer)
        return stream, describe_stream(source, split, stream)
    recorded_column = (record or {}).get("column")
    text = load_own_text(Path(data), column or ([recorded_column] if recorded_column else None))
    lines = lines_of_split(text, split, record)
    vocabulary, style = tokenizer.get_vocab(), text_style(tokenizer)
    prepared_text = prepare_text("\n".join(lines), vocabulary, style)
    if prepared_text.n_words == 0:
        raise UserError(f"{text.name} holds no word to score")
    stream = _encode(in_corpus_case(prepared_text.text, style).split("\n"), vocabulary)
    return stream, {
        "name": text.name,
        "split": split,
        "tokens": len(stream),
        "fingerprint": text_digest(lines),
        "complete": True,
        "unknown_share": prepared_text.unknown_share,
        "local": True,
        **({"chose_weights": True} if split == "test" and _one_hold_out(text, record) else {}),
    }


def _one_hold_out(text: OwnText, record: dict[str, Any] | None) -> bool:
    """Whether the lines that the model was not trained on chose its weights."""
    record = record or {}
    lines = text.lines[: int(record.get("lines", 0))]
    return bool(record.get("one_hold_out")) and text_digest(lines) == record.get("train")


def _is_text(tokenizer: PreTrainedTokenizerFast, data: str | os.PathLike[str], split: str) -> bool:
    """Whether local data are a text of one's own: a file, or a folder that is no known corpus.

    A folder with files named `train.txt` and `test.txt` is a corpus where the words of the first
    rows are its own.
    """
    path = Path(data).expanduser()
    if not path.is_dir():
        return path.is_file()
    try:
        source = corpus_of(tokenizer)
        corpus_files(source, path)
    except UserError:
        return True
    if split not in SPLITS:
        return False
    vocabulary = tokenizer.get_vocab()
    rows = itertools.islice(load_rows(source, split, path), _ROWS_TO_KNOW)
    known = [word in vocabulary for row in rows for word in row_words(row)]
    return known.count(False) > _FOREIGN_SHARE * len(known)


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


def corpus_stream(
    source: TextSource,
    split: str,
    data: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerFast,
) -> Tensor:
    """Word indices (n,) int64 of a split of a corpus, in a tokenizer's numbering."""
    return _encode(load_rows(source, split, data), tokenizer.get_vocab())


def _encode(rows: Iterable[str], vocabulary: dict[str, int]) -> Tensor:
    encoded_rows = encode_rows(rows, vocabulary, vocabulary[UNKNOWN])
    return torch.tensor(list(itertools.chain.from_iterable(encoded_rows)), dtype=torch.int64)


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
    try:
        disable = None if progress else True  # None: in a terminal only
        for piece in tqdm(pieces, desc=title, unit="segment", disable=disable):
            scorer.add(piece.tolist())
        report = scorer.finish()
    except KeyboardInterrupt:
        report = scorer.report
        if not report.tokens:
            raise
    seconds = time.perf_counter() - began
    steps, residual, converged = (torch.cat(part) for part in zip(*reports, strict=True))
    return {
        "tokens": report.tokens,
        "perplexity": report.perplexity,
        "negative_log_likelihood": report.nll / report.tokens,
        **equilibrium_summary(steps, residual, converged),
        "seconds_per_sample": seconds / report.tokens,
    }
