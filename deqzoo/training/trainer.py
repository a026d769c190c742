"""`transformers.Trainer` for equilibrium models: solver report, stages, penalties, exact resume."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import Trainer

from deqzoo.equilibrium import jacobian_penalty
from deqzoo.equilibrium.fixed import difference_penalty
from deqzoo.errors import UserError, as_user_error
from deqzoo.files import mark_complete
from deqzoo.models.base import DEQPreTrainedModel
from deqzoo.models.deq_transformer import DEQTransformerForCausalLM
from deqzoo.recipe import Jacobian, Stage
from deqzoo.tasks.base import Plan, Task
from deqzoo.training.checkpoints import conditions, keep_newest
from deqzoo.training.constraints import ProjectionCallback
from deqzoo.training.cost import PENALTY_EVALUATIONS, sample_flops, step_evaluations
from deqzoo.training.history import RunHistory


class SolverStatistics:
    """Solver reports between two log lines."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.converged: list[Tensor] = []
        self.solver_seconds = 0.0
        self.start = time.perf_counter()

    def add(self, outputs: Any) -> None:
        if getattr(outputs, "n_steps", None) is None:
            return
        self.steps.append(outputs.n_steps.detach())
        self.residuals.append(outputs.residual.detach())
        self.converged.append(outputs.converged.detach())

    def summary(self) -> dict[str, float]:
        """Mean and 95th percentile of the steps, residual, converged share, time in the solver."""
        if not self.steps:
            return {}
        steps = torch.cat([s.flatten() for s in self.steps]).float().cpu()
        residual = torch.cat([r.flatten() for r in self.residuals]).float().cpu()
        converged = torch.cat([c.flatten() for c in self.converged]).float().cpu()
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        return {
            "solver_steps": round(float(steps.mean()), 3),
            "solver_steps_p95": float(steps.quantile(0.95)),
            "solver_residual": float(residual.median()),
            "solver_residual_p95": float(residual.quantile(0.95)),
            "solver_converged": round(float(converged.mean()), 4),
            "solver_time_share": round(min(1.0, self.solver_seconds / elapsed), 4),
        }


class DEQTrainer(Trainer):
    """Trainer that logs the solver's report and can add Jacobian regularisation.

    Works as `Trainer` does, with the same arguments, for any model of the zoo. With
    `DEQTrainingArguments` the training steps have a solver, a gradient and a Jacobian penalty of
    their own; else they have those of the model's config. A model whose weights are constrained
    (IGNN's norm bound) is projected after every optimiser step. With `label_smoothing_factor` a
    text model's labels are shifted here, which `Trainer` does for classes of transformers only.

    Raises:
        UserError: settings of the arguments that the model's solver or gradient does not have, or
            a Jacobian penalty for a model that hands out no map (IGNN).
    """

    model: Any

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.jacobian: Jacobian | None = getattr(self.args, "jacobian", None)
        if hasattr(self.model, "project_"):
            self.add_callback(ProjectionCallback())
        self.statistics = SolverStatistics()
        self.penalties: list[Tensor] = []
        if self.jacobian is not None:
            require_map(self.model)
        for name in ("solver", "gradient"):
            change = getattr(self.args, name, None)
            if change and isinstance(self.model, DEQPreTrainedModel):
                with as_user_error(name, ValueError):
                    getattr(self.model, f"resolve_{name}")(change)

    def stage_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model that the training step adds to the batch."""
        extra = {key: getattr(self.args, key, None) for key in ("solver", "gradient")}
        return {key: value for key, value in extra.items() if value}

    def wants_penalty(self) -> bool:
        """Whether this step adds the Jacobian penalty."""
        return self.jacobian is not None and self.state.global_step % self.jacobian.every == 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs.get("labels")
        inputs = self.smoothed_inputs(inputs)
        if num_items_in_batch is not None and labels is not None and inputs["labels"] is not labels:
            label_tensors = (labels, inputs["labels"])
            n_labels, n_scored = ((x[:, 1:] != -100).sum().clamp(min=1) for x in label_tensors)
            num_items_in_batch = num_items_in_batch * n_scored / n_labels  # padding is no item
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        has_penalty = self.wants_penalty()
        inputs = {**inputs, **self.stage_inputs()}
        if has_penalty:
            inputs["output_state"] = True
        seconds_before = solver_seconds(model)
        loss, outputs = self.training_loss(model, inputs, num_items_in_batch)
        self.statistics.solver_seconds += solver_seconds(model) - seconds_before
        logs = self.args.logging_strategy != "no"  # nothing else empties the statistics
        if logs:
            self.statistics.add(outputs)
        if has_penalty and outputs.state is not None:
            assert self.jacobian is not None
            with self.accelerator.autocast():  # the map's weights are in the forward's precision
                penalty = penalty_of(outputs, self.jacobian)
            if logs:
                self.penalties.append(penalty.detach())
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                # The loss is a share of the whole step's; the penalty is a mean.
                penalty = penalty / self.current_gradient_accumulation_steps
            loss = loss + self.jacobian.weight * penalty
        return (loss, outputs) if return_outputs else loss

    def smoothed_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch; where Trainer smooths a text model's labels, with the labels that are scored.

        Trainer shifts labels by one place, but handles neither padding nor labels that are shifted
        already.

        Raises:
            UserError: labels that are the next words already (`shift=False`).
        """
        smooths = self.label_smoother is not None and self.compute_loss_func is None
        if not smooths or "labels" not in inputs:
            return inputs
        for module in self.model.modules():
            if isinstance(module, DEQTransformerForCausalLM):
                names = ("input_ids", "labels", "shift", "attention_mask")
                arguments = {name: inputs[name] for name in names if name in inputs}
                if not arguments.get("shift", True):
                    raise UserError(
                        "label_smoothing_factor takes labels that are the tokens themselves; "
                        "leave shift=False out"
                    )
                words = module.next_words(**arguments)
                return {**inputs, "labels": words.roll(1, 1)}  # the last one is never scored
        return inputs

    def training_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """The loss without penalties, and the model's output."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return loss, outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.statistics.summary())
            if self.penalties:
                logs["jacobian_penalty"] = round(float(torch.stack(self.penalties).mean()), 5)
            self.penalties.clear()
            self.statistics.reset()
        super().log(logs, start_time)


def penalty_of(outputs: Any, jacobian: Jacobian) -> Tensor:
    """The Jacobian penalty, without its weight, of an output made with `output_state=True`."""
    f = outputs.equilibrium_map
    if jacobian.difference:
        return difference_penalty(f, outputs.state, jacobian.difference)
    return jacobian_penalty(f, outputs.state, n_probes=jacobian.probes)


def solver_seconds(model: nn.Module) -> float:
    """Wall time that a model's solvers have taken so far."""
    return sum(getattr(module, "solver_seconds", 0.0) for module in model.modules())


