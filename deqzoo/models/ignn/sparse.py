"""Sparse matrices with fast products on both sides, and graph adjacencies made of them.

Upstream keeps node data in columns; here they lie in rows (node-major), which is what the sparse
kernels are fast at. `Y A` for Y of shape (d, n) becomes `A^T y` for y of shape (n, d).

The backward of a product is another product, with the transposed matrix, and both are kept by rows;
autograd's own sparse backward is several times slower. The entries get gradients where they need
them (edge weights that are learned or explained), one inner product of two rows per entry.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Literal

import torch
from torch import Tensor

from deqzoo.errors import UserError
from deqzoo.models.base import require_dense

Normalization = Literal["augmented", "symmetric", "none"]
NORMALIZATIONS = ("augmented", "symmetric", "none")

_DENSE_EIGENVALUES_UP_TO = 512
_LANCZOS_STEPS = 80


class SparseMatrix:
    """A sparse matrix (n_rows, n_columns) given by its entries, duplicates added up.

    Args:
        index: (2, e) int64, row and column of each entry.
        values: (e,) floating point; its gradient is that of all products.
        shape: number of rows and columns.
    """

    def __init__(self, index: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        if values.requires_grad and torch.is_grad_enabled():
            # The backward pass of torch's coalesce() has no derivative.
            row, column = index.long()
            places, inverse = (row * shape[1] + column).unique(return_inverse=True)
            self.index = torch.stack([places // shape[1], places % shape[1]])
            self.values = values.new_zeros(len(places)).index_add(0, inverse, values)
        else:
            entries = torch.sparse_coo_tensor(
                index, values, shape, check_invariants=False, is_coalesced=False
            ).coalesce()
            self.index, self.values = entries.indices(), entries.values()
        self.shape = shape
        self._columns = self.index[1]
        self._csr: Tensor | None = None
        self._starts: Tensor | None = None
        self._as_bags = False  # products by embedding_bag on every device: entries may be duplicate
        self._symmetric = False  # True once it is known
        self._transposed: SparseMatrix | None = None
        self._origin: weakref.ref[SparseMatrix] | None = None  # of a transpose: no cycle to collect

    @property
    def csr(self) -> Tensor:
        """The matrix in torch's CSR format, built at the first use."""
        if self._csr is None:
            with warnings.catch_warnings():  # torch announces once that CSR support is in beta
                warnings.simplefilter("ignore", UserWarning)
                self._csr = torch.sparse_csr_tensor(
                    self.starts, self._columns, self.values, self.shape, check_invariants=False
                )
        return self._csr

    @property
    def starts(self) -> Tensor:
        """Where the entries of each row begin (n_rows + 1,), built at the first use."""
        if self._starts is None:
            counts = torch.bincount(self.index[0], minlength=self.shape[0])
            self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return self._starts

    @property
    def transposed(self) -> SparseMatrix:
        """The transposed matrix; the same object where the matrix is symmetric and constant."""
        if self._symmetric and not self.values.requires_grad:
            return self
        if self._transposed is None:
            origin = self._origin() if self._origin is not None else None
            if origin is not None:
                return origin
            other = SparseMatrix(self.index.flip(0), self.values, self.shape[::-1])
            self._symmetric = torch.equal(other.index, self.index) and torch.allclose(
                other.values, self.values, rtol=self.rounding, atol=0
            )
            # Entry (i, j) gets another gradient than (j, i), though both are equal.
            if self._symmetric and not self.values.requires_grad:
                return self
            other._origin = weakref.ref(self)
            self._transposed = other
        return self._transposed

    @property
    def is_symmetric(self) -> bool:
        """Whether the matrix equals its transpose, up to the rounding of added duplicates."""
        return self.transposed is self or self._symmetric

    @property
    def rounding(self) -> float:
        """Relative difference that the order of adding up a few duplicates can make."""
        return 4 * torch.finfo(self.values.dtype).eps

    def to(self, like: Tensor) -> SparseMatrix:
        """Return the matrix on the device and in the dtype of a tensor."""
        if self.values.device == like.device and self.values.dtype == like.dtype:
            return self
        return SparseMatrix(self.index.to(like.device), self.values.to(like), self.shape)

    def matmul(self, dense: Tensor) -> Tensor:
        """Return the product with a dense (n_columns, d): (n_rows, d), differentiable in both."""
        if torch.is_grad_enabled() and (dense.requires_grad or self.values.requires_grad):
            return _Product.apply(dense, self.values, self)
        return self.product(dense)

    def entry_products(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products (e,) of the rows that entries connect: left (n_rows, d), right
        (n_columns, d). The gradient of the entries of `self @ right` at the cotangent `left`."""
        products = left.index_select(0, self.index[0]) * right.index_select(0, self.index[1])
        return products.sum(1, dtype=self.values.dtype)

    def product(self, dense: Tensor) -> Tensor:
        """Return this @ dense without recording it.

        Half precision is multiplied in float32: CSR kernels do not exist for it on every device.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.product(dense)
        if dense.dtype in (torch.float16, torch.bfloat16):
            wide = dense.float()
            return self.to(wide).product(wide).to(dense.dtype)
        if dense.device.type == "cpu" or self._as_bags:
            # A bag of weighted rows per row: on CPUs 2.5 times as fast as with CSR. And the call
            # inside of torch.nn.functional's, which takes longer than a small product.
            arguments = (self._columns, self.starts, False, 0, False, self.values, True)
            return torch.embedding_bag(dense, *arguments)[0]
        # Into empty memory: `csr @ dense` fills and copies its result first (a quarter slower).
        result = dense.new_empty(self.shape[0], dense.shape[1])
        return result.addmm_(self.csr, dense, beta=0)

    def product_rows(self, dense: Tensor, first: int, end: int) -> Tensor:
        """Return rows `first` to `end` (exclusive) of this @ dense, without recording them.

        Args:
            dense: (n_columns, d) on the CPU, float32 or float64.
        """
        starts = self.starts[first : end + 1]
        low, high = int(starts[0]), int(starts[-1])
        arguments = (self._columns[low:high], starts - low, False, 0, False, self.values[low:high])
        return torch.embedding_bag(dense, *arguments, True)[0]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, values: Tensor, matrix: SparseMatrix) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(dense if ctx.needs_input_grad[1] else None)
        return matrix.product(dense)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dense,) = ctx.saved_tensors
        needs_dense, needs_values = ctx.needs_input_grad[:2]
        grad_dense = ctx.matrix.transposed.matmul(grad.contiguous()) if needs_dense else None
        grad_values = ctx.matrix.entry_products(grad, dense) if needs_values else None
        return grad_dense, grad_values, None


