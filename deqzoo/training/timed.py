"""A run that ends when its time does: stages share a time budget, on one GPU or on the CPU.

Every acceleration is tried, checked against the plain step on one batch, and left out where it
fails: the compiled map, then the CUDA graph of the whole step. `metrics.jsonl` says which is used.
"""

from __future__ import annotations

import copy
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from deqzoo.errors import UserError
from deqzoo.recipe import Recipe, Stage
from deqzoo.tasks.base import Task
from deqzoo.training.best import BestWeights
from deqzoo.training.callbacks import SETTLING, append_metrics, copy_buffers, save_snapshot
from deqzoo.training.clock import TimeBudget
from deqzoo.training.cost import PENALTY_EVALUATIONS, sample_flops, step_evaluations
from deqzoo.training.floor import bare_rate
from deqzoo.training.history import RunHistory
from deqzoo.training.optimizers import build_optimizer, rate_factor
from deqzoo.training.step import TrainingStep
from deqzoo.training.trainer import average_decay

AHEAD = 4
"""Steps that the host may be ahead of the device: its clock is the device's to within them."""
LOG_SECONDS = 10.0
EVALUATION_SHARE = {False: 0.05, True: 0.25}
"""Validation after a stage, and after the last, takes at most about this share of the time."""
CHECK_LOSS, CHECK_COSINE = 0.02, 0.05
"""Bounds for a compiled map: relative distance of its loss from the plain one's, and by how much
less the cosine of its gradient with that in float32 may be."""
DIVERGED = 0.5
"""Share of the steps between two reports whose gradient may be unusable."""
MAX_SLOWDOWNS = 4
"""How often a run that diverges goes back and halves its learning rate before it ends."""


