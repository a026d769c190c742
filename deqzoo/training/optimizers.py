"""Optimisers and learning-rate schedules of the recipes."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from deqzoo.errors import UserError
from deqzoo.training.recipe import Optimizer, Schedule


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Build the optimiser of a recipe.

    Raises:
        UserError: Muon is wanted and pytorch-optimizer is not installed.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for _, p in named if _is_matrix(p)]
    vectors = [p for _, p in named if not _is_matrix(p)]
    decay = settings.weight_decay
    if settings.name == "muon":
        return _muon(model, named, settings)
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=nesterov)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, settings.lr, betas=settings.betas)


def _muon(
    model: nn.Module, named: list[tuple[str, nn.Parameter]], settings: Optimizer
) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import Muon
    except ImportError as error:
        raise UserError(
            "optimizer muon needs pytorch-optimizer: pip install 'deqzoo[train]'"
        ) from error
    ends = _input_and_output(model)
    hidden = [p for _, p in named if _is_matrix(p) and id(p) not in ends]
    matrices = [p for _, p in named if _is_matrix(p) and id(p) in ends]
    vectors = [p for _, p in named if not _is_matrix(p)]
    other = {"use_muon": False, "lr": settings.other_lr, "betas": settings.betas, "eps": 1e-8}
    groups = [
        {
            "params": hidden,
            "use_muon": True,
            "lr": settings.lr,
            "momentum": settings.momentum,
            "nesterov": settings.nesterov,
            "weight_decay": settings.weight_decay,
        },
        {"params": matrices, **other, "weight_decay": settings.weight_decay},
        {"params": vectors, **other, "weight_decay": 0.0},
    ]
    return Muon([group for group in groups if group["params"]])


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether more than one axis is longer than 1: gains of weight norm are (out, 1, 1, 1)."""
    return sum(size > 1 for size in parameter.shape) > 1


def _input_and_output(model: nn.Module) -> set[int]:
    """The first and last matrix of a model and its embeddings, which Muon is not meant for."""
    matrices = [p for p in model.parameters() if p.requires_grad and _is_matrix(p)]
    ends = {id(p) for p in (matrices[0], matrices[-1])}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            ends.add(id(module.weight))
    return ends


def build_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, total: int) -> LambdaLR:
    """Learning-rate factors for `total` steps: linear warm-up, then the decay."""
    warmup = round(schedule.warmup * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule.name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        fall = progress if schedule.name == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1 - fall * (1 - schedule.final)

    return LambdaLR(optimizer, factor)
