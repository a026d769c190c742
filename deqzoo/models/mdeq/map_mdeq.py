"""The equilibrium map of a multiscale deep equilibrium model, as a pure function of tensors.

Bai, Koltun and Kolter: Multiscale Deep Equilibrium Models, NeurIPS 2020. The map takes the states
of all resolutions to their next values: a residual block per resolution, a fusion that sums every
resolution into every other, and a convolution after it. Everything that stays constant during one
solve (normalised weights, injections, dropout masks) is an argument, so that it is computed once
per forward and so that the function can be compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deqzoo.equilibrium import BatchMap, DetachableMap, OnceDifferentiableMap, Selection
from deqzoo.equilibrium.maps import PreciseMap
from deqzoo.equilibrium.uncompiled import uncompiled
from deqzoo.models.weights import compiled, in_compute_dtype, map_tensors

from .convolution import same_conv2d
from .native_norm import group_norm, native_group_norm

State = tuple[Tensor, ...]
Masks = tuple[tuple[Tensor, ...], ...]

Norm = Callable[..., Tensor]
"""`group_norm` or another implementation with its signature."""


class ConvNormTensors(NamedTuple):
    """A convolution's weight (out, in, k, k) and its norm's scale and shift (out,)."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None


class BlockTensors(NamedTuple):
    """Effective tensors of one residual block; scale3 and shift3 are of the norm that ends it."""

    first: ConvNormTensors
    second: ConvNormTensors
    scale3: Tensor | None
    shift3: Tensor | None


class MapTensors(NamedTuple):
    """Effective tensors of the map.

    branches[i][b] is block b of resolution i; fuse[i][j] the stages from resolution j to i, empty
    for i == j; post[i] the convolution after the fusion.
    """

    branches: tuple[tuple[BlockTensors, ...], ...]
    fuse: tuple[tuple[tuple[ConvNormTensors, ...], ...], ...]
    post: tuple[ConvNormTensors, ...]


def _conv_norm(
    x: Tensor,
    tensors: ConvNormTensors,
    groups: int,
    norm: Norm,
    stride: int = 1,
    relu_after: bool = False,
) -> Tensor:
    """GroupNorm(conv(x)); 'same' padding of an odd kernel."""
    x = same_conv2d(x, tensors.weight, stride, once=norm is native_group_norm)
    return norm(x, groups, tensors.scale, tensors.shift, relu_after=relu_after)


def _block(
    x: Tensor,
    injection: Tensor | None,
    mask: Tensor | None,
    tensors: BlockTensors,
    groups: int,
    norm: Norm,
) -> Tensor:
    """Residual block; injection before the second norm, rectifier before the third."""
    a = _conv_norm(x, tensors.first, groups, norm, relu_after=True)
    second = tensors.second
    b = same_conv2d(a, second.weight, once=norm is native_group_norm)
    if mask is not None:
        b = b * mask
    if injection is not None:
        b = b + injection
    c = norm(b, groups, second.scale, second.shift) + x
    return norm(c, groups, tensors.scale3, tensors.shift3, relu_before=True)


def _resample(
    x: Tensor,
    stages: tuple[ConvNormTensors, ...],
    source: int,
    target: int,
    groups: int,
    norm: Norm,
) -> Tensor:
    """Bring the output of one resolution to the size and the channels of another one."""
    if source > target:  # the norm is taken at the low resolution
        x = _conv_norm(x, stages[0], groups, norm)
        return F.interpolate(x, scale_factor=2 ** (source - target), mode="nearest")
    for k, stage in enumerate(stages):
        last = k == len(stages) - 1
        x = _conv_norm(x, stage, groups, norm, stride=2, relu_after=not last)
    return x