class TimedRun:
    """Trains the stages of a recipe for a given time.

    Args:
        recipe: its stages' `epochs` are shares of the time.
        task: data, loss and figures.
        model: what is trained; moved to the GPU where there is one.
        out: folder of the run.
        seconds: of training; compilation, evaluation and saving come on top.
        deadline: seconds from now on after which nothing may run any more; the training time is
            cut where it would not be met.
        bf16: forward under autocast, the map in bfloat16.
        progress: show a bar.
        max_steps: stop, resumably, after so many optimiser steps in all.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        model: PreTrainedModel,
        out: Path,
        seconds: float,
        deadline: float | None = None,
        bf16: bool = False,
        progress: bool = True,
        max_steps: int | None = None,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("time_budget is for one process; leave it out for several GPUs")
        self.start = time.monotonic()
        self.deadline = deadline
        self.recipe, self.task, self.out, self.bf16 = recipe, task, out, bf16
        self.progress, self.max_steps = progress, max_steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.history = RunHistory.of(recipe, task)
        self.flop_table = [sample_flops(task.probe, model, stage) for stage in recipe.stages]
        family: Any = model.to(self.device)  # type: ignore[arg-type]
        self.model = family.train()
        self.average = copy.deepcopy(self.model) if recipe.average else None
        if self.device.type == "cpu" and hasattr(self.averaged(), "use_native_norm"):
            self.averaged().use_native_norm()
        self.data = task.resident(self.device)
        self.optimizer = build_optimizer(self.model, recipe.optimizer, capturable=True)
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.budget = TimeBudget(seconds, [stage.epochs for stage in recipe.stages])
        self.compiled = recipe.compile
        self.count = self.epoch = self.position = 0
        self.stage_start = self.stage_number = 0
        self.rows: Tensor | None = None
        self.reserve = 0.0
        self.is_stopped = False
        self.n_slowdowns = 0
        self.failure = ""
        self.events: list[Any] = []
        self.evaluation_rate = 0.0  # of the map, samples per second
        self.snapshots = 0
        self.last_save = time.monotonic()
        self.requested_seconds = seconds
        self.bare_rate = bare_rate(self.device, torch.bfloat16 if bf16 else torch.float32)

    # State and figures of the run.

    def averaged(self) -> Any:
        """The weights that are evaluated."""
        return self.model if self.average is None else self.average

    @property
    def finished(self) -> bool:
        """Whether the time is over."""
        return self.budget.stage is None and not self.is_stopped

    def figures(self) -> dict[str, Any]:
        """What the record of the run says of this engine."""
        seconds = max(self.budget.counted_seconds, 1e-9)
        rate = (self.history.spent - self.history.inherited) / seconds
        return {
            "finished": self.finished,
            "steps": self.count,
            "total_steps": self.count,
            "epochs": round(self.epochs, 4),
            "time_budget_seconds": round(self.budget.seconds, 1),
            "training_seconds": round(self.budget.counted_seconds, 1),
            "samples_per_second": round(self.count * self._batch / seconds, 1),
            "tflops": round(rate / 1e12, 4),
            "floor_tflops": round(self.bare_rate / 1e12, 4),
            "floor_share": round(rate / self.bare_rate, 4),
            "pflop": self.history.pflop,
            "pflop_inherited": round(self.history.inherited / 1e15, 6),
            "precision": "bf16" if self.bf16 else "float32",
            "processes": 1,
        }

    @property
    def epochs(self) -> float:
        """Epochs trained."""
        return self.epoch + (self.position / len(self.rows) if self.rows is not None else 0.0)

    @property
    def _batch(self) -> int:
        return self.recipe.batch_size * self.recipe.accumulate

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.data.tensors(),
            "cpu_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "seconds": self.budget.seconds,
            "asked": self.requested_seconds,
            "used": self.budget.counted_seconds,
            "slowed": self.n_slowdowns,
            "numbers": [self.count, self.epoch, self.position, self.stage_number, self.stage_start],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for tensor, stored_tensor in zip(self.data.tensors(), state["data"], strict=True):
                tensor.copy_(stored_tensor)
        torch.set_rng_state(state["cpu_generator"])
        if self.device.type == "cuda" and state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"])
        self._slow_down(state.get("slowed", 0))
        self.budget.counted_seconds = state["used"]
        # Another time budget than before takes the place of the stored one.
        if state.get("asked", self.requested_seconds) == self.requested_seconds:
            self.budget.seconds = state["seconds"]  # which a deadline may have shortened
        elif self.history.best is not None:  # its validations were of another size
            self.history.best = BestWeights(self.task.metric)
        (self.count, self.epoch, self.position, self.stage_number, self.stage_start) = state[
            "numbers"
        ]

    # Training.

    def train(self, keep: Any) -> None:
        """All stages that are left.

        Args:
            keep: called after every stage, and every `checkpoint_minutes`, to write what there is.

        Raises:
            UserError: the run diverges however small its learning rate.
        """
        total = self.budget.seconds
        is_hidden = None if self.progress else True  # None: in a terminal only
        bar = tqdm(total=round(total), unit="s", disable=is_hidden, desc=self.recipe.name)
        while (number := self.budget.stage) is not None and not self.is_stopped:
            if number != self.stage_number or self.count == 0:
                self.stage_number, self.stage_start = number, self.count
            self._stage(number, self.recipe.stages[number], bar, keep)
            if not self.is_stopped:
                self.evaluate(self.recipe.stages[number])
            self._save(keep)
        bar.close()
        if self.failure:
            raise UserError(self.failure)

    def _save(self, keep: Any) -> None:
        keep()
        self.last_save = time.monotonic()

    def _stage(self, number: int, stage: Stage, bar: tqdm, keep: Any) -> None:
        rows = self._rows(stage)
        step, penalised_step = self._steps(stage, rows[0])
        how = "CUDA graph" if step.graph is not None else "eager"
        self.log(event="stage", stage=number, step_is=how, map_compiled=self.compiled)
        if self.deadline is not None:
            self.budget.shorten(self.deadline - self._age() - self.reserve)
            if self.budget.seconds <= 0:
                raise UserError(
                    "the deadline is over before the first step: give more seconds to --deadline"
                )
        penalty_interval = stage.jacobian.every if stage.jacobian else 0
        steps = [s for s in (step, penalised_step) if s is not None]
        report_time, n_steps = time.monotonic(), 0
        good_state = step.snapshot()
        with self.budget.running():
            while self.budget.stage == number and not self.is_stopped:
                current_step = (
                    penalised_step
                    if penalised_step is not None and self.count % penalty_interval == 0
                    else step
                )
                self._set_rates()
                current_step.set(rows[self.position], self.epoch, self._decay())
                current_step()
                self._hold_back()
                self.count, self.position, n_steps = self.count + 1, self.position + 1, n_steps + 1
                if self.count - self.stage_start == SETTLING and self.average is not None:
                    copy_buffers(self.average, self.model)
                if self.position == len(rows):
                    self.epoch, self.position, self.rows = self.epoch + 1, 0, None
                    rows = self._rows(stage)
                if time.monotonic() - report_time > LOG_SECONDS:
                    good_state = self._tell(steps, n_steps, report_time, stage, good_state)
                    bar.n = min(round(self.budget.used_seconds), bar.total)
                    bar.refresh()
                    report_time, n_steps = time.monotonic(), 0
                is_last_step = self.max_steps is not None and self.count >= self.max_steps
                is_stop_requested = is_last_step or (self.out / "stop").exists()
                self.is_stopped = is_stop_requested or bool(self.failure)
                self._keep_what_is_due(keep)
            if n_steps:
                self._tell(steps, n_steps, report_time, stage, good_state)

    def _keep_what_is_due(self, keep: Any) -> None:
        """Write a snapshot or a checkpoint, while the budget's clock stands still."""
        checkpoint = time.monotonic() - self.last_save > 60 * self.recipe.checkpoint_minutes
        if checkpoint or self._snapshots_due() > self.snapshots:
            with self.budget.paused():
                self._take_snapshot()
                if checkpoint:
                    self._save(keep)

    def _snapshots_due(self) -> int:
        """How many snapshots there should be by now."""
        return int(self.budget.progress * max(self.recipe.evaluation.snapshots - 1, 1)) + 1

    def _take_snapshot(self) -> None:
        n_due = self._snapshots_due()
        if self.recipe.evaluation.snapshots and n_due > self.snapshots:
            save_snapshot(self.model, self.out / "snapshots", self.count)
        self.snapshots = n_due

    def _rows(self, stage: Stage) -> Tensor:
        """The rows of the data that each step of the present epoch takes."""
        if self.rows is None or self.position == 0:
            self.rows = self.data.epoch(self.epoch, stage)
        if not len(self.rows):
            raise UserError(f"a batch of {self._batch} is more than the training data hold")
        self.position %= len(self.rows)
        return self.rows

    def _set_rates(self) -> None:
        factor = rate_factor(self.recipe.schedule, self.budget.progress)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"].fill_(rate * factor)

    def _decay(self) -> float:
        """Decay of the average, with a warm-up where the run begins with fresh weights."""
        warm_up = not self.recipe.model.start
        return average_decay(self.recipe.average, self.count, warm_up=warm_up)

    def _hold_back(self) -> None:
        """Wait for the step before the last few, so that the host's clock is the device's."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > AHEAD:
            self.events.pop(0).synchronize()

    def _steps(self, stage: Stage, rows: Tensor) -> tuple[TrainingStep, TrainingStep | None]:
        """The stage's step and the one with its penalty, compiled and captured where that works."""
        self._prepare(stage, rows)
        steps: list[TrainingStep | None] = []
        pool = None
        for penalised in (False, True):
            if penalised and not (stage.jacobian and stage.jacobian.weight):
                steps.append(None)
                continue
            step = self._step(stage, penalised)
            step.set(rows, self.epoch, self._decay())
            if self.device.type == "cuda":
                try:
                    step.capture(pool)
                    pool = step.graph.pool()
                except RuntimeError:
                    torch.cuda.synchronize()
                    self.log(event="no CUDA graph", error=traceback.format_exc()[-800:])
            steps.append(step)
        assert steps[0] is not None
        return steps[0], steps[1]

    def _step(self, stage: Stage, penalised: bool) -> TrainingStep:
        return TrainingStep(
            self.task, self.recipe, stage, self.data, self.model, self.average, self.optimizer,
            self.bf16, penalised,
        )  # fmt: skip

    def _prepare(self, stage: Stage, rows: Tensor) -> None:
        """Choose the map's kernels: compiled where that works and agrees with the plain ones."""
        dtype = torch.bfloat16 if self.bf16 else None
        if self.compiled:
            try:
                self._compare(stage, rows, dtype)
            except Exception:  # a compiler fails in many ways, none of which is worth a run
                self.log(event="map not compiled", error=traceback.format_exc()[-800:])
                self.compiled = False
        self.model.use_training_kernels(self.compiled, dtype)

    def _compare(self, stage: Stage, rows: Tensor, dtype: torch.dtype | None) -> None:
        """Hold the compiled map against the plain one, both against float32, on one batch.

        In bfloat16 two right implementations differ by their rounding, by much for fresh weights:
        what matters is that the compiled one is no farther from float32 than the plain one.

        Raises:
            RuntimeError: it is farther.
        """
        start = time.monotonic()
        exact_loss, exact_gradient = self._gradient(stage, rows, False, None)
        losses, gradients = [], []
        for compiled in (False, True):
            loss, gradient = self._gradient(stage, rows, compiled, dtype)
            losses.append(loss)
            gradients.append(gradient)
        cosines = [_cosine(gradient, exact_gradient) for gradient in gradients]
        self.log(
            event="compiled map",
            losses=[exact_loss, *losses],
            cosines=cosines,
            worst=self._worst_parameter(exact_gradient, *gradients),
            seconds=round(time.monotonic() - start, 1),
        )
        is_near = abs(losses[1] - losses[0]) <= CHECK_LOSS * losses[0]
        if not (is_near and cosines[1] >= cosines[0] - CHECK_COSINE):
            raise RuntimeError("the compiled map disagrees with the plain one")

    def _worst_parameter(self, exact: Tensor, plain: Tensor, compiled: Tensor) -> dict[str, Any]:
        """The parameter whose compiled gradient is farthest from float32's, and both cosines."""
        named_sizes = [
            (name, p.numel()) for name, p in self.model.named_parameters() if p.requires_grad
        ]
        sizes = [size for _, size in named_sizes]
        cosines = []
        for (name, _), e, a, b in zip(
            named_sizes, exact.split(sizes), plain.split(sizes), compiled.split(sizes), strict=True
        ):
            if e.any():
                cosines.append((_cosine(b, e), name, _cosine(a, e)))
        if not cosines:
            return {}
        of_compiled, name, of_plain = min(cosines)
        return {"parameter": name, "cosines": [round(of_plain, 5), round(of_compiled, 5)]}

    def _gradient(
        self, stage: Stage, rows: Tensor, compiled: bool, dtype: torch.dtype | None
    ) -> tuple[float, Tensor]:
        """Loss and gradient of a batch; weights, buffers and random numbers stay as they were."""
        self.model.use_training_kernels(compiled, dtype)
        step = self._step(stage, False)
        step.bf16 = dtype is not None
        state_before = [t.detach().clone() for t in (*self.model.buffers(), *self.data.tensors())]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            loss = step.loss(rows.chunk(self.recipe.accumulate)[0])
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for tensor, tensor_before in zip(
                (*self.model.buffers(), *self.data.tensors()), state_before, strict=True
            ):
                tensor.copy_(tensor_before)
        filled_gradients = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters, gradients, strict=True)
        ]
        return float(loss.detach()), torch.cat([g.flatten().float() for g in filled_gradients])

    # Reports.

    def evaluate(self, stage: Stage) -> dict[str, float]:
        """Validation figures of the kept weights, logged; on fewer samples in a short run."""
        start = time.monotonic()
        is_last = self.budget.stage is None
        # Evaluations of the map cost about as much here as in training.
        share = EVALUATION_SHARE[is_last]
        if self.history.best is not None:  # all validations are of one size then
            share = max(EVALUATION_SHARE[False], EVALUATION_SHARE[True] / len(self.recipe.stages))
        most_evaluations = share * self.budget.seconds * self.evaluation_rate
        most_evaluations *= self.task.sample_size(stage)
        steps = self.model.resolve_solver().max_steps
        samples = max(2, min(self.recipe.evaluation.samples, round(most_evaluations / steps)))
        if self.history.best is not None:
            samples = self.history.best.samples = self.history.best.samples or samples
        # Samples leave the batch as they converge: cuDNN would try its kernels at every new size.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            figures = self.history.validate(self.task, self.averaged(), stage, samples, self.count)
        metrics = {f"eval_{key}": value for key, value in figures.items()}
        self.log(**metrics, eval_samples=samples, pflop=self.history.pflop)
        # A deadline leaves room for another one, and for writing the weights.
        self.reserve = max(self.reserve, 1.5 * (time.monotonic() - start) + 5)
        return figures

    def log(self, **entry: Any) -> None:
        """Append one line to metrics.jsonl, and show it where there is no bar."""
        line = append_metrics(self.out / "metrics.jsonl", self.count, entry)
        if self.progress:
            tqdm.write(line)

    def _tell(
        self,
        steps: list[TrainingStep],
        n: int,
        start: float,
        stage: Stage,
        good_state: list[Tensor],
    ) -> list[Tensor]:
        """Log the steps since `start`; a run that has diverged goes back to `good_state`.

        Returns:
            The snapshot to go back to from here.
        """
        sums: dict[str, float] = {}
        for step in steps:
            for key, value in step.read(n).items():
                sums[key] = sums.get(key, 0.0) + value
        products = sum(step.products for step in steps) / n
        seconds = time.monotonic() - start
        evaluations = self._evaluations(stage, sums["solver_steps"], products)
        self.evaluation_rate = n * self._batch * evaluations / seconds
        per_evaluation, rest_flops = self.flop_table[self.stage_number]
        self.history.spent += n * self._batch * (evaluations * per_evaluation + 3 * rest_flops)
        for step in steps:
            step.products = 0
        skipped_share = sums.pop("skipped")
        if skipped_share:
            sums["skipped"] = skipped_share
        if "jacobian_penalty" in sums and stage.jacobian is not None:
            sums["jacobian_penalty"] *= stage.jacobian.every
        self.log(
            epoch=round(self.epochs, 3),
            stage=self.stage_number,
            progress=round(self.budget.progress, 4),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            samples_per_second=round(n * self._batch / seconds, 1),
            evaluations=round(evaluations, 2),
            pflop=self.history.pflop,
            **{key: round(value, 5) for key, value in sums.items()},
        )
        if skipped_share < DIVERGED:
            return steps[0].snapshot()
        steps[0].restore(good_state)
        if self.n_slowdowns == MAX_SLOWDOWNS:
            self.failure = (
                f"{self.recipe.name} diverges, even with {0.5**MAX_SLOWDOWNS:g} of its learning "
                f"rate: most gradients are not finite. {self.out}/model holds the last good "
                "weights: lower optimizer.lr, set optimizer.clip, or give the stage more solver "
                "steps"
            )
        else:
            self._slow_down(1)
        self.log(event="diverged", learning_rate_factor=0.5**self.n_slowdowns)
        return good_state

    def _slow_down(self, times: int) -> None:
        self.n_slowdowns += times
        self.base_rates = [rate * 0.5**times for rate in self.base_rates]

    def _evaluations(self, stage: Stage, n_steps: float, products: float) -> float:
        """Evaluations of the map that a step cost on average, backward passes included."""
        fixed = self.model.takes_fixed_steps(stage.solver, stage.gradient)
        steps = n_steps / self.task.solves
        evaluations = step_evaluations(self.model, stage, steps, fixed=fixed, products=products)
        if stage.jacobian:
            evaluations += PENALTY_EVALUATIONS / stage.jacobian.every
        return evaluations

    def _age(self) -> float:
        return time.monotonic() - self.start


def _cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two long vectors; in float32, sums of millions of squares are off by 1e-3."""
    return float(F.cosine_similarity(a.double(), b.double(), dim=0))
