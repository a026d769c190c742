"""Optimisers and learning-rate schedules of the recipes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from deqzoo.recipe import Optimizer, Schedule
from deqzoo.training.muon import Muon


def build_optimizer(
    model: nn.Module, settings: Optimizer, capturable: bool = False
) -> torch.optim.Optimizer:
    """Build the optimiser of a recipe.

    Args:
        model: its trainable parameters.
        settings: of the recipe.
        capturable: learning rates are tensors on the model's device, to be filled in place.
    """
    if settings.name == "muon":
        return Muon(_muon_groups(model, settings), capturable)
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if _is_matrix(p)]
    vectors = [p for p in parameters if not _is_matrix(p)]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    device = parameters[0].device
    lr = torch.tensor(settings.lr, device=device) if capturable else settings.lr
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(groups, lr, settings.momentum, nesterov=nesterov)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    # On the CPU torch counts steps on the host anyway.
    return kind(groups, lr, betas=settings.betas, capturable=capturable and device.type != "cpu")


def _muon_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """Parameter groups of Muon: hidden matrices, other matrices, gains and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    ends = _input_and_output(model)
    hidden_matrices = [p for p in parameters if _is_matrix(p) and id(p) not in ends]
    matrices = [p for p in parameters if _is_matrix(p) and id(p) in ends]
    vectors = [p for p in parameters if not _is_matrix(p)]
    adamw_settings = {
        "use_muon": False,
        "lr": settings.other_lr,
        "betas": settings.betas,
        "eps": 1e-8,
    }
    groups = [
        {
            "params": hidden_matrices,
            "use_muon": True,
            "lr": settings.lr,
            "momentum": settings.momentum,
            "nesterov": settings.nesterov,
            "weight_decay": settings.weight_decay,
        },
        {"params": matrices, **adamw_settings, "weight_decay": settings.weight_decay},
        {"params": vectors, **adamw_settings, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether more than one axis is longer than 1: gains of weight norm are (out, 1, 1, 1)."""
    return sum(size > 1 for size in parameter.shape) > 1


def _input_and_output(model: nn.Module) -> set[int]:
    """The first and last matrix of a model and its embeddings, which Muon is not meant for."""
    # A tied output stands here a second time: without it the last matrix would be a hidden one.
    named_parameters = model.named_parameters(remove_duplicate=False)
    matrices = [p for _, p in named_parameters if p.requires_grad and _is_matrix(p)]
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
        return decay(schedule, min(1.0, (step - warmup) / max(1, total - warmup)))

    return LambdaLR(optimizer, factor)


def rate_factor(schedule: Schedule, progress: float) -> float:
    """Learning-rate factor once a share of the run, in [0, 1], is over."""
    if progress < schedule.warmup:
        return max(progress / schedule.warmup, 0.01)
    return decay(schedule, (progress - schedule.warmup) / max(1e-9, 1 - schedule.warmup))


def decay(schedule: Schedule, progress: float) -> float:
    """Factor once a share of the decay is over."""
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        return 1.0 if progress < schedule.at else schedule.final
    fall = progress if schedule.name == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - fall * (1 - schedule.final)
