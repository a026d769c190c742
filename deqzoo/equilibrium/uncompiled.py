"""Functions that torch.compile leaves alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `torch.compiler.disable`, without its import of the compiler, which takes seconds."""
    disabled_function: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled_function
        if "torch._dynamo" not in sys.modules:  # nothing has been compiled
            return function(*args, **kwargs)
        if disabled_function is None:
            disabled_function = torch.compiler.disable(function)
        return disabled_function(*args, **kwargs)

    return call
