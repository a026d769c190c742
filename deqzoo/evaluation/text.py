"""Language modelling on a corpus: perplexity, and what the equilibrium costs."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
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
from deqzoo.evaluation.files import describe_environment, describe_model
from deqzoo.evaluation.metrics import equilibrium_summary
from deqzoo.evaluation.perplexity import Scorer

BUDGETS = (2, 4, 8, 16, 30)
# Budget curves show what a number of steps gives, so the tolerance must not end a solve earlier.
BUDGET_TOLERANCE = 1e-7


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


def evaluate_text(
    model: PreTrainedModel,
    name: str,
    *,
    split: str = "test",
    data: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    budget_tokens: int = 10_000,
    progress: bool = True,
) -> dict[str, Any]:
    """The content of an evaluation file.

    The split is one stream in reading order, so `batch_size` has no influence; the figure is the
    one of `deqzoo perplexity --pretokenized`.

    Args:
        model: a language model of a known corpus, loaded from a folder with its tokenizer.
        name: what the file calls the model.
        split: of the corpus.
        data: local folder or repository of the corpus; its own repository if None.
        limit: score only the first so many tokens; the file says so.
        budget_tokens: tokens for perplexity against solver budget; 0 leaves it out.
        progress: show bars on stderr.

    Raises:
        UserError: the model's vocabulary is that of no known corpus, or the data are missing.
    """
    tokenizer = load_tokenizer(model)
    source = corpus_of(tokenizer)
    stream = _stream(source, split, data, tokenizer)
    description = describe_stream(source, split, stream)
    if limit is not None and limit < len(stream):
        stream = stream[:limit]
        description |= {"tokens": limit, "complete": False, "limit": limit}
    return {
        "format": 1,
        "task": "language-modeling",
        "model": describe_model(model, name),
        "data": description,
        "results": score(model, stream, progress=progress),
        "budget": budget_curve(model, stream[:budget_tokens], progress),
        "environment": describe_environment(model) | {"segment_length": model.config.tgt_len},
        "command": f"deqzoo evaluate {name} --split {split}"
        + (f" --limit {limit}" if "limit" in description else ""),
    }


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
        "tokens": report.tokens,
        "unconverged_tokens": report.unconverged,
        **equilibrium_summary(steps, residual, converged),
        "tokens_per_second": report.tokens / seconds,
    }


def budget_curve(
    model: PreTrainedModel, stream: Tensor, progress: bool, budgets: Sequence[int] = BUDGETS
) -> dict[str, Any] | None:
    """Perplexity and residual after a fixed number of solver steps, on the first tokens."""
    if len(stream) == 0 or not model.config.has_equilibrium:
        return None
    rows = []
    for steps in budgets:
        solver = {"max_steps": steps, "tol": BUDGET_TOLERANCE}
        figures = score(model, stream, solver, progress, f"{steps} steps")
        kept = ("perplexity", "residual_median", "residual_p95", "tokens_per_second")
        rows.append({"max_steps": steps, **{key: figures[key] for key in kept}})
    default = score(model, stream, None, progress)
    return {
        "tokens": len(stream),
        "tol": BUDGET_TOLERANCE,
        "default_perplexity": default["perplexity"],
        "steps": rows,
    }
