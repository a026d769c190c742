"""What one independent sample of a state is.

A solver treats the state as a matrix (R, D) of rows and keeps its books (residual, status, mixing
weights) per *cell*. A layout says how rows form cells:

- `Rows`: every row is a sample of its own (images, feature vectors);
- `Segments`: the rows of one graph are one sample, mini-batches of graphs lie one after another;
- `Causal`: every position of a sequence is a cell that may depend on the positions before it only.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deqzoo.equilibrium.state import State, StatePacker


class Selection(Protocol):
    """Which part of a batch goes on after converged cells have left it."""

    @property
    def rows(self) -> Tensor:
        """(r,) int64, kept rows of the matrix."""
        ...

    @property
    def cell_index(self) -> Tensor:
        """(c,) int64, kept cells."""
        ...

    def state(self, tensor: Tensor) -> Tensor:
        """Keep the selected part of a tensor whose leading dimensions are the state's."""
        ...

    def cells(self, tensor: Tensor) -> Tensor:
        """Keep the selected part of a tensor with one entry per cell."""
        ...


@dataclass(frozen=True)
class IndexSelection:
    """Kept rows and cells of `Rows` and `Segments`."""

    rows: Tensor
    cell_index: Tensor

    def state(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(0, self.rows)

    def cells(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(0, self.cell_index)


@dataclass(frozen=True)
class SuffixSelection:
    """Kept positions `[start:]` of every sequence; `dropped` are the final states before them."""

    start: int
    rows: Tensor
    cell_index: Tensor
    dropped: Tensor  # (B, start, d)

    def state(self, tensor: Tensor) -> Tensor:
        return tensor[:, self.start :]

    def cells(self, tensor: Tensor) -> Tensor:
        return tensor[:, self.start :]


class Layout(Protocol):
    """How rows form cells; see the module's docstring. All tensors below are flat in the cells."""

    holds_frozen: bool
    """Whether other cells read a frozen cell, so that its state must stay where it stopped."""

    def to_matrix(self, state: State) -> Tensor: ...
    def to_state(self, matrix: Tensor) -> State: ...
    def cell_shape(self) -> tuple[int, ...]: ...
    def total(self, rows: Tensor) -> Tensor:
        """Sum row quantities (R, ...) over each cell: (C, ...)."""
        ...

    def gram(self, rows: Tensor, active: Tensor) -> Tensor:
        """Sum row products (R, ...) over what decides a cell's mixing weights: (C, ...)."""
        ...

    def spread(self, cells: Tensor) -> Tensor:
        """Copy cell quantities (C, ...) to the rows of the cell: (R, ...)."""
        ...

    def worst(self, residual: Tensor) -> Tensor:
        """Turn the residuals (C,) of the cells into those that decide about stopping."""
        ...

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        """Return what is left when cells that are not active leave, or None if it is not worth it.

        `matrix` holds the final state of the cells that leave.
        """
        ...

    def adjoint(self) -> Layout:
        """Return the layout for linear solves with the transposed Jacobian."""
        ...


def begin(layout: Layout, start: State) -> tuple[Layout, Tensor]:
    """Return a layout of the solve's own and the matrix (R, D) in which it begins.

    The caller's layout may serve other solves before, inside, and at the same time as this one. It
    is left as the solve's own is, so that callbacks can read matrices with it.

    Raises:
        ValueError: the state does not fit the layout.
    """
    own = copy(layout)
    if isinstance(own, Rows):
        own.forget()
    matrix = own.to_matrix(start)
    vars(layout).update(vars(own))
    return own, matrix


class Rows:
    """Each sample of the batch on its own: state (B, ...) or a structure of such; cells (B,)."""

    holds_frozen = False

    def __init__(self) -> None:
        self._packer: StatePacker | None = None
        self._n = 0

    def to_matrix(self, state: State) -> Tensor:
        if self._packer is None:
            self._packer = StatePacker(state)
            matrix = self._packer.pack(state)
            self._n = matrix.shape[0]
            return matrix
        return self._packer.pack(state)

    def forget(self) -> None:
        """Serve states of any shape again, as a new object does."""
        self._packer = None

    def to_state(self, matrix: Tensor) -> State:
        assert self._packer is not None
        return self._packer.unpack(matrix)

    def cell_shape(self) -> tuple[int, ...]:
        return (self._n,)

    def total(self, rows: Tensor) -> Tensor:
        return rows

    def gram(self, rows: Tensor, active: Tensor) -> Tensor:
        return rows

    def spread(self, cells: Tensor) -> Tensor:
        return cells

    def worst(self, residual: Tensor) -> Tensor:
        return residual

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        kept = active.nonzero().squeeze(1)
        if kept.numel() > 0.9 * active.numel():
            return None
        layout = Rows()
        layout._packer, layout._n = self._packer, kept.numel()
        return layout, IndexSelection(kept, kept)

    def adjoint(self) -> Layout:
        return Rows()


class Segments:
    """Graphs in one block-diagonal batch: state (N, d), cells (n,).

    Args:
        index: (N,) int64, the cell of each row, in any order.
        n: number of cells; an empty cell counts as converged.
    """

    holds_frozen = False

    def __init__(self, index: Tensor, n: int) -> None:
        if index.ndim != 1:
            raise ValueError(f"index must have shape (N,), got {tuple(index.shape)}")
        self.index = index
        self.n = n

    def to_matrix(self, state: State) -> Tensor:
        if not isinstance(state, Tensor) or state.ndim != 2 or len(state) != len(self.index):
            raise ValueError(f"a segmented state is one tensor of shape ({len(self.index)}, d)")
        return state

    def to_state(self, matrix: Tensor) -> State:
        return matrix

    def cell_shape(self) -> tuple[int, ...]:
        return (self.n,)

    def total(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(self.n, *rows.shape[1:]).index_add_(0, self.index, rows)

    def gram(self, rows: Tensor, active: Tensor) -> Tensor:
        return self.total(rows)

    def spread(self, cells: Tensor) -> Tensor:
        return cells.index_select(0, self.index)

    def worst(self, residual: Tensor) -> Tensor:
        return residual

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        keep_row = self.spread(active)
        rows = keep_row.nonzero().squeeze(1)
        if rows.numel() > 0.9 * keep_row.numel():
            return None
        kept = active.nonzero().squeeze(1)
        new_number = torch.cumsum(active, 0) - 1
        layout = Segments(new_number[self.index[rows]], kept.numel())
        return layout, IndexSelection(rows, kept)

    def adjoint(self) -> Layout:
        return self


class Causal:
    """Sequences whose map is causal: state (B, T, d), cells (B, T).

    Mixing weights of a position come from Gram matrices summed over the prefix that ends there,
    and a position has converged when it and all before it have: nothing later is ever read.

    Args:
        valid: (B, T) bool, False at padding; padding counts as converged and weighs nothing.
    """

    holds_frozen = True

    def __init__(self, valid: Tensor | None = None) -> None:
        self.valid = valid
        self._shape: tuple[int, int] = (0, 0)

    def to_matrix(self, state: State) -> Tensor:
        if not isinstance(state, Tensor) or state.ndim != 3:
            raise ValueError("a causal state is one tensor of shape (B, T, d)")
        self._shape = (state.shape[0], state.shape[1])
        return state.reshape(self._shape[0] * self._shape[1], state.shape[2])

    def to_state(self, matrix: Tensor) -> State:
        return matrix.reshape(*self._shape, matrix.shape[1])

    def cell_shape(self) -> tuple[int, ...]:
        return self._shape

    def total(self, rows: Tensor) -> Tensor:
        if self.valid is None:
            return rows
        mask = self.valid.reshape(-1, *[1] * (rows.ndim - 1))
        return torch.where(mask, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))

    def gram(self, rows: Tensor, active: Tensor) -> Tensor:
        mask = active.reshape(-1, *[1] * (rows.ndim - 1))
        rows = self.total(torch.where(mask, rows, torch.zeros_like(rows)))
        return rows.reshape(*self._shape, *rows.shape[1:]).cumsum(1).flatten(0, 1)

    def spread(self, cells: Tensor) -> Tensor:
        return cells

    def worst(self, residual: Tensor) -> Tensor:
        return residual.reshape(self._shape).cummax(1).values.flatten()

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        n, length = self._shape
        waiting = active.reshape(self._shape).any(0).nonzero()
        start = int(waiting[0]) if len(waiting) else length
        if start < 0.25 * length or start == length:
            return None
        layout = Causal(None if self.valid is None else self.valid[:, start:])
        layout._shape = (n, length - start)
        every = torch.arange(n * length, device=matrix.device).reshape(n, length)
        kept = every[:, start:].flatten()
        return layout, SuffixSelection(start, kept, kept, self.to_state(matrix)[:, :start])

    def adjoint(self) -> Layout:
        """Whole sequences: gradients may flow from later positions to earlier ones."""
        return _Sequences(*self._shape)


class _Sequences(Rows):
    """Rows (B·T, d) of which each sequence of T is one cell; cells (B,)."""

    def __init__(self, n: int, length: int) -> None:
        super().__init__()
        self._n, self._length = n, length

    def to_matrix(self, state: State) -> Tensor:
        return state.reshape(self._n * self._length, state.shape[-1])

    def to_state(self, matrix: Tensor) -> State:
        return matrix  # an adjoint system lives on matrices already

    def total(self, rows: Tensor) -> Tensor:
        return rows.reshape(self._n, self._length, *rows.shape[1:]).sum(1)

    def gram(self, rows: Tensor, active: Tensor) -> Tensor:
        return self.total(rows)

    def spread(self, cells: Tensor) -> Tensor:
        return cells.repeat_interleave(self._length, dim=0)

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        return None
