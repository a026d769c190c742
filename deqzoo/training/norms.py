"""Batch norms that keep the statistics they were loaded with."""

from __future__ import annotations

from torch import nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its running statistics; gain and bias still learn."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)


def freeze_batch_norm(model: nn.Module) -> int:
    """Let every batch norm of a model keep its running statistics, in training too.

    For fine-tuning on small batches, and for several processes without synchronised statistics:
    each then computes exactly its part of the gradient that one process would.

    Returns:
        How many batch norms there are.
    """
    norms = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for norm in norms:
        norm.__class__ = FrozenBatchNorm2d
        norm.train(False)
    return len(norms)
