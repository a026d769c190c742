"""Structured states seen as one matrix.

A solver works on a single matrix with one row per independent piece of the state. Models keep
their natural structure: a tensor, or a tuple, list or dict of batch-first tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = Any
"""A tensor, or a (nested) tuple, list or dict of tensors that share their leading dimension."""


def leaves(state: State) -> list[Tensor]:
    """List the tensors of a state, depth first (dicts in insertion order).

    Raises:
        TypeError: something other than a tensor, tuple, list or dict was found.
    """
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, (tuple, list)):
        raise TypeError(
            f"a state is a tensor, tuple, list or dict of tensors, not {type(state).__name__}"
        )
    return [leaf for item in state for leaf in leaves(item)]


def rebuild(like: State, tensors: Iterable[Tensor]) -> State:
    """Arrange tensors in the structure of `like` (the inverse of `leaves`)."""
    return _fill(like, iter(tensors))


def _fill(node: State, source: Iterator[Tensor]) -> State:
    # No inner function: a recursive one refers to itself, and would keep every state ever unpacked
    # until Python's cyclic collector runs.
    if isinstance(node, Tensor):
        return next(source)
    if isinstance(node, dict):
        return {key: _fill(item, source) for key, item in node.items()}
    items = [_fill(item, source) for item in node]
    if isinstance(node, list):
        return items
    return type(node)(*items) if hasattr(node, "_fields") else tuple(items)


@dataclass(frozen=True)
class _LeafShape:
    shape: torch.Size  # without the batch dimension, as the user sees it
    size: int
    channels_last: bool


class StatePacker:
    """Lossless mapping between a batch-first state and a matrix (B, D).

    Each sample's tensors are flattened row-major and laid side by side. Tensors in the
    channels-last memory format are flattened in that order, so that neither direction has to
    transpose them.

    Raises:
        ValueError: the tensors differ in batch size, dtype or device, or one is a scalar.
    """

    def __init__(self, state: State) -> None:
        tensors = leaves(state)
        if not tensors:
            raise ValueError("the state holds no tensor")
        first = tensors[0]
        for tensor in tensors:
            if tensor.ndim == 0 or tensor.shape[0] != first.shape[0]:
                raise ValueError(
                    "every tensor of a state needs the same leading batch dimension, got shapes "
                    f"{[tuple(t.shape) for t in tensors]}"
                )
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(
                    "the tensors of a state must share dtype and device, got "
                    f"{[(t.dtype, str(t.device)) for t in tensors]}"
                )
        if first.is_complex():
            raise ValueError(
                f"a state must be real, got {first.dtype}; solve for real and imaginary parts as "
                "two real tensors (torch.view_as_real)"
            )
        if not first.dtype.is_floating_point:
            raise ValueError(f"a state must be floating point, got {first.dtype}")
        self._structure = rebuild(state, [t.new_empty(0) for t in tensors])
        self._shapes = [
            _LeafShape(t.shape[1:], t.shape[1:].numel(), _is_channels_last(t)) for t in tensors
        ]
        self._sizes = [leaf.size for leaf in self._shapes]
        # A state that is its own matrix passes as it is.
        self._plain = isinstance(state, Tensor) and state.ndim == 2

    def pack(self, state: State) -> Tensor:
        """Return the matrix (B, D) of a state; a view where the state is one tensor.

        Raises:
            ValueError: keys or shapes differ from the packer's state, or the tensors of the state
                differ in batch size.
        """
        if self._plain and isinstance(state, Tensor) and state.ndim == 2:
            if state.shape[1] == self._sizes[0]:
                return state
        tensors = leaves(in_order_of(state, self._structure))
        n = next((t.shape[0] for t in tensors if t.ndim), -1)
        if [tuple(t.shape) for t in tensors] != [(n, *leaf.shape) for leaf in self._shapes]:
            raise ValueError(
                f"expected tensors of shapes {[(-1, *leaf.shape) for leaf in self._shapes]}, got "
                f"{[tuple(t.shape) for t in tensors]}: the map must return a state like its input"
            )
        rows = [
            (t.movedim(1, -1) if leaf.channels_last else t).reshape(t.shape[0], leaf.size)
            for t, leaf in zip(tensors, self._shapes, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def unpack(self, matrix: Tensor) -> State:
        """Return the state whose matrix (b, D) this is; views where possible."""
        if self._plain:
            return matrix
        parts = matrix.split(self._sizes, dim=1) if len(self._sizes) > 1 else (matrix,)
        tensors = []
        for part, leaf in zip(parts, self._shapes, strict=True):
            if leaf.channels_last:
                shape = (*leaf.shape[1:], leaf.shape[0])
                tensors.append(part.reshape(part.shape[0], *shape).movedim(-1, 1))
            else:
                tensors.append(part.reshape(part.shape[0], *leaf.shape))
        return rebuild(self._structure, tensors)


def in_order_of(state: State, like: State) -> State:
    """Sort the entries of dicts as in `like`: a map may build its dict in another order."""
    if isinstance(state, Tensor) or isinstance(like, Tensor):
        return state
    if isinstance(like, dict):
        if not isinstance(state, dict) or state.keys() != like.keys():
            keys = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"expected a state with the keys {sorted(like)}, got {keys}: the map must return "
                "a state like its input"
            )
        return {key: in_order_of(state[key], item) for key, item in like.items()}
    if not isinstance(state, (tuple, list)) or len(state) != len(like):
        return state  # the check of shapes will refuse it
    return [in_order_of(item, other) for item, other in zip(state, like, strict=True)]


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.ndim == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )
