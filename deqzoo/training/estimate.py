"""What a recipe will cost: parameters, FLOPs, memory and time, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from deqzoo.equilibrium.fixed import has_fixed_steps
from deqzoo.models.base import DEQPreTrainedModel
from deqzoo.recipe import Recipe, Stage
from deqzoo.tasks.base import Plan, Probe, Task
from deqzoo.training.cost import (
    ONE_STEP,
    PENALTY_EVALUATIONS,
    evaluation_mode,
    sample_flops,
    saved_bytes,
    step_evaluations,
)

SPEEDS = {"50 GFLOP/s (two CPU cores)": 5e10, "20 TFLOP/s (a GPU)": 2e13}


def estimate(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Parameters, steps, PFLOP, hours and memory of a recipe in one process.

    FLOPs assume that every solve takes all its steps. Memory is that of the largest stage with the
    whole batch in one process and float32 activations; n processes need about 1/n of the parts
    that grow with the batch.
    """
    model: Any = task.model()
    plan = Plan.of(recipe, task)
    ends = (*plan.starts[1:], plan.total)
    measurements: dict[int | None, _Sample] = {}
    for stage in plan.stages:
        if stage.resolution not in measurements:
            measurements[stage.resolution] = _measure(task, model, stage)
    stages = [
        _stage(recipe, model, stage, measurements[stage.resolution], end - start)
        for stage, start, end in zip(plan.stages, plan.starts, ends, strict=True)
    ]
    flops = sum(stage.pop("flops") for stage in stages)
    parameters = sum(p.numel() for p in model.parameters())
    moments = 1 if recipe.optimizer.name == "sgd" else 2
    copies = 2 + moments + (recipe.average > 0)  # weights, gradients, moments, average
    state = round(copies * 4 * parameters / 2**20)
    return {
        "name": recipe.name,
        "parameters": parameters,
        "steps": plan.total,
        "pflop": _short(flops / 1e15),
        "hours": {name: _short(flops / speed / 3600) for name, speed in SPEEDS.items()},
        "memory_mib": {
            "weights_and_optimizer": state,
            "activations": max(stage["activations_mib"] for stage in stages),
            "solver": max(stage["solver_mib"] for stage in stages),
            "total": state + max(s["activations_mib"] + s["solver_mib"] for s in stages),
        },
        "stages": stages,
    }


def commands(arguments: str, one_process: bool) -> dict[str, str]:
    """Command lines that train a recipe on one device and, without `one_process`, on several."""
    train = f"deqzoo train {arguments} --resume"
    on_several_gpus = {} if one_process else {"several": f"torchrun --nproc_per_node 8 -m {train}"}
    return {"one": train, **on_several_gpus}


@dataclass(frozen=True)
class _Sample:
    """FLOPs and bytes of one sample."""

    per_evaluation: float
    rest: float
    map_bytes: int
    rest_bytes: int
    once_bytes: int
    state_bytes: int


def _measure(task: Task, model: DEQPreTrainedModel, stage: Stage) -> _Sample:
    per_evaluation, rest_flops = sample_flops(task.probe, model, stage)
    settings = {"solver": ONE_STEP, "gradient": {"name": "jfb"}}
    with evaluation_mode(model):
        map_bytes, _ = _bytes_per_sample(task, model, stage, lambda probe: probe.f(probe.state))
        model_bytes, once_bytes = _bytes_per_sample(
            task, model, stage, lambda probe: probe.forward(**settings)
        )
        leaves = tree_leaves(task.probe(model, stage).state)
    state = sum(t.numel() * 4 for t in leaves if isinstance(t, torch.Tensor))
    return _Sample(
        per_evaluation, rest_flops, map_bytes, max(model_bytes - map_bytes, 0), once_bytes, state
    )


def _stage(
    recipe: Recipe, model: DEQPreTrainedModel, stage: Stage, sample: _Sample, steps: int
) -> dict[str, Any]:
    evaluations = most_evaluations(recipe, stage, model)
    samples = steps * recipe.batch_size * recipe.accumulate
    flops = samples * (evaluations * sample.per_evaluation + 3 * sample.rest)
    graphs = 1 if recipe.gradient_checkpointing else _graphs(stage, model)
    graphs += 3 * (stage.jacobian is not None)
    per_sample = sample.rest_bytes + graphs * sample.map_bytes
    activations = sample.once_bytes + recipe.batch_size * per_sample
    solver = recipe.batch_size * sample.state_bytes * _history(stage, model)
    return {
        "steps": steps,
        "resolution": stage.resolution,
        "evaluations": round(evaluations, 2),
        "flops": flops,
        "pflop": _short(flops / 1e15),
        "activations_mib": round(activations / 2**20),
        "solver_mib": round(solver / 2**20),
    }


def most_evaluations(recipe: Recipe, stage: Stage, model: DEQPreTrainedModel) -> float:
    """Evaluations of the map that a training step costs at most, backward passes included."""
    checkpoint, solver = recipe.gradient_checkpointing, model.resolve_solver(stage.solver)
    fixed = has_fixed_steps(solver, model.resolve_gradient(stage.gradient))
    evaluations = step_evaluations(
        model, stage, solver.max_steps, fixed=fixed and not checkpoint, checkpoint=checkpoint,
        detached=recipe.compile,
    )  # fmt: skip
    if stage.jacobian is not None:
        evaluations += PENALTY_EVALUATIONS / stage.jacobian.every
    return evaluations


def _graphs(stage: Stage, model: DEQPreTrainedModel) -> int:
    """How many evaluations of the map a step keeps for its backward pass."""
    if stage.shallow:
        return model.config.unroll_layers
    solver = model.resolve_solver(stage.solver)
    return model.resolve_gradient(stage.gradient).cost(solver.max_steps).graphs


def _bytes_per_sample(
    task: Task, model: DEQPreTrainedModel, stage: Stage, call: Callable[[Probe], Any]
) -> tuple[int, int]:
    """Bytes kept per sample, and once per batch (normalised weights), from one and two samples."""
    bytes_of_one, bytes_of_two = (
        saved_bytes(partial(call, task.probe(model, stage, n)), model) for n in (1, 2)
    )
    return bytes_of_two - bytes_of_one, max(2 * bytes_of_one - bytes_of_two, 0)


def _history(stage: Stage, model: DEQPreTrainedModel) -> int:
    """How many copies of the state a solve keeps."""
    if stage.shallow or not model.resolve_gradient(stage.gradient).needs_solve:
        return 1
    return model.resolve_solver(stage.solver).history()


def _short(value: float) -> float:
    return float(f"{value:.4g}")