class Adjacency(SparseMatrix):
    """The adjacency A of one graph or of a block-diagonal batch of graphs: (n, n), non-negative.

    Entry (i, j) carries information from node i to node j. Entries are float32 at least, whatever
    a model's dtype: in bfloat16 degrees would stop at 256, and products are made in float32 anyway.
    """

    def __init__(self, index: Tensor, values: Tensor, n: int) -> None:
        super().__init__(index, values.to(_wide_dtype(values.dtype)), (n, n))
        self._spectral_radius: float | None = None

    @classmethod
    def of_rows(
        cls,
        index: Tensor,
        starts: Tensor,
        values: Tensor,
        n: int,
        transposed: Adjacency | None = None,
        spectral_radius: float | None = None,
    ) -> Adjacency:
        """An adjacency from entries that are sorted by rows already; nothing is checked.

        Args:
            index: (2, e) int64, sorted; an entry may stand twice.
            starts: (n + 1,) int64, where the entries of each row begin.
            values: (e,) float32 at least, constant.
            n: number of nodes.
            transposed: its transpose; None says that it is symmetric.
            spectral_radius: where it is known.
        """
        matrix = cls.__new__(cls)
        matrix.index, matrix.values, matrix.shape = index, values, (n, n)
        matrix._columns, matrix._csr, matrix._starts, matrix._as_bags = index[1], None, starts, True
        matrix._symmetric, matrix._transposed, matrix._origin = transposed is None, transposed, None
        matrix._spectral_radius = spectral_radius
        return matrix

    @classmethod
    def from_edges(
        cls,
        edge_index: Tensor,
        n: int,
        edge_weight: Tensor | None = None,
        normalization: Normalization = "augmented",
        dtype: torch.dtype | None = None,
    ) -> Adjacency:
        """Build and normalise the adjacency of a graph or of a batch.

        Args:
            edge_index: (2, e) int64; parallel edges add up.
            n: number of nodes.
            edge_weight: (e,) non-negative; 1 where not given.
            normalization: "augmented" is D^-1/2 (A + I) D^-1/2, "symmetric" the same without
                self loops, "none" leaves A as it is. D holds the row sums on both sides.
            dtype: of the entries, float32 at least; that of `edge_weight` or torch's default where
                not given.

        Raises:
            UserError: indices out of range, wrong shapes, negative or non-finite weights, or an
                unknown normalisation.
        """
        values = _checked_weights(edge_index, n, edge_weight, dtype)
        if normalization not in NORMALIZATIONS:
            raise UserError(
                f"unknown normalization {normalization!r}; choose from {', '.join(NORMALIZATIONS)}"
            )
        return cls(edge_index, values, n).normalized(normalization)

    def normalized(self, normalization: Normalization) -> Adjacency:
        """Return the normalised matrix (see `from_edges`)."""
        if normalization == "none":
            return self
        n = self.shape[0]
        return Adjacency(*normalized_entries(self.index, self.values, n, normalization), n)

    def symmetrized(self) -> Adjacency:
        """Return A + A^T."""
        index = torch.cat([self.index, self.index.flip(0)], dim=1)
        return Adjacency(index, torch.cat([self.values, self.values]), self.shape[0])

    def to(self, like: Tensor) -> Adjacency:
        """Return the adjacency on the device and in the dtype of a tensor, float32 at least."""
        dtype = _wide_dtype(like.dtype)
        if self.values.device == like.device and self.values.dtype == dtype:
            return self
        values = self.values.to(like.device, dtype)
        adjacency = Adjacency(self.index.to(like.device), values, self.shape[0])
        adjacency._spectral_radius = self._spectral_radius
        return adjacency

    def detached(self) -> Adjacency:
        """Return the adjacency as a constant; the same object where it is one."""
        if not self.values.requires_grad:
            return self
        constant = Adjacency(self.index, self.values.detach(), self.shape[0])
        constant._spectral_radius = self._spectral_radius
        return constant

    def propagate(self, nodes: Tensor) -> Tensor:
        """Send node data (n, d) along the edges: A^T nodes (n, d)."""
        return self.transposed.matmul(nodes)

    def select(self, rows: Tensor) -> Adjacency:
        """Return the adjacency of the kept nodes `rows` (r,), ascending: whole graphs of a batch.

        Entries keep their order, so that nothing is sorted or added up again.

        Raises:
            ValueError: an edge connects a kept node to another one.
        """
        n = len(rows)
        new_number = self.index.new_full((self.shape[0],), -1)
        new_number[rows] = torch.arange(n, device=rows.device)
        index = new_number[self.index]
        is_kept = index[0] >= 0
        if not torch.equal(is_kept, index[1] >= 0):
            raise ValueError("the kept nodes are no whole graphs; solve with the Segments layout")
        index, values = index[:, is_kept], self.values[is_kept]
        if self.transposed is not self:
            return Adjacency(index, values, n)
        counts = index[0].bincount(minlength=n)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Adjacency.of_rows(index, starts, values, n)

    @property
    def spectral_radius(self) -> float:
        """Largest eigenvalue modulus of A; measured once and kept.

        Exact up to rounding for few nodes. For larger symmetric matrices that of 80 Lanczos steps,
        from below: 1.5e-4 too small for 200 separate paths, the worst case tried. For larger
        directed graphs an upper bound (Collatz and Wielandt).
        """
        if self._spectral_radius is None:
            with torch.no_grad():
                self._spectral_radius = _spectral_radius(self)
        return self._spectral_radius