def mdeq_step(
    state: State,
    injections: tuple[Tensor | None, ...],
    masks: Masks | None,
    tensors: MapTensors,
    num_groups: int,
    norm: Norm = group_norm,
    compute: torch.dtype | None = None,
) -> State:
    """One application of the equilibrium map.

    Args:
        state: one tensor per resolution, finest first, (B, C_i, H_i, W_i), H_i = H_0 / 2^i.
        injections: per resolution a tensor of the state's shape, or None for zero.
        masks: per resolution and block a dropout mask (B, C_i, 1, 1), or None for no dropout.
        tensors: the effective weights.
        num_groups: groups of every norm but the last ones, which have half as many.
        norm: implementation of the group norm.
        compute: dtype of everything inside, that of weights, injections and masks; None for the
            state's own (under autocast: what autocast makes of it).

    Returns:
        The next state, same shapes and dtypes.
    """
    previous_state, outputs = state, []
    if compute is not None:
        state = tuple(z.to(compute) for z in state)
    for i, blocks in enumerate(tensors.branches):
        h = state[i]
        for b, block in enumerate(blocks):
            mask = None if masks is None else masks[i][b]
            h = _block(h, injections[i] if b == 0 else None, mask, block, num_groups, norm)
        outputs.append(h)
    result = []
    low = [in_compute_dtype(h) for h in outputs]  # autocast would cast for each convolution anew
    for i, post in enumerate(tensors.post):
        parts = [
            outputs[i] if i == j else _resample(h, tensors.fuse[i][j], j, i, num_groups, norm)
            for j, h in enumerate(low)
        ]
        y = parts[0]
        for part in parts[1:]:
            y = y + part
        y = _conv_norm(F.relu(in_compute_dtype(y)), post, num_groups // 2, norm)
        # Under autocast a convolution's result has low precision.
        result.append(y.to(previous_state[i].dtype))
    return tuple(result)


@lru_cache(maxsize=1)
def compiled_step() -> Callable[..., State]:
    """`mdeq_step` under torch.compile, see `compiled`."""
    return compiled(mdeq_step)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type == "meta":  # which has none
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclasses.dataclass(frozen=True)
class MDEQMap(BatchMap, OnceDifferentiableMap, PreciseMap):
    """The map z -> F(z) of one batch: effective weights, injections and masks fixed for a solve.

    With a `dtype` everything inside a step is of that precision, whatever autocast would choose;
    see `in_precision`.
    """

    tensors: MapTensors
    injections: tuple[Tensor | None, ...]
    masks: Masks | None
    num_groups: int
    norm: Norm = group_norm
    dtype: torch.dtype | None = None

    def __call__(self, state: State) -> State:
        """Apply the map once to a tuple of (B, C_i, H_i, W_i)."""
        return self.apply(mdeq_step, state)

    def apply(self, step: Callable[..., State], state: State) -> State:
        """Apply `mdeq_step`, compiled or not, with this map's tensors."""
        arguments = (
            tuple(state), self.injections, self.masks, self.tensors, self.num_groups, self.norm,
            self.dtype,
        )  # fmt: skip
        if self.dtype is None:
            return step(*arguments)
        with _no_autocast(state[0].device):
            return step(*arguments)

    @uncompiled
    def in_precision(self, dtype: torch.dtype) -> MDEQMap:
        """The same map computing in one precision: kernels, injections and masks are cast once.

        Gains and biases of the norms stay as they are; so do their statistics. States keep their
        own dtype from step to step.
        """

        def narrow(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.ndim == 4 else tensor

        return dataclasses.replace(
            self,
            tensors=map_tensors(narrow, self.tensors),
            injections=map_tensors(narrow, self.injections),
            masks=map_tensors(narrow, self.masks),
            dtype=dtype,
        )

    @uncompiled
    def channels_last(self, norm: Norm) -> MDEQMap:
        """The same map with its tensors laid out for convolutions on a CPU, and another norm."""

        def laid_out(tensor: Tensor) -> Tensor:
            if tensor.ndim != 4:
                return tensor
            return tensor.contiguous(memory_format=torch.channels_last)

        return dataclasses.replace(
            self,
            tensors=map_tensors(laid_out, self.tensors),
            injections=map_tensors(laid_out, self.injections),
            norm=norm,
        )

    def twice_differentiable(self) -> MDEQMap:
        """The same map with a norm that has a second derivative, as the exact penalty needs."""
        return self.with_norm(group_norm)

    @uncompiled  # which fails at the construction of a frozen dataclass
    def with_norm(self, norm: Norm) -> MDEQMap:
        """The same map with another implementation of the group norm."""
        return dataclasses.replace(self, norm=norm)

    def select(self, selection: Selection) -> MDEQMap:
        """The same map for the rows of the batch that are still being solved."""
        return dataclasses.replace(
            self,
            injections=map_tensors(selection.state, self.injections),
            masks=map_tensors(selection.state, self.masks),
        )


@dataclasses.dataclass(frozen=True)
class CompiledMDEQMap(DetachableMap, OnceDifferentiableMap, PreciseMap):
    """An `MDEQMap` under torch.compile.

    It is no `BatchMap`, since every new batch size would be compiled anew, but has a detached
    twin: a compiled backward is one graph, which would compute weight gradients in every product.
    """

    plain: MDEQMap

    def __call__(self, state: State) -> State:
        """Apply the map once to a tuple of (B, C_i, H_i, W_i)."""
        return self.plain.apply(compiled_step(), state)

    @property
    def dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """Precision inside a step; see `MDEQMap.in_precision`."""
        return self.plain.dtype

    def twice_differentiable(self) -> MDEQMap:
        """The map uncompiled, as the exact Jacobian penalty needs it."""
        return self.plain.twice_differentiable()

    def detached(self) -> CompiledMDEQMap:
        """The same map with nothing tracked but its argument."""
        f = self.plain
        return CompiledMDEQMap(
            dataclasses.replace(
                f,
                tensors=map_tensors(Tensor.detach, f.tensors),
                injections=map_tensors(Tensor.detach, f.injections),
                masks=map_tensors(Tensor.detach, f.masks),
            )
        )
