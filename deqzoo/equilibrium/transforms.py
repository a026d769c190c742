"""Which transforms of torch.func a call runs under."""

from __future__ import annotations

from torch._C._functorch import TransformType, get_interpreter_stack


def transformed() -> bool:
    """Whether there is any: tensors then have no memory of their own to look at."""
    return bool(get_interpreter_stack())


def batched() -> bool:
    """Whether one of them is vmap: nothing can depend on values then."""
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())
