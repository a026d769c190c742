"""Parameters of the injection and of one sub-layer, and the variational dropout masks.

These modules hold parameters and bind them, once per forward, into the plain tensors of
:class:`~deqzoo.models.deq_transformer.block.LayerTensors`; the arithmetic is in ``block.py``.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deqzoo.models.deq_transformer.block import LayerTensors, split_heads
from deqzoo.models.deq_transformer.configuration_deq_transformer import DEQTransformerConfig
from deqzoo.models.weights import WeightNorm, linear_tensors, norm_tensors


class Injection(nn.Linear):
    """Map from an embedded word to what it adds to its query, key and value."""


class NormalizedLinear(WeightNorm, nn.Linear):
    """A linear layer whose weight is direction and gain per output feature."""

    length_name = "gain"
    plain = nn.Linear


def make_linear(in_features: int, out_features: int, *, bias: bool, weight_norm: bool) -> nn.Linear:
    """A linear layer of the block; the model's `_init_weights` fills it."""
    linear = nn.utils.skip_init(
        nn.Linear, in_features, out_features, bias=bias, device=torch.get_default_device()
    )
    return NormalizedLinear.of(linear) if weight_norm else linear


class RelativeAttention(nn.Module):
    """Parameters of relative multi-head attention (Dai et al. 2019)."""

    def __init__(self, d_model: int, n_head: int, *, weight_norm: bool, affine: bool) -> None:
        super().__init__()
        self.qkv = make_linear(d_model, 3 * d_model, bias=False, weight_norm=weight_norm)
        self.relative = make_linear(d_model, d_model, bias=False, weight_norm=weight_norm)
        self.output = make_linear(d_model, d_model, bias=True, weight_norm=weight_norm)
        # Flat, since they are biases and no matrices: optimisers tell the two apart by shape.
        self.n_head = n_head
        self.content_bias = nn.Parameter(torch.empty(d_model))
        self.position_bias = nn.Parameter(torch.empty(d_model))
        self.input_norm = nn.LayerNorm(d_model) if affine else None
        self.output_norm = nn.LayerNorm(d_model) if affine else None

    def forward(self) -> dict[str, Tensor | None]:
        """Its part of `LayerTensors`."""
        qkv, _ = linear_tensors(self.qkv)
        output, output_bias = linear_tensors(self.output)
        return {
            "qkv": qkv,
            "output": output,
            "output_bias": output_bias,
            "content_bias": self.content_bias.view(self.n_head, -1),
            "position_bias": self.position_bias.view(self.n_head, -1),
        }


class FeedForward(nn.Module):
    """Parameters of the position-wise network."""

    def __init__(self, d_model: int, d_inner: int, *, weight_norm: bool, affine: bool) -> None:
        super().__init__()
        self.up = make_linear(d_model, d_inner, bias=True, weight_norm=weight_norm)
        self.down = make_linear(d_inner, d_model, bias=True, weight_norm=weight_norm)
        self.norm = nn.LayerNorm(d_model) if affine else None

    def forward(self) -> dict[str, Tensor | None]:
        """Its part of `LayerTensors`."""
        up, up_bias = linear_tensors(self.up)
        down, down_bias = linear_tensors(self.down)
        return {"up": up, "up_bias": up_bias, "down": down, "down_bias": down_bias}


@dataclass(frozen=True)
class LayerMasks:
    """Dropout masks of one sub-layer, values 0 or 1/(1-p); None where nothing is dropped."""

    attention: Tensor | None = None  # (B, H, T, K)
    output: Tensor | None = None  # (B, 1, d)
    up: Tensor | None = None  # (B, 1, d_inner)
    down: Tensor | None = None  # (B, 1, d)


@dataclass(frozen=True)
class DropoutMasks:
    """All masks of one forward, fixed through its solve, gradient steps and backward solve."""

    words: Tensor | None = None  # (vocab_size,) whole words
    input: Tensor | None = None  # (B, 1, d) scaled embedding
    positions: Tensor | None = None  # (1, 1, d) features or (1, K, 1) distances
    hidden: Tensor | None = None  # (B, T, 1) whole tokens or (B, 1, d) features, before the softmax
    layers: tuple[LayerMasks, ...] = field(default=())


def draw_mask(shape: tuple[int, ...], p: float, like: Tensor) -> Tensor | None:
    """Bernoulli(1-p)/(1-p) mask in the dtype and on the device of ``like``; None for p = 0."""
    if p == 0:
        return None
    keep = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p)
    return keep / (1 - p)


def draw_masks(
    config: DEQTransformerConfig, batch: int, n_tokens: int, n_past: int, like: Tensor
) -> DropoutMasks:
    """Random masks of one training forward; the one before the softmax is drawn there."""
    n_keys, width = n_past + n_tokens, config.d_model
    hidden = config.dropout_rate("hidden")
    # Upstream's variants drop different things: whole distances, or features of all of them.
    position = (1, n_keys, 1) if config.variant == "torchdeq-seq" else (1, 1, width)
    layers = tuple(
        LayerMasks(
            attention=draw_mask((batch, config.n_head, n_tokens, n_keys), config.dropatt, like),
            output=draw_mask((batch, 1, width), hidden, like),
            up=draw_mask((batch, 1, config.d_inner), hidden, like),
            down=draw_mask((batch, 1, width), hidden, like),
        )
        for _ in range(config.n_sublayers)
    )
    return DropoutMasks(
        words=draw_mask((config.vocab_size,), config.dropword, like),
        input=draw_mask((batch, 1, width), config.dropout_rate("input"), like),
        positions=draw_mask(position, config.dropout_rate("position"), like),
        layers=layers,
    )


class SubLayer(nn.Module):
    """One attention and one feed-forward part."""

    def __init__(
        self, d_model: int, n_head: int, d_inner: int, *, weight_norm: bool, affine: bool
    ) -> None:
        super().__init__()
        self.attention = RelativeAttention(d_model, n_head, weight_norm=weight_norm, affine=affine)
        self.feed_forward = FeedForward(d_model, d_inner, weight_norm=weight_norm, affine=affine)

    def position_keys(self, table: Tensor) -> Tensor:
        """Position keys (H, K, D) of a sinusoid table (K, d)."""
        return split_heads(self.attention.relative(table), self.attention.n_head)

    def bind(self, relative: Any, masks: LayerMasks) -> LayerTensors:
        """Effective tensors without a past; ``relative`` (H, K, D) may be filled in later."""
        attention, network = self.attention, self.feed_forward
        norms = [attention.input_norm, attention.output_norm, network.norm]
        affine: Any = tuple(p for n in norms if n is not None for p in norm_tensors(n))
        return LayerTensors(
            **attention(),
            **network(),
            relative=relative,
            past_key=None,
            past_value=None,
            norms=affine or None,
            attention_mask=masks.attention,
            output_mask=masks.output,
            up_mask=masks.up,
            down_mask=masks.down,
        )


def sinusoids(
    n_distances: int, d_model: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Position vectors (K, d): row k for distance K-1-k, all sines first, then all cosines."""
    distance = torch.arange(n_distances - 1, -1, -1.0, dtype=torch.float64, device=device)
    exponent = torch.arange(0, d_model, 2, dtype=torch.float64, device=device) / d_model
    angle = distance.unsqueeze(1) * torch.exp(exponent * -math.log(10000.0))
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
