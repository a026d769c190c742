"""Exact cache of solved tokens.

The equilibrium of a token depends on the tokens before it only, so a solved token never changes.
What later tokens read of it are one key and one value per head; these are stored once, from the
final state, and used unchanged by every later solve.
"""

import weakref
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from deqzoo.errors import UserError
from deqzoo.models.deq_transformer.block import EquilibriumMap

#: Newest tokens that a cache can forget: more than a draft of assisted decoding has.
CROPPABLE = 128


class EquilibriumCacheLayer(CacheLayerMixin):
    """Keys and values (B, H, M, D) of the last ``window`` - 1 solved tokens.

    Buffers grow in steps and are written in place; nothing in them is differentiated. They go on
    holding `CROPPABLE` tokens that no later one sees, so that the newest ones can be taken back.
    """

    is_croppable = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.n_tokens = 0
        self._valid: Tensor | None = None  # of all tokens in the buffers; None: all real
        self._buffers: tuple[Tensor, ...] | None = None
        self._start = self._end = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append solved tokens (B, H, T, D), evict those out of the window, return the others."""
        self.lazy_initialization(key_states, value_states)
        n_kept = min(self.window - 1, self._end - self._start + key_states.shape[2])
        self.n_tokens += key_states.shape[2]
        n_new = key_states.shape[2]
        if self._buffers is None or self._end + n_new > self._buffers[0].shape[2]:
            self._grow(key_states, n_new)
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._end : self._end + n_new] = states
        self._end += n_new
        self._start = self._end - n_kept
        self.keys, self.values = (b[:, :, self._start : self._end] for b in self._buffers)
        return self.keys, self.values

    @property
    def valid(self) -> Tensor | None:
        """(B, M) bool, False at left padding; None: all real."""
        return None if self._valid is None else self._valid[:, self._start : self._end]

    def _grow(self, like: Tensor, n_new: int) -> None:
        """Move kept tokens to the front of buffers with room for at least ``n_new`` more tokens."""
        n_kept = min(self._end - self._start + CROPPABLE, self._end)
        offset = self._end - n_kept
        batch, heads, _, width = like.shape
        room = min(max(64, 2 * (n_kept + n_new)), n_kept + n_new + max(64, self.window))
        with torch.inference_mode(False):  # to be written to in any mode from now on
            buffers = tuple(like.new_empty(batch, heads, room, width) for _ in range(2))
        if self._buffers is not None:
            for fresh, old in zip(buffers, self._buffers, strict=True):
                fresh[:, :, :n_kept] = old[:, :, offset : self._end]
        if self._valid is not None:
            self._valid = self._valid[:, offset:]
        self._buffers, self._start, self._end = buffers, self._start - offset, n_kept

    def extend_valid(self, valid: Tensor | None, n_new: int, batch: int) -> None:
        """Remember which of the tokens just appended are real."""
        if valid is None and self._valid is None:
            return
        assert self.keys is not None
        device = self.keys.device
        before = self._valid
        if before is None:
            before = torch.ones(batch, self._end - n_new, dtype=torch.bool, device=device)
        if valid is None:
            valid = torch.ones(batch, n_new, dtype=torch.bool, device=device)
        self._valid = torch.cat([before, valid.to(device)], dim=1)

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens, exactly as if they had never come.

        Args:
            tokens: minus the number of tokens to forget; a positive number is that of tokens to
                remain, as transformers before 5.24 means it.

        Raises:
            UserError: tokens that would be in the window again have been evicted.
        """
        n_removed = -tokens if tokens <= 0 else max(0, self.n_tokens - tokens)
        if n_removed == 0 or self._buffers is None:
            return
        if n_removed >= self.n_tokens:
            self.reset()
            return
        end, n_kept = self._end - n_removed, min(self.window - 1, self.n_tokens - n_removed)
        if end < n_kept:
            raise UserError(
                f"this cache can take back its last {CROPPABLE} tokens, not {n_removed}: the older "
                "ones that they pushed out of the window are gone; make a new cache"
            )
        self.n_tokens -= n_removed
        self._start, self._end = end - n_kept, end
        self.keys, self.values = (b[:, :, self._start : end] for b in self._buffers)
        if self._valid is not None:
            self._valid = self._valid[:, :end]

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: generate() cuts the prompt by it."""
        return self.n_tokens

    def get_max_length(self) -> int:
        """No limit: old tokens are evicted."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys visible to a query of this length, and the offset of the first of them."""
        n_kept = self._end - self._start
        return n_kept + query_length, max(self.n_tokens - n_kept, 0)

    def reset(self) -> None:
        """Forget every token."""
        self.n_tokens = self._start = self._end = 0
        self._buffers = self.keys = self.values = self._valid = None
        self.is_initialized = False

    def _take(self, rows: Tensor) -> None:
        if self._buffers is not None:
            with torch.inference_mode(False):
                buffers = tuple(b.index_select(0, rows.to(b.device)) for b in self._buffers)
            self.keys, self.values = (b[:, :, self._start : self._end] for b in buffers)
            self._buffers = buffers
        if self._valid is not None:
            self._valid = self._valid.index_select(0, rows.to(self._valid.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue the beams ``beam_idx`` (B,)."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self._buffers is not None:
            batch = self._buffers[0].shape[0]
            rows = torch.arange(batch, device=self._buffers[0].device)
            self._take(rows.repeat_interleave(repeats))


class DEQTransformerCache(Cache):
    """Cache of one DEQ-Transformer: solved tokens, and what a model computes once per generation.

    Args:
        window: distances the attention sees; ``window`` - 1 past tokens are kept.
    """

    def __init__(self, window: int) -> None:
        super().__init__(layers=[EquilibriumCacheLayer(window)])
        self.bound: Any = None  # effective weights and position keys of the model that fills it
        self.bound_versions: Any = None  # of the weights that these were computed from
        self.owner: weakref.ref[Any] | None = None  # the model whose tokens it holds
        self.last_state: Tensor | None = None  # (B, 1, d) of the newest token, for warm starts

    @property
    def layer(self) -> EquilibriumCacheLayer:
        """The only layer: the model has one block."""
        layer: Any = self.layers[0]
        return layer

    def belong_to(self, model: Any) -> None:
        """Take a model's tokens from now on.

        Raises:
            UserError: it holds those of another model, whose keys and values are not this one's.
        """
        owner = None if self.owner is None else self.owner()
        if owner is not None and owner is not model and self.layer.n_tokens:
            pairs = zip_longest(owner.layers.parameters(), model.layers.parameters())
            if not all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs):
                raise UserError("this cache holds the tokens of another model; make a new one")
        if owner is not model:
            self.owner = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, which know no model."""
        return {**self.__dict__, "owner": None}

    @torch.no_grad()
    def remember(self, f: EquilibriumMap, states: Tensor, valid: Tensor | None) -> None:
        """Append the tokens of a map, solved to ``states`` (B, T, d); ``valid`` (B, T) or None."""
        ((key, value),) = f.append_to_past(states)
        self.update(key, value, 0)
        self.layer.extend_valid(valid, states.shape[1], states.shape[0])
        self.last_state = states[:, -1:].detach()

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens; see `EquilibriumCacheLayer.crop`."""
        super().crop(tokens)
        self.last_state = None

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.bound = self.last_state = None

    def _take_last(self, rows: Tensor) -> None:
        if self.last_state is not None:
            self.last_state = self.last_state.index_select(0, rows.to(self.last_state.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue the beams ``beam_idx`` (B,)."""
        super().reorder_cache(beam_idx.long())  # type: ignore[arg-type]
        self._take_last(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self._take_last(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.last_state is not None:
            self.last_state = self.last_state.repeat_interleave(repeats, dim=0)
