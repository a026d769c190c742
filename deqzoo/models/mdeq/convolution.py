"""Convolutions of the map: PyTorch's, or windows and a matrix product where a CPU is faster so.

AMX multiplies tiles of sixteen rows, and oneDNN's convolutions fill one with pixels of one row of a
picture: of pictures four pixels wide a quarter of it. A product of all windows of the batch, one
below the other, with the kernel as a matrix fills it: gradients of weights take a fifth of oneDNN's
time there, the others a third to four fifths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deqzoo.equilibrium.transforms import transformed
from deqzoo.models.coarse import has_amx

_WIDEST = 4
"""Width and height of the results; from 8 on oneDNN is as fast."""
_MANY = 256
"""Channels that a product has to give for the copies of its windows to pay."""
_AT_ONCE = 1 << 23
"""Numbers in the windows that are laid out at once, few enough for caches and new memory."""


def same_conv2d(x: Tensor, weight: Tensor, stride: int = 1, once: bool = False) -> Tensor:
    """Convolution (B, C, H, W) with (out, C, k, k), k odd, 'same' padding; autocast acts as usual.

    Args:
        once: the result is differentiated at most once.
    """
    if (once or not torch.is_grad_enabled()) and _takes_products(x, weight, stride):
        x = x.to(weight.dtype)
        tap = _WeightTap.apply(weight, x.detach(), stride)
        return _Products.apply(x, weight.detach(), tap, stride)
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def _takes_products(x: Tensor, weight: Tensor, stride: int) -> bool:
    if weight.dtype != torch.bfloat16 or x.device.type != "cpu" or weight.shape[-1] != 3:
        return False
    # Under autocast, where weights have been cast before, a state comes in float32.
    if x.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
        return False
    if -(-max(x.shape[2:]) // stride) > _WIDEST or max(weight.shape[:2]) < _MANY:
        return False
    return has_amx() and not (torch.compiler.is_compiling() or transformed())


class _WeightTap(torch.autograd.Function):
    """A zero to add to a convolution's result, whose backward is the gradient of the weights.

    Apart from the gradient of x, because a custom function cannot know which of its gradients are
    needed: products with the state's Jacobian alone would compute both.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(weight, x)
        ctx.stride = stride
        height, width = (-(-n // stride) for n in x.shape[2:])
        return x.new_zeros(1).expand(x.shape[0], weight.shape[0], height, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        return _weight_gradient(dy, x, weight, ctx.stride), None, None


class _Products(torch.autograd.Function):
    """The convolution, and its gradient in x; each by windows where that is faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tap: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        out, channels = weight.shape[:2]
        if stride == 1 and out >= _MANY and channels >= _MANY // 2:
            return _product(x, _as_matrix(weight).T)
        return F.conv2d(x, weight, stride=stride, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = _state_gradient(dy, x, weight, ctx.stride) if ctx.needs_input_grad[0] else None
        return dx, None, dy, None


def _state_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    out, channels = weight.shape[:2]
    if stride > 1 or channels < _MANY:
        dx, _, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1,
            [True, False, False],
        )  # fmt: skip
        return dx
    if out <= channels:  # the convolution of dy with the kernel turned around
        turned_weight = weight.permute(2, 3, 0, 1).flip(0, 1)
        return _product(dy, turned_weight.reshape(-1, channels))
    batch, _, height, width = x.shape
    rows = dy.permute(0, 2, 3, 1).reshape(-1, out)
    shares = (rows @ _as_matrix(weight)).view(batch, height, width, 3, 3, channels)
    dx = shares.new_zeros(batch, height + 2, width + 2, channels, dtype=torch.float32)
    for i in range(3):
        for j in range(3):
            dx[:, i : i + height, j : j + width] += shares[:, :, :, i, j]
    return dx[:, 1:-1, 1:-1].to(x.dtype).permute(0, 3, 1, 2)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Windows of x (B, C, H, W), part of the batch after part, times a matrix (9 C, out)."""
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, height, width, matrix.shape[1])
    at_once = _pictures(9 * channels * height * width)
    for part, out in zip(x.split(at_once), y.split(at_once), strict=True):
        torch.mm(_windows(part), matrix, out=out.view(-1, matrix.shape[1]))
    return y.permute(0, 3, 1, 2)


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """(out, C, 3, 3) in the dtype of the weight; parts of the batch are added in float32."""
    out, channels = weight.shape[:2]
    at_once = _pictures(9 * channels * dy[0, 0].numel())
    total: Tensor | None = None
    for part, cotangent in zip(x.split(at_once), dy.split(at_once), strict=True):
        rows = cotangent.permute(0, 2, 3, 1).reshape(-1, out)
        product = rows.T @ _windows(part, stride)
        total = product if total is None else total.float().add_(product)
    assert total is not None
    return total.to(weight.dtype).view(out, 3, 3, channels).permute(0, 3, 1, 2)


def _as_matrix(weight: Tensor) -> Tensor:
    """(out, C, 3, 3) -> (out, 9 C); a view of channels-last weights."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _windows(x: Tensor, stride: int = 1) -> Tensor:
    """Windows of 3 x 3 pixels around every stride-th one: (B, C, H, W) -> (B H' W', 9 C)."""
    padded_x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    batch, height, width, channels = padded_x.shape
    row, down, across, _ = padded_x.stride()
    shape = (batch, (height - 3) // stride + 1, (width - 3) // stride + 1, 3, 3, channels)
    strides = (row, down * stride, across * stride, down, across, 1)
    return padded_x.as_strided(shape, strides).reshape(-1, 9 * channels)


def _pictures(numbers: int) -> int:
    """How many pictures are laid out at once, whose windows have so many numbers each."""
    return max(1, _AT_ONCE // numbers)
