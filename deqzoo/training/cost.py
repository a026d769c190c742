"""FLOPs and memory of a training step, counted in evaluations of the map."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from deqzoo.equilibrium.diagnostics import SavedTensors
from deqzoo.models.base import DEQPreTrainedModel
from deqzoo.recipe import Stage
from deqzoo.tasks.base import Probe

PENALTY_EVALUATIONS = 6.0
"""Graph, first backward with a graph of its own, and double backward of the Jacobian penalty."""
ONE_STEP = {"name": "fixed_point", "max_steps": 1, "tol": 0.0}


def count_flops(function: Callable[[], Any]) -> float:
    """FLOPs (two per multiply-add) of the convolutions and matrix products of a call."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_SPARSE) as counter:
        function()
    return float(counter.get_total_flops())


def _bag_flops(table: Any, rows: Any, *others: Any, out_val: Any = None, **_: Any) -> int:
    """FLOPs of a sum of weighted rows, which is a product with a sparse matrix."""
    return 2 * rows.numel() * table.shape[1]


def _linear_flops(x: Any, *others: Any, out_val: Any = None, **_: Any) -> int:
    return 2 * x.numel() * out_val.shape[1]


def _addmm_flops(plus: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * (a._nnz() if a.layout != torch.strided else a.numel()) * b.shape[1]


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula as one that takes tensors in place of their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


_SPARSE = {
    torch.ops.aten._embedding_bag_forward_only: _raw(_bag_flops),
    torch.ops.aten.addmm: _raw(_addmm_flops),
}
"""Products that torch's counter leaves out, or counts as if their matrix were dense."""
if torch.backends.mkldnn.is_available():
    _SPARSE[torch.ops.mkldnn._linear_pointwise] = _raw(_linear_flops)


def step_evaluations(
    model: DEQPreTrainedModel,
    stage: Stage,
    steps: float,
    *,
    fixed: bool,
    checkpoint: bool = False,
    detached: bool = False,
    products: float | None = None,
) -> float:
    """Evaluations of the map that a training step costs, backward passes included, penalties not.

    Args:
        model: whose gradient holds where the stage has none.
        stage: what the step trains.
        steps: of the solve.
        fixed: whether the solve does all its steps without measuring a residual.
        checkpoint, detached, products: see `Gradient.cost`.
    """
    if stage.shallow:
        return (3.0 + checkpoint) * model.config.unroll_layers
    gradient = model.resolve_gradient(stage.gradient or None)
    cost = gradient.cost(round(steps), checkpoint=checkpoint, detached=detached, products=products)
    return (steps if gradient.needs_solve else 0.0) + (not fixed) + cost.evaluations


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, without warnings about solves that end early."""
    was_training = model.training
    warning_flags = {
        m: m._warned_unsolved for m in model.modules() if isinstance(m, DEQPreTrainedModel)
    }
    model.eval()
    for module in warning_flags:
        module._warned_unsolved = True
    try:
        yield
    finally:
        model.train(was_training)
        for module, value in warning_flags.items():
            module._warned_unsolved = value


def sample_flops(
    probe: Callable[[PreTrainedModel, Stage], Probe], model: PreTrainedModel, stage: Stage
) -> tuple[float, float]:
    """FLOPs per sample of one evaluation of the map, and of all that surrounds it (forward)."""
    with evaluation_mode(model), _without_gradients(model):
        sample = probe(model, stage)
        per_evaluation = count_flops(lambda: sample.f(sample.state))
        model_flops = count_flops(lambda: sample.forward(solver=ONE_STEP))
    return per_evaluation, model_flops - 2 * per_evaluation


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no weight require a gradient: the counter needs the graph of every module output that
    requires one, and weights that a module returns have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def saved_bytes(function: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of a call, the model's weights left out."""
    with (
        torch.enable_grad(),
        SavedTensors((*model.parameters(), *model.buffers())) as saved_tensors,
    ):
        result = function()  # alive until the end, so that no storage is counted under two names
    del result
    return saved_tensors.bytes
