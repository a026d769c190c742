"""The tokens of a forward: checks, which are real, their targets, and the past."""

from typing import Any

import torch
from torch import Tensor

from deqzoo.errors import UserError
from deqzoo.models.base import require_dense
from deqzoo.models.deq_transformer.adaptive import IGNORED
from deqzoo.models.deq_transformer.cache_deq_transformer import DEQTransformerCache
from deqzoo.models.deq_transformer.configuration_deq_transformer import DEQTransformerConfig


def targets_of(labels: Tensor, shift: bool, attention_mask: Tensor | None) -> Tensor:
    """Next words (B, T), -100 where nothing follows.

    Nothing is scored where the token or its next word is padding.
    """
    padding = None
    if attention_mask is not None:
        padding = _columns(attention_mask, labels) == 0
    if shift:
        if padding is not None:
            labels = labels.masked_fill(padding, IGNORED)
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels if padding is None else labels.masked_fill(padding, IGNORED)


def check_tokens(config: DEQTransformerConfig, input_ids: Tensor, training: bool) -> None:
    """Refuse what is no batch of this model's words.

    The indices themselves are read in training on the CPU only: elsewhere every step would wait
    for the device. A program for export cannot look at them.

    Raises:
        UserError: not (batch, tokens), no tokens, or an index outside the vocabulary.
    """
    require_dense(input_ids=input_ids)
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise UserError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, tokens) with at least "
            "one token (an empty text has none)."
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"input_ids must be whole numbers, int64 or int32, got {input_ids.dtype}; convert "
            "by .long()"
        )
    if training and input_ids.device.type != "cpu" or torch.compiler.is_exporting():
        return
    advice = "use the tokenizer that belongs to the model"
    _refuse_foreign(config, "input_ids", input_ids, advice)


def read_tokens(
    config: DEQTransformerConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    training: bool,
) -> Tensor:
    """A tensor (B, T) in place of the tokens: word indices, or the first feature of each vector.

    Raises:
        UserError: neither or both are given, or they do not fit the model.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise UserError("pass either input_ids or inputs_embeds")
    if input_ids is not None:
        check_tokens(config, input_ids, training)
        return input_ids
    require_dense(inputs_embeds=inputs_embeds)
    assert inputs_embeds is not None
    shape = inputs_embeds.shape
    if inputs_embeds.ndim != 3 or shape[-1] != config.d_model or inputs_embeds.numel() == 0:
        raise UserError(
            f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; expected (batch, tokens, "
            f"{config.d_model}) with at least one token, as get_input_embeddings() makes them"
        )
    return inputs_embeds[..., 0]


def check_positions(position_ids: Tensor | None, valid: Tensor | None) -> None:
    """Refuse positions that are not consecutive: attention goes by distances between tokens.

    Raises:
        UserError: another order.
    """
    if position_ids is None:
        return
    if not isinstance(position_ids, Tensor):
        raise UserError(f"position_ids must be a tensor, got {type(position_ids).__name__}")
    steps = position_ids.diff(dim=-1) != 1
    if valid is not None:
        steps = steps & valid[..., 1:] & valid[..., :-1]
    if bool(steps.any()):
        raise UserError(
            "position_ids must be consecutive: this model sees distances between tokens, not "
            "positions; leave them out"
        )


def check_labels(
    config: DEQTransformerConfig, labels: Tensor, input_ids: Tensor, training: bool
) -> None:
    """Refuse labels that are not one word, or -100, per token.

    As with `check_tokens`, the labels themselves are read in training on the CPU only.

    Raises:
        UserError: another shape than that of input_ids (B, T), or a label outside the vocabulary.
    """
    require_dense(labels=labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"labels must be whole numbers, int64 or int32, got {labels.dtype}; convert by .long()"
        )
    if labels.shape != input_ids.shape:
        raise UserError(
            f"labels has shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; pass one "
            "label per token: the tokens themselves, or with shift=False the words after them."
        )
    if training and labels.device.type != "cpu":
        return
    advice = f"use {IGNORED} where nothing is to be scored"
    _refuse_foreign(config, "labels", labels[labels != IGNORED], advice)


def _refuse_foreign(config: DEQTransformerConfig, name: str, words: Tensor, advice: str) -> None:
    """Refuse indices outside the vocabulary.

    Raises:
        UserError: there are some.
    """
    foreign_words = words[(words < 0) | (words >= config.vocab_size)]
    if foreign_words.numel():
        raise UserError(
            f"{name} holds {foreign_words[0]}, but this model's words are numbered from 0 to "
            f"{config.vocab_size - 1}; {advice}."
        )


def _columns(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    """The last columns of a mask, one for each token (B, T).

    Raises:
        UserError: it has fewer, or is no such mask.
    """
    require_dense(attention_mask=attention_mask)
    columns = attention_mask[:, -tokens.shape[1] :] if attention_mask.ndim == 2 else attention_mask
    if columns.shape != tokens.shape:
        raise UserError(
            f"attention_mask {tuple(attention_mask.shape)} does not cover input_ids "
            f"{tuple(tokens.shape)}."
        )
    return columns


def valid_tokens(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """(B, T) bool, or None when every token is real."""
    if attention_mask is None:
        return None
    valid = _columns(attention_mask, input_ids).bool()
    return None if bool(valid.all()) else valid


def leading_padding_last(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, T) int64 that move every text to the front, and ``valid`` (B, T) in that order.

    Padding between real tokens stays there: it counts in their distances.
    """
    n = valid.shape[1]
    first = valid.int().argmax(1, keepdim=True)
    order = (torch.arange(n, device=valid.device) + first) % n
    return order, valid.gather(1, order)


