"""The equilibrium map of the DEQ-Transformer: F(z) for T new tokens beside a frozen past.

Everything that does not change during a solve (weight-normalised weights, injected embeddings,
dropout masks, keys and values of past tokens, relative position keys) is computed once per forward
and held by an :class:`EquilibriumMap`; calling the map is a pure function of tensors.

Shapes: B batch, T new tokens, M past tokens, K = M + T, d width, H heads, D = d / H.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deqzoo.equilibrium import BatchMap, DetachableMap, OnceDifferentiableMap
from deqzoo.equilibrium.layout import IndexSelection, Selection, SuffixSelection
from deqzoo.models.weights import compiled, map_tensors

NORM_EPS = 1e-5
LONG_IN_WINDOWS = 3  # length of a text, in windows, from which attention in blocks is faster
# Fields of LayerTensors with one row per sample.
BATCH_FIRST = (
    "past_key",
    "past_value",
    "attention_mask",
    "output_mask",
    "up_mask",
    "down_mask",
)


class LayerTensors(NamedTuple):
    """Effective weights and dropout masks of one sub-layer (attention + feed-forward)."""

    qkv: Tensor  # (3d, d), rows: all heads of q, then of k, then of v
    output: Tensor  # (d, d)
    output_bias: Tensor  # (d,)
    content_bias: Tensor  # (H, D)
    position_bias: Tensor  # (H, D)
    up: Tensor  # (d_inner, d)
    up_bias: Tensor  # (d_inner,)
    down: Tensor  # (d, d_inner)
    down_bias: Tensor  # (d,)
    relative: Tensor  # (H, K, D), row k for distance K-1-k
    past_key: Tensor | None  # (B, H, M, D)
    past_value: Tensor | None  # (B, H, M, D)
    norms: tuple[Tensor, ...] | None  # weight, bias of the attention, output and feed-forward norms
    attention_mask: Tensor | None  # (B, H, T, K) dropout on attention probabilities
    output_mask: Tensor | None  # (B, 1, d)
    up_mask: Tensor | None  # (B, 1, d_inner)
    down_mask: Tensor | None  # (B, 1, d)


def layer_norm(x: Tensor, norms: tuple[Tensor, ...] | None = None, index: int = 0) -> Tensor:
    """Normalise the last dimension, with the ``index``-th weight and bias of ``norms`` if given."""
    if norms is None:
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return F.layer_norm(x, x.shape[-1:], norms[2 * index], norms[2 * index + 1], NORM_EPS)


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(..., T, d) to (..., H, T, D)."""
    return x.unflatten(-1, (n_head, -1)).transpose(-3, -2)


def relative_shift(scores: Tensor) -> Tensor:
    """Move column T-1-i+j of query row i to column j: (B, H, T, K) by key row to by key.

    Columns beyond the last distance hold garbage; they belong to the future and are always hidden.
    """
    *lead, n_queries, n_keys = scores.shape
    if n_queries == 1:
        return scores
    padded_scores = F.pad(scores, (1, 0)).reshape(*lead, n_keys + 1, n_queries)
    return padded_scores[..., 1:, :].reshape(*lead, n_queries, n_keys)


def attend(qkv: Tensor, layer: LayerTensors, bias: Tensor, window: int | None = None) -> Tensor:
    """Relative attention of T queries over M + T keys; heads concatenated, (B, T, d).

    Products are taken in the dtype of the keys, the softmax in float32 at least. A long text
    without padding and dropout goes by blocks, see ``attend_in_blocks``.
    """
    n_head, d_head = layer.content_bias.shape
    query, key, value = (split_heads(part, n_head) for part in qkv.chunk(3, dim=-1))
    if layer.past_key is not None and layer.past_value is not None:
        key = torch.cat([layer.past_key, key], dim=2)
        value = torch.cat([layer.past_value, value], dim=2)
    scale = d_head**-0.5
    content = (query + layer.content_bias.unsqueeze(1)) * scale
    position = (query + layer.position_bias.unsqueeze(1)) * scale
    plain = layer.attention_mask is None and bias.ndim == 2
    if window is not None and plain and query.shape[2] >= LONG_IN_WINDOWS * window:
        relative = layer.relative[:, 1 - 2 * window :]
        heads = attend_in_blocks(content, position, key, value, relative, bias, window)
        return heads.transpose(1, 2).flatten(2)
    scores = relative_shift(position @ layer.relative.transpose(-1, -2))
    scores = scores + content @ key.transpose(-1, -2) + bias
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide)
    if layer.attention_mask is not None:
        weights = weights * layer.attention_mask
    return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)


