"""Small problems with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deqzoo.equilibrium import BatchMap, Selection

F64 = torch.float64

A = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, -0.1], [-0.2, 0.1, 0.3]], dtype=F64)
Q = torch.tensor([[1, 0.5], [0, -1], [2, 0.25]], dtype=F64)
U = torch.tensor([1.0, -2.0], dtype=F64)
C = torch.tensor([0.1, -0.3, 0.2], dtype=F64)
G = torch.tensor([1.0, -1.0, 2.0], dtype=F64)
H_STAR = torch.tensor([-7 / 45, 103 / 45, 14 / 5], dtype=F64)
W_STAR = torch.tensor([2 / 27, -32 / 27, 82 / 27], dtype=F64)

W_TANH = torch.tensor([[0.6, -0.3], [0.2, 0.5]], dtype=F64)
X_TANH = torch.tensor([0.4, -0.7], dtype=F64)
G_TANH = torch.tensor([1.0, -0.5], dtype=F64)
H_TANH = torch.tensor([0.798149301149, -0.715342963383], dtype=F64)


def affine(h: Tensor) -> Tensor:
    """The affine map h ↦ A h + Q u + c on rows."""
    return h @ A.T + (Q @ U + C)


class Tanh(BatchMap):
    """h ↦ tanh(h Wᵀ + x), whose samples may leave the batch."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        self.weight, self.x = weight, x

    def __call__(self, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.weight.T + self.x)

    def select(self, selection: Selection) -> Tanh:
        return Tanh(self.weight, selection.state(self.x))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def dense(kind: str, n: int = 64, size: int = 512) -> Tanh:
    """Problems A1, A2, A4 of the benchmarks in float32."""
    weight = draw(size, size, seed=0)
    if kind != "A4":
        weight = (weight + weight.T) / 2
    weight = weight * ((1.8 if kind == "A4" else 0.95) / torch.linalg.matrix_norm(weight, 2))
    u = draw(size, size, seed=1) / math.sqrt(size)
    x = (0.5 if kind == "A1" else 0.2) * draw(n, size, seed=3)
    return Tanh(weight.float(), (x @ u.T + 0.1 * draw(size, seed=2)).float())


def convolution(n: int = 4) -> Callable[[Tensor], Tensor]:
    """Problem B of the benchmarks with fewer and smaller pictures."""
    w1, w2 = ((draw(32, 32, 3, 3, seed=s) * math.sqrt(2 / 288) * 0.9).float() for s in (0, 1))
    injection = draw(n, 32, 12, 12, seed=2).float()

    def f(z: Tensor) -> Tensor:
        inner = torch.relu(torch.nn.functional.conv2d(z, w1, padding=1))
        return torch.tanh(torch.nn.functional.conv2d(inner, w2, padding=1) + injection)

    return f


class PerRow(BatchMap):
    """h_i ↦ s_i · tanh(h_i Wᵀ) + x_i without a product over the batch.

    Rows with a large s converge slowly or run away; a row with NaN in x fails at once.
    """

    def __init__(self, weight: Tensor, s: Tensor, x: Tensor) -> None:
        self.weight, self.s, self.x = weight, s, x

    def __call__(self, h: Tensor) -> Tensor:
        mixed = (h.unsqueeze(1) * self.weight).sum(2)  # the same sums whatever the batch size
        return self.s.unsqueeze(1) * mixed + self.x

    def select(self, selection: Selection) -> PerRow:
        return PerRow(self.weight, selection.state(self.s), selection.state(self.x))

    def row(self, i: int) -> PerRow:
        return PerRow(self.weight, self.s[i : i + 1], self.x[i : i + 1])


def mixed_batch(dtype: torch.dtype = torch.float32) -> PerRow:
    """64 samples: easy, hard, diverging (row 20), NaN (row 30) and infinite (row 40)."""
    weight = draw(24, 24, seed=10)
    weight = weight / torch.linalg.matrix_norm(weight, 2)
    s = torch.linspace(0.05, 1.15, 64, dtype=F64)
    s[20] = 1e9
    x = draw(64, 24, seed=11)
    x[30, 3] = math.nan
    x[40, 5] = math.inf
    return PerRow(weight.to(dtype), s.to(dtype), x.to(dtype))
