"""Which transforms of torch.func and modes of differentiation a call runs under."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a call runs under a transform: its tensors have no memory of their own then."""
    return bool(get_interpreter_stack())


def under_grad() -> bool:
    """Whether a transform is grad, vjp or jacrev, which support no saved-tensor hooks."""
    return any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ())


def batched(value: Any = None) -> bool:
    """Whether a transform is vmap, or `value` the cotangents of a batch of backward passes
    (`is_grads_batched`): nothing can depend on values then."""
    if isinstance(value, Tensor) and not torch.compiler.is_compiling():
        if is_legacy_batchedtensor(value):
            return True
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


def forward_mode() -> bool:
    """Whether tensors may carry tangents, which `torch.no_grad` does not take from them."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether a forward-mode derivative is being taken of a tensor."""
    return forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


@contextlib.contextmanager
def no_derivatives() -> Iterator[None]:
    """No derivative of what happens inside, in backward or in forward mode."""
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        yield