def attend_in_blocks(
    content: Tensor,
    position: Tensor,
    key: Tensor,
    value: Tensor,
    relative: Tensor,
    bias: Tensor,
    window: int,
) -> Tensor:
    """Attention over a band, linear in the length: the same sums as over all keys, (B, H, T, D).

    A block of ``window`` queries sees 2 window - 1 keys: those of its own positions and the
    window - 1 before them.

    Args:
        content, position: (B, H, T, D) scaled queries with either bias, T >= 2 window.
        key, value: (B, H, M + T, D).
        relative: (H, 2 window - 1, D) position keys of the nearest distances.
        bias: (T, M + T), whose lower right corner is that of every block.
    """
    length, n_keys = content.shape[2], 2 * window - 1
    rest = -length % window
    # Keys before the first block; a negative number are keys that it does not see.
    n_missing = window - 1 - (key.shape[2] - length)
    content, position = (
        F.pad(part, (0, 0, 0, rest)).unflatten(2, (-1, window)) for part in (content, position)
    )  # (B, H, N, window, D)
    key, value = (
        F.pad(part, (0, 0, n_missing, rest)).unfold(2, n_keys, window) for part in (key, value)
    )  # (B, H, N, D, 2 window - 1)
    by_distance = position.flatten(2, 3) @ relative.transpose(-1, -2)
    scores = relative_shift(by_distance.unflatten(2, (-1, window))) + content @ key
    scores = scores + bias[-window:, -n_keys:]
    if n_missing > 0:
        scores[:, :, 0, :, :n_missing] = float("-inf")
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype)
    return (weights @ value.transpose(-1, -2)).flatten(2, 3)[:, :, :length]


def attention_output(
    z: Tensor, u: Tensor, layer: LayerTensors, bias: Tensor, kind: str, window: int | None = None
) -> Tensor:
    """First half of a sub-layer: z plus attention, normalised for post-LN; (B, T, d)."""
    content = z if kind == "post" else layer_norm(z, layer.norms, 0)
    attention = attend(F.linear(content.to(layer.qkv.dtype), layer.qkv) + u, layer, bias, window)
    if kind == "sandwich":
        attention = layer_norm(attention, layer.norms, 1)
    y = F.linear(attention.to(layer.output.dtype), layer.output, layer.output_bias)
    if layer.output_mask is not None:
        y = y * layer.output_mask
    return layer_norm(z + y) if kind == "post" else z + y


def feed_forward(h: Tensor, layer: LayerTensors) -> Tensor:
    """Two-layer ReLU network, (B, T, d)."""
    inner = F.relu(F.linear(h.to(layer.up.dtype), layer.up, layer.up_bias))
    if layer.up_mask is not None:
        inner = inner * layer.up_mask
    y = F.linear(inner.to(layer.down.dtype), layer.down, layer.down_bias)
    return y if layer.down_mask is None else y * layer.down_mask


def apply_layer(
    z: Tensor, u: Tensor, layer: LayerTensors, bias: Tensor, kind: str, window: int | None = None
) -> Tensor:
    """One sub-layer.

    ``kind``: "post" (norms after each residual), "pre_normalized" (locuslab pre-LN: the
    feed-forward residual is the normalised tensor), "pre" (torchdeq ``seq`` pre-LN: the raw
    one), "sandwich" (torchdeq ``lm``: affine norms before both parts and after attention).
    """
    h = attention_output(z, u, layer, bias, kind, window)
    if kind == "post":
        return layer_norm(h + feed_forward(h, layer))
    normalized_h = layer_norm(h, layer.norms, 2)
    residual = normalized_h if kind == "pre_normalized" else h
    return residual + feed_forward(normalized_h, layer)


def apply_layers(
    z: Tensor,
    u: Tensor,
    layers: tuple[LayerTensors, ...],
    bias: Tensor,
    kind: str,
    window: int | None = None,
) -> Tensor:
    """F(z): all sub-layers in turn, every one with the same injection and visibility."""
    for layer in layers:
        z = apply_layer(z, u, layer, bias, kind, window)
    return z


def context_key_value(
    states: Tensor, injection: Tensor, layer: LayerTensors, kind: str
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, M, D) of solved tokens with states (B, M, d), injection (B, M, 3d)."""
    content = states if kind == "post" else layer_norm(states, layer.norms, 0)
    width = states.shape[-1]
    key_value = F.linear(content.to(layer.qkv.dtype), layer.qkv[width:]) + injection[..., width:]
    n_head = layer.content_bias.shape[0]
    key, value = (split_heads(part, n_head) for part in key_value.chunk(2, dim=-1))
    return key, value


def visibility(
    n_queries: int,
    n_keys: int,
    window: int,
    valid: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Additive score bias: 0 for a real key at a distance in [0, ``window``), else -inf.

    (T, K), or (B, 1, T, K) when ``valid`` (B, K) marks real tokens. Padded queries see
    themselves, so that no softmax is empty.
    """
    query = torch.arange(n_keys - n_queries, n_keys, device=device).unsqueeze(1)
    distance = query - torch.arange(n_keys, device=device)
    visible = (distance >= 0) & (distance < window)
    if valid is not None:
        visible = (visible & valid[:, None, None, :]) | (distance == 0)
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(
        ~visible, float("-inf")
    )


