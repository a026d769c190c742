"""Constraints on weights that keep an equilibrium well posed, kept through training."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback


class ProjectionCallback(TrainerCallback):
    """Projects a model's weights onto its constraint after each optimiser step of a `Trainer`.

    For models with a method `project_`, as those of the IGNN family; `DEQTrainer` adds it itself.
    Where the bound depends on the graphs, the largest spectral radius so far is shared by all
    processes, whose weights would drift apart, and kept in the checkpoint's `trainer_state.json`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _project(kwargs["model"], args.device, state.stateful_callbacks)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _project(kwargs["model"], args.device, state.stateful_callbacks)


_KEY = "ProjectionCallback"


def _project(model: Any, device: torch.device, callback_states: dict[str, Any]) -> None:
    """Project after bringing `largest_radius` up to that of all processes and of the checkpoint."""
    model = getattr(model, "module", model)
    base = getattr(model, "base_model", model)
    if getattr(base, "largest_radius", None) is not None:
        # In the form of transformers' ExportableState, which Trainer can be told to read itself.
        stored_radius = (
            callback_states.get(_KEY, {}).get("attributes", {}).get("largest_radius", 0.0)
        )
        radius = torch.tensor(
            max(base.largest_radius, stored_radius), dtype=torch.float64, device=device
        )
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(radius, op=distributed.ReduceOp.MAX)
        base.largest_radius = float(radius)
        attributes = {"largest_radius": base.largest_radius}
        callback_states[_KEY] = {"args": {}, "attributes": attributes}
    model.project_()