def normalized_entries(
    index: Tensor, values: Tensor, n: int, normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """Entries (2, e) and (e,) of the normalised matrix of n nodes; see `Adjacency.from_edges`."""
    if normalization == "none":
        return index, values
    if normalization == "augmented":
        loops = torch.arange(n, device=index.device)
        index = torch.cat([index, torch.stack([loops, loops])], dim=1)
        values = torch.cat([values, values.new_ones(n)])
    degree = values.new_zeros(n).index_add_(0, index[0], values)
    scale = torch.where(degree > 0, degree.rsqrt(), degree.new_zeros(()))
    return index, scale[index[0]] * scale[index[1]] * values


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked_weights(
    edge_index: Tensor, n: int, edge_weight: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise UserError(
            f"edge_index must be int64 of shape (2, edges), got {edge_index.dtype} of shape "
            f"{tuple(edge_index.shape)}"
        )
    n_edges = edge_index.shape[1]
    if n_edges and (int(edge_index.min()) < 0 or int(edge_index.max()) >= n):
        raise UserError(
            f"edge_index names node {int(edge_index.max())} (smallest {int(edge_index.min())}), "
            f"but the graph has the nodes 0 to {n - 1}"
        )
    dtype = None if dtype is None else _wide_dtype(dtype)
    if edge_weight is None:
        dtype = dtype or torch.get_default_dtype()
        return torch.ones(n_edges, dtype=dtype, device=edge_index.device)
    require_dense(edge_weight=edge_weight)
    edge_weight = edge_weight.reshape(-1)
    if len(edge_weight) != n_edges:
        raise UserError(f"edge_weight has {len(edge_weight)} entries for {n_edges} edges")
    if not bool((edge_weight >= 0).all() & edge_weight.isfinite().all()):
        raise UserError("edge_weight must be finite and not negative")
    return edge_weight.to(dtype) if dtype else edge_weight


def _spectral_radius(adjacency: Adjacency) -> float:
    n = adjacency.shape[0]
    if len(adjacency.values) == 0:
        return 0.0
    wide = Adjacency(adjacency.index.cpu(), adjacency.values.detach().cpu().double(), n)
    if n <= _DENSE_EIGENVALUES_UP_TO:
        return float(torch.linalg.eigvals(wide.csr.to_dense()).abs().max())
    return _lanczos(wide) if wide.is_symmetric else _collatz_wielandt(wide)


def _lanczos(matrix: SparseMatrix) -> float:
    """Largest eigenvalue of a symmetric matrix, from below, with full reorthogonalisation."""
    n = matrix.shape[0]
    generator = torch.Generator().manual_seed(0)
    vector = torch.rand(n, 1, dtype=torch.float64, generator=generator) + 0.1
    basis = vector / vector.norm()
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    for _ in range(min(_LANCZOS_STEPS, n)):
        image = matrix.product(basis[:, -1:])
        diagonal.append((basis[:, -1:] * image).sum())
        for _ in range(2):
            image = image - basis @ (basis.T @ image)
        length = image.norm()
        if float(length) < 1e-12:
            break
        off_diagonal.append(length)
        basis = torch.cat([basis, image / length], dim=1)
    off = torch.stack(off_diagonal[: len(diagonal) - 1]) if len(diagonal) > 1 else torch.zeros(0)
    small = torch.diag(torch.stack(diagonal))
    if len(diagonal) > 1:
        small = small + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(small).abs().max())


def _collatz_wielandt(matrix: SparseMatrix, n_iter: int = 500) -> float:
    """Upper bound max_i (A x)_i / x_i for a positive x that approaches the Perron vector."""
    vector = torch.ones(matrix.shape[0], 1, dtype=torch.float64)
    best = float("inf")
    for _ in range(n_iter):
        image = matrix.product(vector)
        best = min(best, float((image / vector).max()))
        vector = vector + image  # of A + I: no oscillation, and x stays positive
        vector = vector / vector.max()
        vector = vector.clamp_min(1e-200)
    return best