@dataclass(frozen=True)
class EquilibriumMap:
    """F with everything bound but the state: ``map(z)`` for z (B, T, d)."""

    layers: tuple[LayerTensors, ...]
    injection: Tensor  # (B, T, 3d)
    bias: Tensor  # (T, K) or (B, 1, T, K)
    kind: str
    window: int | None = None  # number of distances that the attention sees

    def __call__(self, z: Tensor) -> Tensor:
        return apply_layers(z, self.injection, self.layers, self.bias, self.kind, self.window)

    def in_precision(self, dtype: torch.dtype) -> "EquilibriumMap":
        """The same map with its matrix products in one precision: all operands are cast once.

        The state, the residual connections and layer norms keep the state's dtype, the softmax is
        taken in float32 at least, so that this is the whole policy on every device.
        """
        layers = []
        for layer in self.layers:
            cast: dict[str, Any] = {
                name: value.to(dtype)
                for name, value in zip(layer._fields, layer, strict=True)
                if isinstance(value, Tensor)
            }
            layers.append(layer._replace(**cast))
        injection, bias = self.injection.to(dtype), self.bias.to(dtype)
        return replace(self, layers=tuple(layers), injection=injection, bias=bias)

    def append_to_past(self, states: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values (B, H, T, D) of the map's own tokens once they are solved."""
        return tuple(
            context_key_value(states, self.injection, layer, self.kind) for layer in self.layers
        )


@dataclass(frozen=True)
class SolvableMap(EquilibriumMap, BatchMap):
    """The map of a single block, in which solved prefixes can become the past."""

    def select(self, selection: Selection) -> "SolvableMap":
        """What is left to solve: the last positions of every row, or some rows."""
        if isinstance(selection, SuffixSelection):
            sequences = selection.sequences
            f = self if sequences is None else self._rows(IndexSelection(sequences, sequences))
            return f._suffix(selection.start, selection.stop, selection.dropped)
        return self._rows(selection)

    def reordered(self, order: Tensor, valid: Tensor, window: int) -> "SolvableMap":
        """The map of a text without past whose positions stand in another order (B, T).

        ``valid`` (B, T) is in that order already.
        """
        injection = self.injection.gather(1, order.unsqueeze(2).expand_as(self.injection))
        n = injection.shape[1]
        bias = visibility(n, n, window, valid, dtype=self.bias.dtype, device=self.bias.device)
        return replace(self, injection=injection, bias=bias)

    def _suffix(self, start: int, stop: int | None, solved_states: Tensor) -> "SolvableMap":
        """Positions ``[start:stop]``; the ``solved_states`` (B, start, d) become the past."""
        (layer,) = self.layers
        n_later = 0 if stop is None else self.injection.shape[1] - stop
        n_keys = self.bias.shape[-1] - n_later
        key, value = layer.past_key, layer.past_value
        if start:
            key, value = context_key_value(
                solved_states, self.injection[:, :start], layer, self.kind
            )
            if layer.past_key is not None and layer.past_value is not None:
                key = torch.cat([layer.past_key, key], dim=2)
                value = torch.cat([layer.past_value, value], dim=2)
        mask = layer.attention_mask
        layer = layer._replace(
            past_key=key,
            past_value=value,
            relative=layer.relative[:, n_later:],
            attention_mask=None if mask is None else mask[:, :, start:stop, :n_keys],
        )
        injection, bias = self.injection[:, start:stop], self.bias[..., start:stop, :n_keys]
        return replace(self, layers=(layer,), injection=injection, bias=bias)

    def _rows(self, selection: Selection) -> "SolvableMap":
        """Some rows of the batch."""
        (layer,) = self.layers
        row_tensors: dict[str, Any] = {
            name: selection.state(value)
            for name in BATCH_FIRST
            if (value := getattr(layer, name)) is not None
        }
        bias = selection.state(self.bias) if self.bias.ndim == 4 else self.bias
        injection = selection.state(self.injection)
        return replace(
            self, layers=(layer._replace(**row_tensors),), injection=injection, bias=bias
        )


@lru_cache(maxsize=1)
def _compiled_layers() -> Callable[..., Tensor]:
    """`apply_layers` under torch.compile, see `compiled`."""
    return compiled(apply_layers)


@dataclass(frozen=True)
class CompiledMap(DetachableMap, OnceDifferentiableMap):
    """A map under torch.compile.

    It is no `BatchMap`, since every length would be compiled anew, but has a detached twin: a
    compiled backward is one graph, which would compute weight gradients in every product.
    """

    plain: EquilibriumMap

    def __call__(self, z: Tensor) -> Tensor:
        f = self.plain
        return _compiled_layers()(z, f.injection, f.layers, f.bias, f.kind, f.window)

    def twice_differentiable(self) -> EquilibriumMap:
        """The map uncompiled, as the exact Jacobian penalty needs it."""
        return self.plain

    def detached(self) -> "CompiledMap":
        """The same map with nothing tracked but its argument."""
        f = self.plain
        layers = map_tensors(Tensor.detach, f.layers)
        injection, bias = f.injection.detach(), f.bias.detach()
        return CompiledMap(replace(f, layers=layers, injection=injection, bias=bias))