def backward_products(model: nn.Module) -> int:
    """Vector-Jacobian products that the implicit gradient of a model's newest solve has spent."""
    reports = (getattr(module, "backward_report", None) for module in model.modules())
    return sum(report.n_evals for report in reports if report is not None)


class RecipeTrainer(DEQTrainer):
    """Runs the stages of a recipe as one Trainer run, so that one checkpoint holds all of it."""

    def __init__(self, task: Task, plan: Plan, recipe: Any, out: Path, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.model_accepts_loss_kwargs = False  # the task's loss is a mean
        self.task = task
        self.plan = plan
        self.recipe = recipe
        self.out = out
        self.average: AveragedModel | None = None
        if recipe.average:
            # Trained weights are worth remembering from the first step, fresh ones are not.
            rule: Any = moving_average(recipe.average, warm_up=not recipe.model.start)
            self.average = AveragedModel(self.model, multi_avg_fn=rule, use_buffers=True)
        self.history = RunHistory.of(recipe, task)
        if any(stage.jacobian for stage in plan.stages):
            require_map(self.model)
        self.flop_table = [sample_flops(task.probe, self.model, stage) for stage in plan.stages]
        self.evaluations: list[float] = []
        self.last_save = time.monotonic()

    @property
    def stage(self) -> Stage:
        return self.plan.stage(self.state.global_step)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item per micro-batch; its number alone decides what it holds."""
        rank, world = self.args.process_index, self.args.world_size

        def collate(numbers: list[int]) -> dict[str, Any]:
            return self.task.batch(self.plan, numbers[0], rank, world)

        numbers: Any = range(self.plan.total * self.plan.accumulate)
        return DataLoader(numbers, 1, collate_fn=collate)

    def stage_inputs(self) -> dict[str, Any]:
        return self.stage.arguments()

    def wants_penalty(self) -> bool:
        self.jacobian = self.stage.jacobian
        return super().wants_penalty()

    def training_loss(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        batch = inputs
        inputs = self.task.before_forward(model, self.task.forward_inputs(batch))
        outputs = model(**inputs)
        self.task.after_forward(outputs)
        self.count(outputs, inputs)
        return self.task.loss(outputs, batch), outputs

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().training_step(*arguments, **keywords)
        # What an implicit gradient costs is known after its backward pass only.
        products = 0 if self.stage.shallow else backward_products(self.model)
        if products:
            self.history.spent += products * self.evaluation_flops
            self.evaluations[-1] += products
        return loss

    def count(self, outputs: Any, inputs: dict[str, Any]) -> None:
        """Add the FLOPs of a step on all processes, without products of an implicit gradient."""
        per_evaluation, rest_flops = self.flop_table[self.plan.index(self.state.global_step)]
        stage = self.stage
        # A graph of nodes is one sample, however many labels it has.
        batch = min(len(inputs["labels"]), self.recipe.batch_size)
        samples = batch * self.args.world_size
        evaluations = step_evaluations(
            self.model,
            stage,
            0 if stage.shallow else round(int(outputs.n_steps.max()) / self.task.solves),
            fixed=self.model.takes_fixed_steps(stage.solver, stage.gradient),
            checkpoint=self.recipe.gradient_checkpointing,
            detached=self.recipe.compile,
            products=0,  # counted after the backward pass
        )
        if self.wants_penalty():
            evaluations += PENALTY_EVALUATIONS
        self.evaluations.append(evaluations)
        self.evaluation_flops = samples * per_evaluation
        self.history.spent += evaluations * self.evaluation_flops + samples * 3 * rest_flops

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.average is not None and self.is_world_process_zero():
            save_file(_flat(self.average.module), folder / "average.safetensors")
            (folder / "average.txt").write_text(str(int(self.average.n_averaged)))
        state = {"task": self.task.state_dict(), **self.history.state_dict(self.conditions())}
        torch.save(state, folder / f"deqzoo_state_{self.args.process_index}.pt")
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            mark_complete(folder)
            keep_newest(folder.parent)
        self.last_save = time.monotonic()

    def conditions(self) -> dict[str, Any]:
        """What, beside the weights, decides how a run goes on."""
        return conditions(self.recipe, self.task, self.args.bf16, self.args.device)

    def restore(self, folder: str, accept_changes: bool = False) -> None:
        """Read back what `_save_checkpoint` added to the Trainer's own files.

        Raises:
            UserError: another number of processes; or other data, threads or settings than the
                checkpoint was made with, and that is not accepted.
        """
        path = Path(folder) / f"deqzoo_state_{self.args.process_index}.pt"
        if not path.exists():
            raise UserError(
                f"{folder} was written by fewer processes than {self.args.world_size}; resume with "
                "the number that the run was begun with"
            )
        stored_state = torch.load(path, weights_only=True)
        self.task.load_state_dict(stored_state["task"])
        self.history.resume(folder, stored_state, self.conditions(), accept_changes)
        if self.average is not None:
            state = load_file(Path(folder) / "average.safetensors")
            _load_flat(self.average.module, state)
            count = int((Path(folder) / "average.txt").read_text())
            self.average.n_averaged.fill_(count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["evaluations"] = round(sum(self.evaluations) / max(1, len(self.evaluations)), 3)
            self.evaluations.clear()
            logs["pflop"] = self.history.pflop
            logs["stage"] = self.plan.index(self.state.global_step - 1)
        super().log(logs, start_time)

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Validation figures of the averaged weights where there are any, else of the current."""
        step = self.state.global_step
        figures = self.history.validate(
            self.task,
            self.averaged(),
            self.plan.stage(step - 1),
            self.recipe.evaluation.samples,
            step,
        )
        metrics = {f"eval_{key}": value for key, value in figures.items()}
        self.log({**metrics, "pflop": self.history.pflop})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def averaged(self) -> Any:
        """The weights that are evaluated."""
        return self.model if self.average is None else self.average.module

    def figures(self) -> dict[str, Any]:
        """What the record of the run says of this engine."""
        steps = self.state.global_step
        return {
            "finished": steps >= self.plan.total,
            "steps": steps,
            "total_steps": self.plan.total,
            "epochs": round(self.plan.epoch(steps), 4),
            "pflop": self.history.pflop,
            "pflop_inherited": round(self.history.inherited / 1e15, 6),
            "precision": "bf16" if self.args.bf16 else "float32",
            "processes": self.args.world_size,
        }


def average_decay(decay: float, step: int, *, warm_up: bool) -> float:
    """Decay of the moving average at a step; with `warm_up` the first weights are forgotten."""
    return min(decay, (1 + step) / (10 + step)) if warm_up else decay


def moving_average(
    decay: float, *, warm_up: bool
) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """Exponential moving average; with `warm_up` its memory grows from 10 steps to that of `decay`.

    At step n the memory is at most (10 + n) / 9 steps, so that the first weights are forgotten.
    """

    @torch.no_grad()
    def update(average: list[Tensor], current: list[Tensor], n_averaged: Tensor | int) -> None:
        weight = 1 - average_decay(decay, int(n_averaged), warm_up=warm_up)
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, weight)
        else:
            for average_tensor, current_tensor in zip(average, current, strict=True):
                average_tensor.copy_(current_tensor)

    return update


def _flat(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each storage once."""
    storages: set[int] = set()
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in storages:
            storages.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


@torch.no_grad()
def _load_flat(model: nn.Module, state: dict[str, Tensor]) -> None:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in state.items():
        tensors[name].copy_(tensor)


def knows_start(folder: str) -> bool:
    """Whether a checkpoint says what the weights that its run began with had cost."""
    states = sorted(Path(folder).glob("deqzoo_state_*.pt"))
    return bool(states) and "inherited" in torch.load(states[0], weights_only=True)


def require_map(model: nn.Module) -> None:
    """Refuse a model that does not hand out its equilibrium map.

    Raises:
        UserError: its forward has no `output_state`.
    """
    if "output_state" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"jacobian: {type(model).__name__} has no output_state, so that its Jacobian cannot be "
            "penalised; graph models are bound by kappa instead"
        )
