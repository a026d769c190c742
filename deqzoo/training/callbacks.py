"""What happens beside the training steps of a recipe."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from deqzoo.errors import UserError
from deqzoo.files import replacing
from deqzoo.training.trainer import RecipeTrainer, _flat

SETTLING = 50
"""Steps of a stage in which the average takes over the model's batch statistics: with batch norm's
momentum of 0.1, half a percent is left of the stage before."""


def agreed_decision(decision: bool, args: TrainingArguments) -> bool:
    """The first process's decision, so that all processes of a launch do the same.

    Clocks and folders look different to each of them, and a checkpoint waits for all.
    """
    if args.world_size == 1:
        return decision
    flag = torch.tensor([int(decision)], device=args.device)
    torch.distributed.broadcast(flag, src=0)
    return bool(flag.item())


class Divergence(TrainerCallback):
    """Ends a run whose loss is not finite: no later step mends its weights.

    Raises:
        UserError: when such a loss is logged.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {state.global_step}: the training has diverged. Begin "
                "again with a lower learning rate or with clipped gradients; checkpoints of the "
                "steps before it are kept"
            )


class AverageCallback(TrainerCallback):
    """Feeds the moving average of the weights after every optimiser step.

    Batch statistics belong to one resolution: for the first `SETTLING` steps of a stage the
    average takes over the model's own, and averages them from then on.
    """

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        average, plan = self.trainer.average, self.trainer.plan
        if average is None:
            return
        average.update_parameters(self.trainer.model)
        step = state.global_step - 1  # the one that has just ended
        if step - plan.starts[plan.index(step)] < SETTLING:
            copy_buffers(average.module, self.trainer.model)


def copy_buffers(average: nn.Module, model: nn.Module) -> None:
    """Let an average take over the batch statistics of the model."""
    for average_buffer, model_buffer in zip(average.buffers(), model.buffers(), strict=True):
        average_buffer.copy_(model_buffer)


class CheckpointClock(TrainerCallback):
    """Checkpoints after so many minutes, and at the end of every stage."""

    def __init__(self, trainer: RecipeTrainer, minutes: float) -> None:
        self.trainer = trainer
        self.seconds = 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        is_stage_end = state.global_step in self.trainer.plan.starts[1:]
        if agreed_decision(
            is_stage_end or time.monotonic() - self.trainer.last_save > self.seconds, args
        ):
            # Log lines hold means since the line before; after a resume, one that spanned the
            # checkpoint would lack the steps before it.
            control.should_save = control.should_log = True
        return control


class EvaluationClock(TrainerCallback):
    """Evaluates on the validation split every so many epochs, and at the end."""

    def __init__(self, trainer: RecipeTrainer, per_epoch: float) -> None:
        self.trainer = trainer
        self.per_epoch = per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        plan, step = self.trainer.plan, state.global_step
        count_before = int(plan.epoch(step - 1) * self.per_epoch + 1e-6)
        count_after = int(plan.epoch(step) * self.per_epoch + 1e-6)
        if count_after > count_before or step == plan.total:
            control.should_evaluate = True
        return control


class Snapshots(TrainerCallback):
    """Half-precision copies of the current weights from initialisation to the end."""

    def __init__(self, trainer: RecipeTrainer, count: int) -> None:
        self.trainer = trainer
        total = trainer.plan.total
        self.steps = {round(i * total / max(count - 1, 1)) for i in range(count)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.take(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            self.take(state.global_step)

    def take(self, step: int) -> None:
        if self.steps and self.trainer.is_world_process_zero():
            save_snapshot(self.trainer.model, self.trainer.out / "snapshots", step)


def save_snapshot(model: PreTrainedModel, folder: Path, step: int) -> None:
    """Write the current weights in half precision as `step-STEP.safetensors`."""
    folder.mkdir(exist_ok=True)
    half_weights = {
        name: t.half() if t.is_floating_point() else t for name, t in _flat(model).items()
    }
    with replacing(folder / f"step-{step:07d}.safetensors") as fresh:
        save_file(half_weights, fresh)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl, with the wall time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            append_metrics(self.path, state.global_step, logs)


def append_metrics(path: Path, step: int, entry: Mapping[str, Any]) -> str:
    """Append a line to metrics.jsonl, with step and wall time; the line."""
    line = json.dumps({"step": step, "time": round(time.time(), 1), **entry})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return line


class StopFile(TrainerCallback):
    """Stops cleanly, with a checkpoint, once a file named `stop` lies in the run's folder.

    Args:
        folder: the run's folder.
        max_steps: also stop once so many optimiser steps are done.
    """

    def __init__(self, folder: Path, max_steps: int | None = None) -> None:
        self.path = folder / "stop"
        self.max_steps = max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        is_last_step = self.max_steps is not None and state.global_step >= self.max_steps
        if agreed_decision(is_last_step or self.path.exists(), args):
            control.should_save = control.should_log = control.should_training_stop = True
        return control
