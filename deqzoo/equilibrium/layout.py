"""What one independent sample of a state is.

A solver treats the state as a matrix (R, D) of rows and keeps its books (residual, status, mixing
weights) per *cell*. A layout says how rows form cells:

- `Rows`: every row is a sample of its own (images, feature vectors);
- `Segments`: the rows of one graph are one sample, mini-batches of graphs lie one after another;
- `Causal`: every position of a sequence is a cell that may depend on the positions before it only.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deqzoo.equilibrium.state import State, StatePacker
from deqzoo.equilibrium.transforms import transformed

LEAD = 10.0
"""A position whose residual is this many times those before it does not wait for them."""


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
    """Kept positions `[start:stop]` of some sequences; `dropped` are the states before them."""

    start: int
    rows: Tensor
    cell_index: Tensor
    dropped: Tensor  # (b, start, d)
    sequences: Tensor | None = None  # (b,) int64, kept sequences; None keeps every one
    stop: int | None = None

    def state(self, tensor: Tensor) -> Tensor:
        if self.sequences is not None:
            tensor = tensor.index_select(0, self.sequences)
        # All positions: the tensor may have no dimension for them.
        if not self.start and self.stop is None:
            return tensor
        return tensor[:, self.start : self.stop]

    def cells(self, tensor: Tensor) -> Tensor:
        return self.state(tensor)


class Layout(Protocol):
    """How rows form cells; see the module's docstring. All tensors below are flat in the cells."""

    holds_frozen: bool
    """Whether other cells read a frozen cell, so that its state must stay where it stopped."""

    def to_matrix(self, state: State) -> Tensor: ...
    def to_state(self, matrix: Tensor) -> State: ...
    def cell_shape(self) -> tuple[int, ...]: ...
    def is_one_cell(self) -> bool:
        """Whether all rows are one cell: its norms and products are those of the whole matrix."""
        return False

    def total(self, rows: Tensor) -> Tensor:
        """Sum row quantities (R, ...) over each cell: (C, ...); `rows` itself where each is one."""
        ...

    def norm(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Euclidean norms (C,) of the cells, from rows (R, D) whose squares stay in range."""
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
        total = self.total(norm)
        return norm if total is norm else self.total(norm.square()).sqrt()

    def gram(self, rows: Tensor) -> Tensor:
        """Sum row products (R, ...) over what decides a cell's mixing weights: (C, ...)."""
        return self.total(rows)

    def spread(self, cells: Tensor) -> Tensor:
        """Copy cell quantities (C, ...) to the rows of the cell: (R, ...)."""
        ...

    def worst(self, residual: Tensor) -> Tensor:
        """Turn the residuals (C,) of the cells into those that decide about stopping."""
        return residual

    def whole(self, norm: Tensor) -> Tensor:
        """Turn norms (C,) of the cells into those of what the criterion "per sequence" looks at."""
        return norm

    def waiting(self, square: Tensor) -> Tensor:
        """Which cells (C,) have stopped or wait for others that they read.

        `square` (C,) are squared norms of residuals, 0 where a cell has stopped.
        """
        return square <= 0

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        """Return what is left when cells that are not active leave, or None if it is not worth it.

        `matrix` holds the final state of the cells that leave.
        """
        ...

    def adjoint(self) -> Layout:
        """Return the layout for linear solves with the transposed Jacobian."""
        ...


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def is_single(layout: Layout, matrix: Tensor) -> bool:
    """Whether a solve is of one cell on the CPU, whose books can be Python's numbers."""
    return (
        layout.is_one_cell()
        and matrix.device.type == "cpu"
        and matrix.dtype in (torch.float32, torch.float64)
        and matrix.numel() > 0
        and not (transformed() or torch.is_autocast_enabled("cpu"))
    )


def begin(layout: Layout, start: State) -> tuple[Layout, Tensor]:
    """Return a layout of the solve's own and the matrix (R, D) in which it begins.

    The caller's layout may serve other solves before, inside, and at the same time as this one. It
    takes over the shapes of the solve's own, so that callbacks can read matrices with it.

    Raises:
        TypeError: the layout is none.
        ValueError: the state does not fit the layout.
    """
    if isinstance(layout, type) or not hasattr(layout, "to_matrix"):
        raise TypeError(f"a layout is an object such as Rows() or Causal(), got {layout!r}")
    own = copy(layout)
    if isinstance(own, Rows):
        own.forget()
    matrix = own.to_matrix(start)
    vars(layout).update(vars(own))
    return own, matrix


class Rows(Layout):
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

    def is_one_cell(self) -> bool:
        return self._n == 1

    def total(self, rows: Tensor) -> Tensor:
        return rows

    def spread(self, cells: Tensor) -> Tensor:
        return cells

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        index = active.nonzero().squeeze(1)
        if index.numel() > 0.9 * active.numel():
            return None
        layout = Rows()
        layout._packer, layout._n = self._packer, index.numel()
        return layout, IndexSelection(index, index)

    def adjoint(self) -> Layout:
        return Rows()


class Segments(Layout):
    """Graphs in one block-diagonal batch: state (N, d), cells (n,).

    Args:
        index: (N,) int64, the cell of each row, in any order.
        n: number of cells; an empty cell counts as converged.
    """

    holds_frozen = False

    def __init__(self, index: Tensor, n: int) -> None:
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"index must be an int64 tensor (N,), got {_kind(index)}")
        if index.ndim != 1:
            raise ValueError(f"index must have shape (N,), got {tuple(index.shape)}")
        has_values = not (transformed() or torch.compiler.is_compiling())  # programs have no values
        if index.device.type == "cpu" and index.numel() and has_values:
            low, high = (end.item() for end in index.aminmax())
            if low < 0 or high >= n:
                raise ValueError(
                    f"index holds {low if low < 0 else high}, but the cells are 0 to {n - 1}"
                )
        self.index = index
        self.n = n

    def to_matrix(self, state: State) -> Tensor:
        n = self.index.shape[0]
        if not isinstance(state, Tensor) or state.ndim != 2 or state.shape[0] != n:
            raise ValueError(f"a segmented state is one tensor of shape ({n}, d)")
        return state

    def to_state(self, matrix: Tensor) -> State:
        return matrix

    def cell_shape(self) -> tuple[int, ...]:
        return (self.n,)

    def is_one_cell(self) -> bool:
        return self.n == 1

    def total(self, rows: Tensor) -> Tensor:
        if self.n == 1:
            return rows.sum(0, keepdim=True)
        return rows.new_zeros(self.n, *rows.shape[1:]).index_add_(0, self.index, rows)

    def norm(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if self.n == 1:
            return torch.linalg.vector_norm(rows, dtype=dtype).reshape(1)
        return self.total(torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()).sqrt()

    def spread(self, cells: Tensor) -> Tensor:
        if self.n == 1:
            return cells.expand(self.index.shape[0], *cells.shape[1:])
        return cells.index_select(0, self.index)

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        keep_row = self.spread(active)
        rows = keep_row.nonzero().squeeze(1)
        if rows.numel() > 0.9 * keep_row.numel():
            return None
        cell_index = active.nonzero().squeeze(1)
        new_number = torch.cumsum(active, 0) - 1
        layout = Segments(new_number[self.index[rows]], cell_index.numel())
        return layout, IndexSelection(rows, cell_index)

    def adjoint(self) -> Layout:
        return self


class Causal(Layout):
    """Sequences whose map is causal: state (B, T, d), cells (B, T).

    Mixing weights of a position come from Gram matrices summed over the prefix that ends there,
    and a position has converged when it and all before it have: nothing later is ever read.
    Converged positions stay in the sums with what they did before. Evaluations made while the
    prefix still moved then get little weight: they belong to another problem than the one that is
    left to the position.

    Args:
        valid: (B, T) bool, False at padding; padding counts as converged and weighs nothing.
        cuts: positions, in ascending order, at which a solve that compacts is cut into parts.
            Parts are solved one after another, each with the states before it fixed and with
            `max_steps` of its own: fewer rows are evaluated, in more and shorter evaluations.
            Ignored where the map is no `BatchMap`, which alone can keep what precedes a part.
    """

    holds_frozen = True
    whole_sequences = False
    """Whether positions stay until their sequence leaves, since the map reads them in the state."""

    def __init__(self, valid: Tensor | None = None, cuts: Sequence[int] = ()) -> None:
        if list(cuts) != sorted(set(cuts)) or (cuts and cuts[0] < 1):
            raise ValueError(f"cuts must be ascending positions from 1 on, got {tuple(cuts)}")
        if valid is not None and (not isinstance(valid, Tensor) or valid.dtype != torch.bool):
            raise TypeError(
                f"valid must be a bool tensor (B, T), got {_kind(valid)}; of an attention mask of "
                "zeros and ones, pass mask.bool()"
            )
        self.valid = valid
        self.cuts = tuple(cuts)
        self._shape: tuple[int, int] = (0, 0)

    def to_matrix(self, state: State) -> Tensor:
        if not isinstance(state, Tensor) or state.ndim != 3:
            raise ValueError("a causal state is one tensor of shape (B, T, d)")
        if self.valid is not None and self.valid.shape != state.shape[:2]:
            raise ValueError(
                f"valid must have the shape {tuple(state.shape[:2])} of the state's sequences and "
                f"positions, got {tuple(self.valid.shape)}"
            )
        self._shape = (state.shape[0], state.shape[1])
        return state.reshape(self._shape[0] * self._shape[1], state.shape[2])

    def to_state(self, matrix: Tensor) -> State:
        return matrix.reshape(*self._shape, matrix.shape[1])

    def cell_shape(self) -> tuple[int, ...]:
        return self._shape

    def is_one_cell(self) -> bool:
        return self._shape == (1, 1) and (self.valid is None or bool(self.valid.all()))

    def total(self, rows: Tensor) -> Tensor:
        if self.valid is None:
            return rows
        mask = self.valid.reshape(-1, *[1] * (rows.ndim - 1))
        return torch.where(mask, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))

    def gram(self, rows: Tensor) -> Tensor:
        return self._by_sequence(self.total(rows)).cumsum(1).flatten(0, 1)

    def spread(self, cells: Tensor) -> Tensor:
        return cells

    def worst(self, residual: Tensor) -> Tensor:
        residual = residual.reshape(self._shape)
        if torch.compiler.is_exporting():  # ONNX has no running maximum
            length = self._shape[1]
            prefix = torch.ones(length, length, dtype=torch.bool, device=residual.device).tril()
            return torch.where(prefix, residual.unsqueeze(1), 0).amax(2).flatten()
        return residual.cummax(1).values.flatten()

    def whole(self, norm: Tensor) -> Tensor:
        norm = self._by_sequence(self.total(norm))
        if not norm.numel():
            return norm.flatten()
        peak = norm.amax(1, keepdim=True)  # squares of states of any scale stay in range
        peak = torch.where(peak > 0, peak, 1)
        whole = (norm / peak).square().sum(1, keepdim=True).sqrt() * peak
        return whole.expand(self._shape).flatten()

    def waiting(self, square: Tensor) -> Tensor:
        square = square.reshape(self._shape)
        before = torch.nn.functional.pad(square.cummax(1).values[:, :-1], (1, 0))
        return (square <= LEAD**2 * before).flatten()

    def _by_sequence(self, rows: Tensor) -> Tensor:
        return rows.reshape(*self._shape, *rows.shape[1:])

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        n, length = self._shape
        # Cutting costs about as much as evaluating sixteen rows.
        enough = max(16, 0.1 * n * length)
        if active.numel() - int(active.sum()) < enough:
            return None
        active_grid = active.reshape(self._shape)
        sequences, positions = active_grid.any(1).nonzero().squeeze(1), active_grid.any(0).nonzero()
        if not len(positions):
            return None
        start, stop = int(positions[0]), int(positions[-1]) + 1  # behind the last one is padding
        if self.whole_sequences:
            start, stop = 0, length
        if n * length - len(sequences) * (stop - start) < enough:
            return None
        return self._keep(start, stop, matrix, sequences if len(sequences) < n else None)

    def _keep(
        self, start: int, stop: int, matrix: Tensor, sequences: Tensor | None
    ) -> tuple[Layout, Selection]:
        selection = self.part(start, stop, self.to_state(matrix), sequences)
        layout = Causal(None if self.valid is None else selection.state(self.valid))
        layout.whole_sequences = self.whole_sequences
        layout._shape = (self._shape[0] if sequences is None else len(sequences), stop - start)
        return layout, selection

    def part(
        self, start: int, stop: int, state: Tensor, sequences: Tensor | None = None
    ) -> SuffixSelection:
        """Positions `[start:stop]` of sequences (b,) of a state (B, T, d) that is final before."""
        n, length = self._shape
        every = torch.arange(n * length, device=state.device).reshape(n, length)
        dropped = state[:, :start]
        if sequences is not None:
            every, dropped = every[sequences], dropped[sequences]
        cell_index = every[:, start:stop].flatten()
        end = None if stop == length else stop
        return SuffixSelection(start, cell_index, cell_index, dropped, sequences, end)

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

    def spread(self, cells: Tensor) -> Tensor:
        return cells.repeat_interleave(self._length, dim=0)

    def select(self, active: Tensor, matrix: Tensor) -> tuple[Layout, Selection] | None:
        return None
