"""The floor of a training step: its operations at the rate of a bare matrix product."""

from __future__ import annotations

import time

import torch

SIDE = {"cuda": 8192, "cpu": 1024}
SECONDS = 0.2


@torch.no_grad()
def bare_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a bare square matrix product, the best of several within a fraction of a second.

    No step is faster; one of small convolutions, norms and optimiser reaches a part of it.

    Args:
        device: on which the step runs.
        dtype: in which it multiplies.

    Returns:
        Floating-point operations per second, a multiply-add counted as two.
    """
    side = SIDE.get(device.type, 1024)
    a = torch.randn(side, side, device=device).to(dtype)

    def product() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    product()  # kernels are chosen and buffers allocated
    shortest, end = product(), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        shortest = min(shortest, product())
    return 2.0 * side**3 / shortest