def reordered(tensor: Tensor, order: Tensor) -> Tensor:
    """A tensor (B, T, ...) with the positions of every row in another order (B, T)."""
    index = order.reshape(*order.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand_as(tensor))


def check_past(
    config: DEQTransformerConfig,
    tokens: Tensor,
    cache: Any,
    memory: Any,
    use_cache: bool | None,
    memory_mask: Tensor | None = None,
) -> None:
    """Refuse a past that this model cannot read, or two at once.

    Raises:
        UserError: another model's cache or one for another window, a cache without an
            equilibrium, cache and memory, another number of texts than ``tokens`` (B, T) has, or a
            mask that is not that of the memory.
    """
    if memory is not None:
        pair = tuple(memory) if isinstance(memory, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(t, Tensor) and t.ndim == 3 for t in pair):
            raise UserError(
                "memory must be the pair of states and injections of a forward's output"
            )
        if pair[0].shape[:2] != pair[1].shape[:2]:
            raise UserError(
                f"memory has states {tuple(pair[0].shape)} and injections {tuple(pair[1].shape)}; "
                "pass both of one output"
            )
    if memory_mask is not None:
        memory_shape = None if memory is None else tuple(memory[0].shape[:2])
        if tuple(memory_mask.shape) != memory_shape:
            raise UserError(
                f"memory_mask has shape {tuple(memory_mask.shape)}, the memory "
                f"{'is missing' if memory_shape is None else f'holds {memory_shape} tokens'}; "
                "pass one flag per token of the memory."
            )
    if cache is not None and not isinstance(cache, DEQTransformerCache):
        raise UserError(
            f"cache must be a DEQTransformerCache, which holds solved words, got "
            f"{type(cache).__name__}. Ready-made keys and values (PEFT's prefix tuning) have no "
            "place in it; soft prompts (PromptTuningConfig, PromptEncoderConfig) do."
        )
    if cache is not None and cache.layer.window != config.window:
        raise UserError(
            f"the cache keeps tokens for a window of {cache.layer.window}, this model sees "
            f"{config.window}; make a DEQTransformerCache({config.window})."
        )
    if (cache is not None or use_cache) and not config.has_equilibrium:
        raise UserError(
            f"{config.variant} with norm_placement={config.norm_placement!r} has no "
            "equilibrium to cache; call it with use_cache=False."
        )
    if (cache is not None or use_cache) and memory is not None:
        raise UserError("Give either cache (or use_cache) or memory, not both.")
    past = memory[0] if memory is not None else None if cache is None else cache.layer.keys
    if past is not None and past.shape[0] != tokens.shape[0]:
        raise UserError(
            f"the cache or memory holds {past.shape[0]} texts, input_ids {tokens.shape[0]}; pass "
            "the past of the same texts (batch_repeat_interleave(n) repeats those of a cache)"
        )


def past_length(cache: DEQTransformerCache | None, memory: Any) -> int:
    """Past tokens a forward can see."""
    if memory is not None:
        return memory[0].shape[1]
    if cache is None or cache.layer.keys is None:
        return 0
    return cache.layer.keys.shape[2]


def joined_validity(
    past: Tensor | None, new: Tensor | None, batch: int, n_past: int, n_new: int
) -> Tensor | None:
    """Validity (B, K) of past and new keys, None when all are real."""
    like = past if past is not None else new
    if like is None:
        return None
    if past is None:
        past = torch.ones(batch, n_past, dtype=torch.bool, device=like.device)
    if new is None:
        new = torch.ones(batch, n_new, dtype=torch.bool, device=like.device)
    return torch.cat([past, new], dim=1)
