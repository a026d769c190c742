"""Perplexity of any text, streamed segment by segment in constant memory.

The context starts with `<eos>`, so that every token of the text is scored, and states of earlier
segments stay visible through the model's memory: with a memory that covers the attention window
the result does not depend on where segments are cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deqzoo.data.lines import Fragment
from deqzoo.data.text import END, UNKNOWN
from deqzoo.errors import UserError
from deqzoo.models.deq_transformer.tokenization_deq_transformer import (
    in_corpus_case,
    prepare_text,
    text_style,
)


@dataclass
class PerplexityReport:
    """What a text costs a model, summed over its tokens.

    Attributes:
        tokens: scored tokens, an `<eos>` for every line among them.
        unknown: tokens that are `<unk>`, in the text or because the vocabulary lacks the word.
        characters: characters of the text as it was read, line breaks included.
        nll: sum of the negative log-likelihoods in nats.
        unconverged: tokens whose equilibrium did not reach the tolerance.
        steps: solver steps, summed over tokens; `max_steps` is the largest number.
        max_residual: largest residual of a token.
        surprisal: word and its negative log-likelihood in nats, where asked for.
    """

    tokens: int = 0
    unknown: int = 0
    characters: int = 0
    nll: float = 0.0
    unconverged: int = 0
    steps: int = 0
    max_steps: int = 0
    max_residual: float = 0.0
    surprisal: list[tuple[str, float]] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token; inf where that overflows."""
        mean = self.nll / max(self.tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_character(self) -> float:
        """Bits of the whole text, spread over its characters."""
        return self.nll / math.log(2) / max(self.characters, 1)

    def to_dict(self) -> dict[str, Any]:
        """The figures, for JSON; surprisal only where it was asked for."""
        tokens = max(self.tokens, 1)
        figures: dict[str, Any] = {
            "perplexity": self.perplexity,
            "bits_per_character": self.bits_per_character,
            "negative_log_likelihood": self.nll / tokens,
            "tokens": self.tokens,
            "characters": self.characters,
            "unknown_share": self.unknown / tokens,
            "n_steps_mean": self.steps / tokens,
            "n_steps_max": self.max_steps,
            "unconverged_tokens": self.unconverged,
            "unconverged_share": self.unconverged / tokens,
            "residual_max": self.max_residual,
        }
        if self.surprisal:
            figures["surprisal"] = [[word, nats] for word, nats in self.surprisal]
        return figures


class Scorer:
    """Scores a stream of tokens with one model, one segment after the other.

    Args:
        model: a DEQ-Transformer with its head.
        segment_length: tokens per forward; by default the model's own.
        solver: settings for these forwards, over the model's.
        on_segment: called after each segment with the shifted tokens (T,) and their outputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        segment_length: int | None = None,
        solver: dict[str, Any] | None = None,
        on_segment: Callable[[Tensor, Any], None] | None = None,
    ) -> None:
        self.model = model.eval()
        self.length = segment_length or model.config.tgt_len
        if self.length < 1:
            raise UserError(f"the segment length must be at least 1, got {self.length}")
        self.solver = solver
        self.on_segment = on_segment
        self.report = PerplexityReport()
        self.memory: tuple[Tensor, Tensor] | None = None
        self.context = _first_end(model)
        self.pending_tokens: list[int] = []

    def add(self, tokens: Iterable[int]) -> None:
        """Take tokens; whole segments are scored at once."""
        self.pending_tokens.extend(tokens)
        while len(self.pending_tokens) >= self.length:
            self._score(self.pending_tokens[: self.length])
            del self.pending_tokens[: self.length]

    def finish(self) -> PerplexityReport:
        """Score what is left and return the sums."""
        if self.pending_tokens:
            self._score(self.pending_tokens)
            self.pending_tokens = []
        return self.report

    @torch.inference_mode()
    def _score(self, tokens: list[int]) -> None:
        device = self.model.device
        inputs = torch.tensor([[self.context, *tokens[:-1]]], device=device)
        targets = torch.tensor([tokens], device=device)
        outputs = self.model(
            inputs,
            labels=targets,
            shift=False,
            memory=self.memory,
            return_logits=False,
            solver=self.solver,
        )
        self.memory, self.context = outputs.memory, tokens[-1]
        report = self.report
        report.tokens += len(tokens)
        report.nll += outputs.nll.double().sum().item()
        report.steps += int(outputs.token_steps.sum())
        report.max_steps = max(report.max_steps, int(outputs.token_steps.max()))
        report.max_residual = max(report.max_residual, float(outputs.token_residual.max()))
        report.unconverged += int((~outputs.token_converged).sum())
        if self.on_segment is not None:
            self.on_segment(targets[0], outputs)


def _first_end(model: PreTrainedModel) -> int:
    """The index of `<eos>`, with which every context starts."""
    end = model.config.eos_token_id
    end = end[0] if isinstance(end, (list, tuple)) else end
    return 0 if end is None else int(end)


def perplexity(
    model: PreTrainedModel,
    lines: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    pretokenized: bool = False,
    keep_surprisal: bool = False,
    segment_length: int | None = None,
    solver: dict[str, Any] | None = None,
    on_line: Callable[[str], None] | None = None,
    on_segment: Callable[[Tensor, Any], None] | None = None,
) -> PerplexityReport:
    """Score a text.

    Args:
        model: a DEQ-Transformer with its head.
        lines: the text's lines; each one ends with an `<eos>`, blank ones too. A `Fragment` does
            not.
        tokenizer: the model's.
        pretokenized: the lines are rows of the corpus and are only split at white space; else
            they are prepared as `prepare_text` does.
        keep_surprisal: keep every token's negative log-likelihood.
        segment_length: tokens per forward; by default the model's own.
        solver: settings over the model's.
        on_line: called with each line once it has been taken, for progress.
        on_segment: called after each segment with its tokens (T,) and the model's outputs.

    Raises:
        UserError: the text holds no word.
    """
    vocabulary, style = tokenizer.get_vocab(), text_style(tokenizer)
    unknown, end = vocabulary[UNKNOWN], vocabulary[END]
    surprisals: list[tuple[str, float]] = []
    words_of_index = {index: word for word, index in vocabulary.items()} if keep_surprisal else {}

    def keep(targets: Tensor, outputs: Any) -> None:
        values = outputs.nll[0].double().tolist()
        words = (words_of_index[index] for index in targets.tolist())
        surprisals.extend(zip(words, values, strict=True))

    def take(targets: Tensor, outputs: Any) -> None:
        if keep_surprisal:
            keep(targets, outputs)
        if on_segment is not None:
            on_segment(targets, outputs)

    scorer = Scorer(model, segment_length, solver, take)
    characters = n_unknown = n_words = 0
    for line in lines:
        text = line if pretokenized else prepare_text(line.rstrip("\r\n"), vocabulary, style).text
        words = in_corpus_case(text, style).split()
        indices = [vocabulary.get(word, unknown) for word in words]
        whole = not isinstance(line, Fragment)
        characters += len(line.rstrip("\r\n")) + whole
        n_unknown += indices.count(unknown)
        n_words += len(words)
        scorer.add([*indices, end] if whole else indices)
        if on_line is not None:
            on_line(line)
    if n_words == 0:
        raise UserError("the text is empty: it holds no word to score")
    report = scorer.finish()
    report.characters, report.unknown, report.surprisal = characters, n_unknown, surprisals
    return report
