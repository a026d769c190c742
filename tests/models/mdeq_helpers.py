"""A small MDEQ for tests."""

from __future__ import annotations

import torch

from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification

TINY = {
    "channels": [8, 16],
    "head_channels": [2, 3],
    "final_channels": 12,
    "expansion": 2,
    "num_groups": 4,
    "image_size": 8,
    "num_labels": 5,
    "solver": {"name": "anderson", "max_steps": 40, "tol": 1e-5},
}


def tiny_model(seed: int = 0, contraction: float = 0.05, **settings) -> MDEQForImageClassification:
    """A small model whose map contracts: states vary little around a random bias."""
    torch.manual_seed(seed)
    model = MDEQForImageClassification(MDEQConfig(**(TINY | settings)))
    with torch.no_grad():
        for post in model.mdeq.transformation.post:
            if model.config.affine_post:
                post.norm.weight.fill_(contraction)
                post.norm.bias.normal_()
    return model.eval()


def pictures(n: int = 3, side: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
