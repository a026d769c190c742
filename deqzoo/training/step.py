"""One optimiser step on tensors that stay where they are: it never waits for the device.

A step reads which rows to take and how much to average from static tensors, forwards, goes
backward, updates and averages. On a GPU it is captured in a CUDA graph where that is possible.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deqzoo.recipe import Recipe, Stage
from deqzoo.tasks.base import Resident, Task
from deqzoo.training.trainer import backward_products, penalty_of

FIGURES = ("loss", "right", "solver_steps", "solver_residual", "jacobian_penalty", "skipped")
"""What a step adds up on the device; a run reads the sums now and then."""


class TrainingStep:
    """A stage's step, with or without its Jacobian penalty.

    Args:
        task: gives the loss.
        recipe: batch size, accumulation, clipping.
        stage: solver, gradient, resolution, penalty.
        data: the training data on the device.
        model: what is trained.
        average: a copy that receives the moving average, or None.
        optimizer: steps on `p.grad`.
        bf16: forward under autocast.
        penalised: add the stage's Jacobian penalty.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        stage: Stage,
        data: Resident,
        model: PreTrainedModel,
        average: PreTrainedModel | None,
        optimizer: torch.optim.Optimizer,
        bf16: bool,
        penalised: bool = False,
    ) -> None:
        self.task, self.recipe, self.stage, self.data = task, recipe, stage, data
        self.model, self.average, self.optimizer = model, average, optimizer
        self.bf16, self.jacobian = bf16, stage.jacobian if penalised else None
        device = model.device
        self.rows: Tensor | None = None
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.forget = torch.ones((), device=device)
        """1 minus the decay of the average, filled in before every step."""
        self.sums = {name: torch.zeros((), device=device) for name in FIGURES}
        self.figure_names: set[str] = set()
        """Which of the sums the task fills: a language model counts no right answers."""
        self.figure_names.add("skipped")
        self.products = 0
        """Vector-Jacobian products of implicit gradients since the last reading."""
        self.graph: Any = None
        self.pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
        if average is not None:
            model_tensors = [*model.parameters(), *model.buffers()]
            average_tensors = [*average.parameters(), *average.buffers()]
            pairs = [
                (a, b)
                for a, b in zip(average_tensors, model_tensors, strict=True)
                if a.is_floating_point()
            ]
            self.pairs = [a for a, _ in pairs], [b for _, b in pairs]

    def set(self, rows: Tensor, epoch: int, decay: float) -> None:
        """Say what the next step works on."""
        if self.rows is None:
            self.rows = rows.clone()
        self.rows.copy_(rows)
        self.epoch.fill_(epoch)
        self.forget.fill_(1 - decay)

    def __call__(self) -> None:
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def run(self) -> None:
        """The step itself, on whatever the static tensors hold."""
        assert self.rows is not None
        self.optimizer.zero_grad(set_to_none=True)
        statistics = [b for b in self.model.buffers() if b.is_floating_point()]
        statistics_before = [b.clone() for b in statistics]
        parts = self.rows.chunk(self.recipe.accumulate)
        for rows in parts:
            loss = self.loss(rows)
            (loss / len(parts) if len(parts) > 1 else loss).backward()
            self.products += backward_products(self.model)
        not_finite = self._bound_gradient()
        for buffer, old in zip(statistics, statistics_before, strict=True):
            buffer.copy_(torch.where(not_finite, old, buffer))
        self.optimizer.step()
        project = getattr(self.model, "project_", None)  # of weights with a norm bound
        if project is not None:
            project()
        self._average()

    @torch.no_grad()
    def _bound_gradient(self) -> Tensor:
        """Clip the gradient; one that is not finite becomes zero, and the step counts as skipped.

        Otherwise one such batch would end a run: its gradient reaches all weights.

        Returns:
            Whether the gradient was not finite, a tensor on the device.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.recipe.optimizer.clip:
            parameters = self.model.parameters()
            torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.optimizer.clip, norm)
        not_finite = ~norm.isfinite()
        for gradient in gradients:
            gradient.masked_fill_(not_finite, 0.0)
        self.sums["skipped"].add_(not_finite)
        return not_finite

    def loss(self, rows: Tensor) -> Tensor:
        """Loss of some rows with its graph; what is worth logging is added up."""
        inputs = self.data.inputs(rows, self.epoch, self.stage)
        arguments = self.stage.arguments()
        if self.jacobian is not None:
            arguments["output_state"] = True
        with self._autocast():
            outputs = self.model(**self.task.forward_inputs(inputs), **arguments)
            loss = self.task.loss(outputs, inputs)
            figures = {"loss": loss.detach()}
            for name, value in (("steps", outputs.n_steps), ("residual", outputs.residual)):
                if value is not None:
                    figures[f"solver_{name}"] = value.detach().float().mean()
            if outputs.logits is not None and inputs["labels"].shape == outputs.logits.shape[:-1]:
                right = outputs.logits.detach().argmax(-1) == inputs["labels"]
                figures["right"] = right.sum() / (inputs["labels"] >= 0).sum()
            if self.jacobian is not None:
                penalty = penalty_of(outputs, self.jacobian)
                figures["jacobian_penalty"] = penalty.detach()
                loss = loss + self.jacobian.weight * penalty
        self.data.keep(outputs)
        self.figure_names |= figures.keys()
        with torch.no_grad():
            for name, value in figures.items():
                self.sums[name].add_(value.float())
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        kind = self.model.device.type
        if not self.bf16 or kind == "meta":  # meta tensors have no autocast
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=torch.bfloat16)

    @torch.no_grad()
    def _average(self) -> None:
        average_tensors, model_tensors = self.pairs
        if average_tensors:
            # A foreach lerp would read a weight that is a tensor on the host.
            change = torch._foreach_sub(model_tensors, average_tensors)
            torch._foreach_mul_(change, self.forget)
            torch._foreach_add_(average_tensors, change)

    def capture(self, pool: Any = None, warm: int = 3) -> None:
        """Capture the step in a CUDA graph, after some steps that are undone again.

        Args:
            pool: memory of another graph that never runs at the same time.
            warm: steps before the capture, for kernels that choose or compile themselves.

        Raises:
            RuntimeError: something in the step cannot be captured.
        """
        snapshot = self.snapshot()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.run()
        finally:
            self.restore(snapshot)
            self.products = 0
        self.graph = graph

    def snapshot(self) -> list[Tensor]:
        """Copies of everything that a step changes."""
        return [t.detach().clone() for t in self.state_tensors()]

    @torch.no_grad()
    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Go back to a snapshot; memory of the optimiser that is younger starts from zero."""
        tensors = self.state_tensors()
        for tensor, old in zip(tensors, snapshot, strict=False):
            tensor.copy_(old)
        for tensor in tensors[len(snapshot) :]:
            tensor.zero_()

    def state_tensors(self) -> list[Tensor]:
        """Everything that a step changes, the optimiser's memory last."""
        tensors: list[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        if self.average is not None:
            tensors += [*self.average.parameters(), *self.average.buffers()]
        tensors += [*self.sums.values(), *self.data.tensors()]
        tensors += [g["step"] for g in self.optimizer.param_groups if "step" in g]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return tensors

    def read(self, steps: int) -> dict[str, float]:
        """Means since the last reading; the only place that waits for the device.

        "skipped" is a share of the steps.
        """
        values = torch.stack(list(self.sums.values())).tolist()
        for total in self.sums.values():
            total.zero_()
        parts = max(1, steps * self.recipe.accumulate)
        means = {name: value / parts for name, value in zip(self.sums, values, strict=True)}
        means["skipped"] *= self.recipe.accumulate
        return {name: mean for name, mean in means.items() if name in self.figure_names}
