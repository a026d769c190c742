"""Language modelling: contiguous streams of a corpus, with memory from segment to segment."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deqzoo.data.own import write_record
from deqzoo.data.own_text import load_own_text, own_corpus, text_digest
from deqzoo.data.text import (
    END,
    UNKNOWN,
    Corpus,
    TextSource,
    batch_streams,
    count_vocabulary,
    load_corpus,
    source_of,
)
from deqzoo.errors import UserError
from deqzoo.models.deq_transformer.configuration_deq_transformer import DEQTransformerConfig
from deqzoo.models.deq_transformer.modeling_deq_transformer import DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import (
    build_tokenizer,
    in_corpus_case,
    prepare_text,
    text_style,
)
from deqzoo.models.readers import load_tokenizer
from deqzoo.recipe import Recipe, Stage
from deqzoo.tasks.base import Plan, Probe, Task, build_config, check_options, own_path
from deqzoo.tasks.finetuning import Job, Settings
from deqzoo.tasks.metrics import joined_summary

OWN = "text"
"""Name of a text of one's own in a recipe."""
VALIDATION_STREAMS = 10


class LanguageModelingTask(Task):
    """WikiText-2, WikiText-103 and Penn Treebank with the DEQ-Transformer.

    The training split is cut into `batch_size` × `accumulate` streams that are read side by side,
    a segment of `resolution` tokens per step (by default the config's `tgt_len`). Each part of an
    accumulated batch keeps its own memory; an epoch starts with an empty one, and so does a share
    `augment.forget` of the steps, chosen by the seed: a model that only ever saw full memories has
    unstable equilibria at the beginning of a text.

    Raises:
        UserError: settings that language modelling does not have, or data that do not fit.
    """

    metric = "perplexity"

    def __init__(
        self, recipe: Recipe, data: str | os.PathLike[str] | None, stand_in: bool = False
    ) -> None:
        for key in ("label_smoothing", "whiten"):
            if getattr(recipe, key):
                raise UserError(f"{key} is no setting of language modelling; remove it")
        self.forget = _forget_share(recipe.augment)
        is_own = recipe.data.name == OWN
        check_options(own_corpus if is_own else load_corpus, recipe.data.options)
        self.recipe = recipe
        self.record: dict[str, Any] | None = None
        if is_own:
            path = own_path(recipe, data)
            self.corpus, self.record = own_corpus(path, **recipe.data.options)
            streams = self.corpus.streams
            if recipe.evaluation.keep == "best" and streams["test"] is streams["validation"]:
                self.record["one_hold_out"] = True
        elif stand_in:
            self.corpus = stand_in_corpus(source_of(recipe.data.name))
        else:
            self.corpus = load_corpus(recipe.data.name, data, **recipe.data.options)
        vocab_size = len(self.corpus.vocabulary)
        self.config = build_config(DEQTransformerConfig, recipe.model, vocab_size=vocab_size)
        n_streams = recipe.batch_size * recipe.accumulate
        self.streams = batch_streams(self.corpus.stream("train"), n_streams)  # (n, length)
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self._part = 0

    def model(self) -> PreTrainedModel:
        return DEQTransformerForCausalLM(self.config)

    def _segment_length(self, stage: Stage) -> int:
        return stage.resolution or self.config.tgt_len

    def steps_per_epoch(self, stage: Stage) -> int:
        return max(1, (self.streams.shape[1] - 1) // self._segment_length(stage))

    def batch(self, plan: Plan, micro_step: int, rank: int, world: int) -> dict[str, Any]:
        """Words and next words (b, T), b = batch_size / world, and where they stand."""
        step, part = divmod(micro_step, plan.accumulate)
        length = self._segment_length(plan.stage(step))
        _, position = plan.position(step)
        share = self.recipe.batch_size // world
        first = part * self.recipe.batch_size + rank * share
        start = position * length
        rows = self.streams[first : first + share, start : start + length + 1]
        return {
            "input_ids": rows[:, :-1],
            "labels": rows[:, 1:],
            "part": part,
            "fresh": position == 0 or self._forgets(micro_step),
        }

    def resident(self, device: torch.device) -> ResidentText:
        """The training text on a device, for steps that never wait for it."""
        words = self.corpus.stream("train").to(device)
        n_streams = self.recipe.batch_size * self.recipe.accumulate
        return ResidentText(
            words, n_streams, self.config, self._segment_length, self.forget, self.recipe.seed
        )

    def _forgets(self, micro_step: int) -> bool:
        """Whether a step starts without memory, the same on all processes and after a resume."""
        if not self.forget:
            return False
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + micro_step)
        return float(torch.rand((), generator=generator)) < self.forget

    def before_forward(self, model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
        batch = dict(batch)
        self._part = batch.pop("part")
        if batch.pop("fresh"):
            self.memory.pop(self._part, None)
        device = batch["input_ids"].device
        memory: Any = self.memory.get(self._part)
        if memory is not None:
            memory = tuple(tensor.to(device) for tensor in memory)
        return {**batch, "memory": memory, "shift": False, "return_logits": False}

    def after_forward(self, outputs: Any) -> None:
        if outputs.memory is not None:
            self.memory[self._part] = outputs.memory

    def state_dict(self) -> dict[str, Any]:
        return {
            str(part): [tensor.cpu() for tensor in memory] for part, memory in self.memory.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = {int(part): tuple(memory) for part, memory in state.items()}

    def sample_size(self, stage: Stage) -> int:
        """Words of a segment."""
        return self._segment_length(stage)

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, stage: Stage, samples: int) -> dict[str, float]:
        """Perplexity of the first `samples` validation tokens, read as a few streams."""
        stream = self.corpus.stream("validation")[:samples]
        streams = batch_streams(stream, min(VALIDATION_STREAMS, len(stream) // 2))
        memory, nll, count = None, 0.0, 0
        reports = []
        for start in range(0, streams.shape[1] - 1, self.config.tgt_len):
            words = streams[:, start : start + self.config.tgt_len + 1].to(model.device)
            out = model(
                words[:, :-1],
                labels=words[:, 1:],
                shift=False,
                memory=memory,
                shallow=stage.shallow,
                return_logits=False,
            )
            memory = out.memory
            nll += float(out.nll.double().sum())
            count += out.nll.numel()
            reports.append([t.flatten().cpu() for t in (out.token_steps, out.token_residual)])
        return {
            "perplexity": math.exp(min(nll / count, 700.0)),
            "negative_log_likelihood": nll / count,
            **joined_summary(reports),
        }

    def probe(self, model: PreTrainedModel, stage: Stage, n: int = 1) -> Probe:
        length, config = self._segment_length(stage), self.config
        words = self.streams[:1, :length].to(model.device)
        if words.shape[1] < length:
            words = words.repeat(1, -(-length // words.shape[1]))[:, :length]
        words = words.expand(n, -1)
        memory = (
            torch.zeros(n, config.mem_len, config.d_model, device=model.device),
            torch.zeros(n, config.mem_len, 3 * config.d_model, device=model.device),
        )
        family: Any = model
        f, state = family.equilibrium_map(words, memory)
        forward = partial(
            model, words, labels=words, shift=False, memory=memory, return_logits=False
        )
        return Probe(f, state, forward)

    def describe(self) -> dict[str, Any]:
        return {split: self.corpus.describe(split) for split in ("train", "validation")}

    def save_processor(self, folder: str) -> None:
        style: Any = "ptb" if self.corpus.source.lowercase else "wikitext"
        build_tokenizer(self.corpus.vocabulary, style).save_pretrained(folder)
        if self.record is not None:
            write_record(Path(folder), self.record)


class ResidentText:
    """A text as one tensor of word indices on a device, and the memory of its streams beside it.

    The text is read as a ring, from another place in every epoch: a stream's first word is never
    the same, nor where its segments are cut. The memory has its full length from the first step on
    and says how much of it is filled; forgetting is a factor 0 or 1 of that number.

    Args:
        words: (N,) int64, on the device.
        n_streams: read side by side, rows of the memory.
        config: widths and length of the memory.
        length: words of a segment, by stage.
        forget: share of a stream's segments that begin without memory.
        seed: decides places and forgetting.
    """

    def __init__(
        self,
        words: Tensor,
        n_streams: int,
        config: DEQTransformerConfig,
        length: Callable[[Stage], int],
        forget: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.words, self.n_streams, self.length = words, n_streams, length
        self.forget, self.seed = forget, seed
        size = (n_streams, config.mem_len)
        self.states = torch.zeros(*size, config.d_model, device=words.device)
        self.injections = torch.zeros(*size, 3 * config.d_model, device=words.device)
        self.n_filled = torch.zeros(n_streams, dtype=torch.int64, device=words.device)
        self._streams = self._n_before = self.n_filled

    def epoch(self, number: int, stage: Stage) -> Tensor:
        """For every step and stream its number, its first word, and 1 where it remembers, else 0:
        (steps, n_streams, 3) int64, the same for the same seed and epoch."""
        total, length = len(self.words), self.length(stage)
        stream_length = total // self.n_streams
        steps = max(1, (stream_length - 1) // length)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        streams = torch.arange(self.n_streams).expand(steps, -1)
        start = torch.randint(total, (), generator=generator) + streams * stream_length
        start = (start + length * torch.arange(steps).unsqueeze(1)) % total
        remembers = torch.rand(steps, self.n_streams, generator=generator) >= self.forget
        remembers[0] = False
        return torch.stack([streams, start, remembers.long()], dim=2).to(self.words.device)

    def inputs(self, rows: Tensor, epoch: Tensor, stage: Stage) -> dict[str, Any]:
        """Words and next words (b, T) of some streams, rows (b, 3) of `epoch`, and their memory."""
        streams, start, remembers = rows.unbind(1)
        steps = torch.arange(self.length(stage) + 1, device=rows.device)
        text = self.words[(start.unsqueeze(1) + steps) % len(self.words)]
        inputs: dict[str, Any] = {"input_ids": text[:, :-1], "labels": text[:, 1:]}
        self._streams, self._n_before = streams, self.n_filled[streams] * remembers
        if n_past := self.states.shape[1]:
            place = torch.arange(n_past, device=rows.device)
            inputs["memory"] = (self.states[streams], self.injections[streams])
            inputs["memory_mask"] = place >= (n_past - self._n_before).unsqueeze(1)
        return {**inputs, "shift": False, "return_logits": False}

    @torch.no_grad()
    def keep(self, outputs: Any) -> None:
        """Take over the memory that a step leaves."""
        if outputs.memory is None:
            return
        for states, new_states in zip((self.states, self.injections), outputs.memory, strict=True):
            # What is not finite would stay in the memory for good: no mask hides it.
            new_states = new_states.to(states.dtype).nan_to_num(0.0, 0.0, 0.0)
            states.index_copy_(0, self._streams, new_states)
        n_filled = (self._n_before + outputs.nll.shape[1]).clamp(max=self.states.shape[1])
        self.n_filled.index_copy_(0, self._streams, n_filled)

    def tensors(self) -> list[Tensor]:
        """The memory, for checkpoints."""
        return [self.states, self.injections, self.n_filled]


def _forget_share(augment: dict[str, Any]) -> float:
    unknown = sorted(set(augment) - {"forget"})
    if unknown:
        raise UserError(f"unknown augmentation {unknown[0]!r}; language modelling knows forget")
    share = augment.get("forget", 0.0)
    if not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise UserError(f"augment.forget must be a share of the steps in [0, 1), got {share!r}")
    return float(share)


def stand_in_corpus(source: TextSource) -> Corpus:
    """As many words and tokens as a corpus has; each stream repeats a single word."""
    words = tuple(f"w{i}" for i in range(source.vocabulary_size))
    streams = {
        split: torch.zeros(1, dtype=torch.int32).expand(n) for split, n in source.tokens.items()
    }
    return Corpus(source, words, streams)


def _collate_segments(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch; the loss needs no scores of the whole vocabulary."""
    batch = {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "labels")}
    return {**batch, "return_logits": False}


def finetuning(load: Callable[..., Any], data: str | Path, settings: Settings) -> Job:
    """A language model and a text of one's own for it, see `load_own_text`.

    Raises:
        UserError: there is none, or it holds no word.
    """
    text = load_own_text(data, settings.column)
    training, validation, test = text.divided_in_three(settings.held_out / 2)
    model = load()
    tokenizer = load_tokenizer(model)
    if settings.tokenizer != "keep":
        model, tokenizer = with_words(model, tokenizer, training, settings.tokenizer)
    vocabulary, style = tokenizer.get_vocab(), text_style(tokenizer)

    def segments(lines: list[str]) -> tuple[list[dict[str, Tensor]], int, float]:
        prepared_text = prepare_text("\n".join(lines) + "\n", vocabulary, style)
        if prepared_text.n_words == 0:
            raise UserError(f"{text.name} holds no word to train on or to hold out")
        ids, length = torch.tensor(tokenizer(prepared_text.text)["input_ids"]), model.config.tgt_len
        # Each segment starts with the last word of the one before.
        parts = [ids] if len(ids) <= length else list(ids.unfold(0, length + 1, length))
        samples = [{"input_ids": part, "labels": part} for part in parts]
        return samples, len(ids), prepared_text.unknown_share

    train, n_words, unknown = segments(training)
    note = f"{n_words:,} words to learn, {unknown:.1%} of them unknown to the model"
    if unknown > 0.1 and settings.tokenizer == "keep":
        note += "; --tokenizer extend adds them"
    return Job(
        model=model,
        train=train,
        held_out=segments(validation or test)[0],
        collate=_collate_segments,
        save_processor=tokenizer.save_pretrained,
        record={**text.record(training, validation), "one_hold_out": not validation},
        last_layers=("transformer.embedding", "lm_head"),
        lr=3e-4,
        unit="lines",
        n_test=len(test) if validation else 0,
        accuracy=False,
        notes=[note],
        fingerprints=[text_digest(validation or test)],
    )


@torch.no_grad()
def with_words(model: Any, tokenizer: Any, lines: Sequence[str], how: str) -> tuple[Any, Any]:
    """The model with another vocabulary; words that it knew keep their vectors.

    Args:
        model: a DEQ-Transformer with its head.
        tokenizer: the model's.
        lines: of the text whose words count.
        how: "extend" the vocabulary by words that occur, the frequent ones first, or "build" one
            of the text's words alone, which a model with clusters by frequency cannot take.

    Raises:
        UserError: "build" for a model with clusters.
    """
    old_vocabulary, style = tokenizer.get_vocab(), text_style(tokenizer)
    prepared_text = prepare_text("\n".join(lines), old_vocabulary, style).text
    text_words = count_vocabulary(in_corpus_case(prepared_text, style).split("\n"))
    if how == "build":
        if model.config.cutoffs:
            raise UserError(
                "this model sorts its words into clusters by frequency, which a new vocabulary "
                "does not fit: use --tokenizer extend, or train a new model by a recipe"
            )
        words = [END, UNKNOWN, *(word for word in text_words if word not in (END, UNKNOWN))]
    else:
        words = sorted(old_vocabulary, key=old_vocabulary.__getitem__)
        words += [word for word in text_words if word not in old_vocabulary]
    config = type(model.config)(**{**model.config.to_dict(), "vocab_size": len(words)})
    new_model = DEQTransformerForCausalLM(config)
    source = torch.tensor([old_vocabulary.get(word, -1) for word in words])
    state, target = model.state_dict(), new_model.state_dict()
    size = model.config.vocab_size
    edge = model.config.cutoffs[-1] if model.config.cutoffs else 0
    for name, tensor in target.items():
        old_tensor = state[name]
        if old_tensor.shape == tensor.shape:
            tensor.copy_(old_tensor)
            continue
        # A table of words, whole or of the last cluster.
        first = 0 if old_tensor.shape[0] == size else edge
        rows = source[first:] - first
        tensor.copy_(old_tensor.mean(0, keepdim=True).expand_as(tensor))
        tensor[rows >= 0] = old_tensor[rows[rows >= 0]]
    new_model.load_state_dict(target)
    new_model.config._name_or_path = model.config._name_or_path
    return new_model.eval(), build_tokenizer(words, style)
