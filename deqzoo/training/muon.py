"""Muon (Jordan et al. 2024): momentum of hidden matrices, orthogonalised; AdamW for the rest.

The updates are those of the published optimiser: momentum by lerp, Nesterov's look ahead, five
quintic Newton-Schulz steps in bfloat16 (in float32 on processors that are faster in it), decoupled
decay, √max(1, rows / columns) times the rate.
Matrices of like size are orthogonalised together, padded with zeros, which the iteration leaves
zero. Nothing reads a tensor on the host, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deqzoo.models.coarse import has_fast_bfloat16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x³ + c x⁵ that drives singular values towards 1."""
PADDED_SHAPES = ((64, 1024), (128, 1024), (256, 2048))
"""Rows and columns to which smaller matrices are padded, so that few stacks are left."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, AdamW for everything else.

    Args:
        groups: dicts of "params" and "use_muon", the first with "lr", "momentum", "nesterov" and
            "weight_decay", the others with "lr", "betas", "eps" and "weight_decay". Parameters of
            more than two axes count as matrices (rows, all the rest).
        capturable: keep learning rates as tensors on the device, to be filled in place, so that a
            captured step follows a schedule.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], capturable: bool = False) -> None:
        super().__init__(list(groups), {})
        self.capturable = capturable
        for group in self.param_groups:
            device = group["params"][0].device
            group["step"] = torch.zeros((), device=device)
            if capturable:
                group["lr"] = torch.tensor(float(group["lr"]), device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            group["step"] += 1
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["use_muon"] else self._adamw)(group, parameters)
        return loss

    def _memory(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        updates = self._memory(parameters, "momentum")
        torch._foreach_lerp_(updates, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(gradients, updates, group["momentum"]))
        updates = orthogonalised(updates)
        if self.capturable:
            torch._foreach_mul_(updates, -group["lr"])
            torch._foreach_add_(parameters, updates)
        else:
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        beta1, beta2 = group["betas"]
        first, second = self._memory(parameters, "first"), self._memory(parameters, "second")
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 1 - beta2)
        correction = (1 - beta2 ** group["step"]).sqrt()
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, correction)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(first, denominators)
        torch._foreach_mul_(updates, -group["lr"] / (1 - beta1 ** group["step"]))
        torch._foreach_add_(parameters, updates)


def orthogonalised(updates: list[Tensor]) -> list[Tensor]:
    """Approximate polar factors of matrices, each times √max(1, rows / columns), in its shape."""
    stacks: dict[tuple[int, int], list[int]] = defaultdict(list)
    matrices = [_matrix(u) for u in updates]
    for index, matrix in enumerate(matrices):
        rows, columns = sorted(matrix.shape)
        stacks[_padded_shape(rows, columns)].append(index)
    result = list(updates)
    for (rows, columns), indices in stacks.items():
        members = [matrices[i] for i in indices]
        stack = members[0].new_zeros(len(members), rows, columns, dtype=_precision(members[0]))
        torch._foreach_copy_(_parts(stack, members), members)
        for i, part in zip(indices, _parts(newton_schulz(stack), members), strict=True):
            stretch = math.sqrt(max(1.0, part.shape[0] / part.shape[1]))
            result[i] = _like(torch.mul(part, stretch).to(updates[i].dtype), updates[i])
    return result


def _precision(update: Tensor) -> torch.dtype:
    """In which the iteration is fastest; half the digits are enough for it."""
    slow = update.device.type == "cpu" and not has_fast_bfloat16()
    return torch.float32 if slow else torch.bfloat16


def _matrix(update: Tensor) -> Tensor:
    """(rows, all the rest), the columns in the order of memory.

    Permuting the columns of a matrix permutes those of its polar factor, and nothing else; to
    bring channels-last kernels into another order and back would take a tenth of a step on a CPU.
    """
    if _is_channels_last(update):
        update = update.permute(0, 2, 3, 1)
    return update.reshape(update.shape[0], -1)


def _like(matrix: Tensor, update: Tensor) -> Tensor:
    """The inverse of `_matrix`."""
    if _is_channels_last(update):
        rows, channels, height, width = update.shape
        return matrix.reshape(rows, height, width, channels).permute(0, 3, 1, 2)
    return matrix.reshape(update.shape)


def _is_channels_last(update: Tensor) -> bool:
    return update.ndim == 4 and update.is_contiguous(memory_format=torch.channels_last)


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factors of a batch of matrices (n, rows <= columns)."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _padded_shape(rows: int, columns: int) -> tuple[int, int]:
    for size in PADDED_SHAPES:
        if rows <= size[0] and columns <= size[1]:
            return size
    return rows, columns


def _parts(stack: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    """Views of a padded stack (n, rows <= columns) in the shapes of its matrices."""
    views = []
    for padded_matrix, matrix in zip(stack.unbind(0), matrices, strict=True):
        rows, columns = matrix.shape
        views.append((padded_matrix if rows <= columns else padded_matrix.mT)[:rows, :columns])
    return views
