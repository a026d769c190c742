"""Maps: what a solver evaluates, on states and on matrices."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deqzoo.equilibrium.layout import Layout, Selection
from deqzoo.equilibrium.state import State, leaves, rebuild

WROTE = (
    "the map wrote into a state that it was given or had returned before; let it return new "
    "tensors (no inplace=True, no out=, no buffer used again)"
)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Grad mode for a measurement that differentiates, wherever it is asked for."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class BatchMap(ABC):
    """A map bound to one batch, which can be cut down to a part of it.

    Any callable can be solved; one of this class also lets converged samples leave the batch. The
    solver asks for the class: a method of these names on a module of another class has no meaning.
    """

    @abstractmethod
    def __call__(self, state: State, *inputs: Any) -> State:
        """Apply the map once."""

    @abstractmethod
    def select(self, selection: Selection) -> BatchMap:
        """Return the map for the part of the batch that is still being solved."""


class DetachableMap(ABC):
    """A map with a twin whose vector-Jacobian products never reach weights and inputs.

    For maps whose backward is one graph, such as compiled ones: it would compute the gradients of
    all weights in every product.
    """

    @abstractmethod
    def __call__(self, state: State) -> State:
        """Apply the map once."""

    @abstractmethod
    def detached(self) -> Callable[[State], State]:
        """Return the same map with nothing tracked but its argument."""


class OnceDifferentiableMap(ABC):
    """A map without a second derivative, such as a compiled one, that has a twin with it."""

    @abstractmethod
    def __call__(self, state: State) -> State:
        """Apply the map once."""

    @abstractmethod
    def twice_differentiable(self) -> Callable[[State], State]:
        """Return the same map with operators that can be differentiated twice."""


class PreciseMap(ABC):
    """A map that computes in a precision of its own, which may be narrower than its states.

    Attributes:
        dtype: that precision; None for the state's.
    """

    dtype: torch.dtype | None


class BoundMap(BatchMap):
    """A function of (state, *inputs) with its inputs; every input belongs to the batch row-wise.

    Of causal layouts whole sequences leave it, and positions only where the function is a
    `BatchMap`, with inputs (B, T, ...) then; see `keeps_positions`.
    """

    def __init__(self, f: Callable[..., State], inputs: tuple[Any, ...] = ()) -> None:
        self.f = f
        self.inputs = inputs

    def __call__(self, state: State, *inputs: Any) -> State:
        return self.f(state, *self.inputs)

    def select(self, selection: Selection) -> BoundMap:
        inputs = tuple(
            None if item is None else rebuild(item, [selection.state(t) for t in leaves(item)])
            for item in self.inputs
        )
        f = self.f.select(selection) if isinstance(self.f, BatchMap) else self.f
        return BoundMap(f, inputs)


def keeps_positions(f: Any) -> bool:
    """Whether a map, cut down to some positions of its sequences, still knows those before them.

    A function of (state, *inputs) reads earlier positions in the state itself, so that they must
    stay there; a `BatchMap` takes them from its selection.
    """
    while isinstance(f, BoundMap):
        f = f.f
    return isinstance(f, BatchMap)


class Matrices:
    """A map on states, seen as one on matrices (R, D).

    A map may work in place (`nn.ReLU(inplace=True)`) or answer in a buffer of its own: both are
    noticed at the first two calls, which work on copies, and get copies from then on. Where this
    cannot be noticed, in programs and under torch.func (`watched` False), every call gets one.

    Raises:
        ValueError: (when called) the map returns a state of another shape than its argument's, or
            began to write into a state later than at its second call.
    """

    def __init__(self, f: Any, layout: Layout, watched: bool = True) -> None:
        self.f = f
        self.layout = layout
        self.watched = watched
        self.n_calls = 0
        self._in_place = False  # writes into what it is given
        self._reuses = False  # answers in the same memory every time
        self._first: Tensor | None = None  # answer of the first call, kept until the second is done
        self._before: Tensor | None = None  # argument of the call before this one
        self._version = 0

    def __call__(self, matrix: Tensor) -> Tensor:
        layout = self.layout
        self.n_calls += 1
        needs_copy = self.n_calls == 1 or self._in_place or not self.watched
        argument = _copy(matrix) if needs_copy else matrix
        version = writes(argument)
        state, cells = layout.to_state(argument), layout.cell_shape()
        answer = self.f(state)
        out = layout.to_matrix(answer)
        # Sums with one row in place of many would go through, and a causal layout, which takes its
        # sequences from the state, would have others.
        if out.shape != matrix.shape or layout.cell_shape() != cells:
            raise ValueError(
                f"expected tensors of shapes {_shapes(state)}, got {_shapes(answer)}: the map must "
                "return a state like its input"
            )
        if out.is_complex():
            raise ValueError(
                f"the map returned {out.dtype}, its state is {matrix.dtype}: solve for real and "
                "imaginary parts as two real tensors (torch.view_as_real)"
            )
        if self.watched:
            out = self._own_answer(matrix, argument, version, out)
        return out if out.dtype == matrix.dtype else out.to(matrix.dtype)

    def _own_answer(self, matrix: Tensor, argument: Tensor, version: int, out: Tensor) -> Tensor:
        """Return the answer in memory that the map will not write to again."""
        was_written = writes(argument) != version
        is_recording = torch.is_grad_enabled()
        if self.n_calls == 1:
            self._in_place = was_written or _differ(argument, matrix)
            self._first, out = out.detach(), out.clone()
        elif was_written and not self._in_place or writes(self._before) != self._version:
            raise ValueError(WROTE)
        else:
            if self._first is not None:
                self._reuses = out.numel() > 0 and out.data_ptr() == self._first.data_ptr()
                self._first = None
            out = out.clone() if self._reuses else out
        # A recorded argument would hold the graph that holds this map; autograd checks it itself.
        self._before = None if is_recording else matrix
        self._version = version if argument is self._before else writes(self._before)
        return out

    def select(self, selection: Selection, layout: Layout) -> Matrices:
        less = Matrices(self.f.select(selection), layout)
        less.n_calls, less._in_place, less._reuses = self.n_calls, self._in_place, self._reuses
        return less


def _copy(matrix: Tensor) -> Tensor:
    """A copy that counts its versions, in inference mode too."""
    if not torch.is_inference_mode_enabled():
        return matrix.clone()
    with torch.inference_mode(False):
        copy = torch.empty_like(matrix)
    return copy.copy_(matrix)


def _differ(argument: Tensor, matrix: Tensor) -> bool:
    """Whether a copy was written to where no version counts it (`.data`, numpy); on the CPU."""
    return argument.device.type == "cpu" and not torch.equal(argument, matrix)


def writes(tensor: Tensor | None) -> int:
    """How often a tensor's memory was written to; 0 where torch does not count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _shapes(state: State) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in leaves(state)]
