"""The equilibrium problems that solvers and gradients are measured on.

A1 to A4 are dense maps z ↦ tanh(z Wᵀ + x Uᵀ + b) with 512 numbers per sample, B is a pair of
convolutions with 32,768; every tensor is drawn in float64 with a fixed seed and then cast. The
MDEQ block is the map of the CIFAR tiny preset with fresh weights and random pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deqzoo.equilibrium import BatchMap, Selection


@dataclass(frozen=True)
class Problem:
    """A map with its start.

    Attributes:
        name: as in the tables.
        f: the map; it has `select` where samples may leave the batch.
        z0: start, a tensor or a tuple of tensors.
        cap: evaluations after which a solver gives up.
    """

    name: str
    f: Callable[[Any], Any]
    z0: Any
    cap: int


class Dense(BatchMap):
    """z ↦ tanh(z Wᵀ + injection), one fused product."""

    def __init__(self, weight: Tensor, injection: Tensor) -> None:
        self.weight = weight
        self.injection = injection

    def __call__(self, z: Tensor) -> Tensor:
        return torch.addmm(self.injection, z, self.weight.t()).tanh_()

    def select(self, selection: Selection) -> Dense:
        return Dense(self.weight, selection.state(self.injection))


class Convolutions(BatchMap):
    """z ↦ tanh(conv(relu(conv(z, w1)), w2) + injection)."""

    def __init__(self, w1: Tensor, w2: Tensor, injection: Tensor) -> None:
        self.w1, self.w2, self.injection = w1, w2, injection

    def __call__(self, z: Tensor) -> Tensor:
        inner = F.relu(F.conv2d(z, self.w1, padding=1))
        return torch.tanh(F.conv2d(inner, self.w2, padding=1) + self.injection)

    def select(self, selection: Selection) -> Convolutions:
        return Convolutions(self.w1, self.w2, selection.state(self.injection))


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def dense(name: str, dtype: torch.dtype = torch.float32) -> Problem:
    """One of A1, A2 (symmetric, norm 0.95), A3 (heterogeneous) and A4 (non-normal, norm 1.8)."""
    n, size = 64, 512
    weight = draw(size, size, seed=0)
    if name != "A4":
        weight = (weight + weight.T) / 2
    weight = weight * ((1.8 if name == "A4" else 0.95) / torch.linalg.matrix_norm(weight, 2))
    u = draw(size, size, seed=1) / math.sqrt(size)
    bias = 0.1 * draw(size, seed=2)
    x = (0.5 if name in ("A1", "A3") else 0.2) * draw(n, size, seed=3)
    if name == "A3":
        bias = torch.zeros_like(bias)
        x = x * torch.logspace(-2, 1, n, dtype=torch.float64).unsqueeze(1)
    injection = (x @ u.T + bias).to(dtype)
    return Problem(name, Dense(weight.to(dtype), injection), torch.zeros(n, size, dtype=dtype), 200)


def conv(dtype: torch.dtype = torch.float32) -> Problem:
    """B: 32 samples of 32 channels at 32 × 32."""
    scale = math.sqrt(2 / (9 * 32)) * 0.9
    w1 = (draw(32, 32, 3, 3, seed=0) * scale).to(dtype)
    w2 = (draw(32, 32, 3, 3, seed=1) * scale).to(dtype)
    injection = draw(32, 32, 32, 32, seed=2).to(dtype)
    return Problem("B", Convolutions(w1, w2, injection), torch.zeros_like(injection), 60)


def mdeq_block(batch: int = 4) -> Problem:
    """The map of MDEQ's CIFAR tiny preset with random weights and pictures, in float32."""
    from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
    from deqzoo.models.mdeq.modeling_mdeq import MDEQModel

    torch.manual_seed(0)
    model = MDEQModel(MDEQConfig.from_preset("mdeq-cifar-tiny")).eval()
    with torch.no_grad():
        f, z0 = model.equilibrium_map(draw(batch, 3, 32, 32, seed=4).float())
    return Problem("MDEQ", f, z0, 30)
