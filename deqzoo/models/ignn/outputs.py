"""What the IGNN classes return, and the solver's report over several layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from deqzoo.equilibrium import Solution


@dataclass
class IGNNModelOutput(ModelOutput):
    """Node states and the solver's report; G graphs with n nodes together.

    Args:
        last_hidden_state: (n, m), what the last layer gives.
        n_steps: updates of the state, summed over the layers, int64 (G,).
        residual: largest residual of the layers in the solver's stop mode, (G,).
        converged: whether every layer's is below the tolerance, bool (G,).
        hidden_states: the equilibrium of each layer, (n, m_i), with `output_hidden_states=True`.
    """

    last_hidden_state: Tensor | None = None
    n_steps: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class IGNNClassifierOutput(ModelOutput):
    """Logits, (G, num_labels) of graphs or (n, num_labels) of nodes, the loss when labels were
    given, and the report of `IGNNModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    n_steps: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def combined_report(x: Tensor, solutions: list[Solution], keep_states: bool) -> IGNNModelOutput:
    """Return the output of a stack with final states x (n, m), from its layers' solutions."""
    return IGNNModelOutput(
        last_hidden_state=x,
        n_steps=torch.stack([s.n_steps for s in solutions]).sum(0),
        residual=torch.stack([s.residual for s in solutions]).amax(0),
        converged=torch.stack([s.converged for s in solutions]).all(0),
        hidden_states=tuple(s.state.detach() for s in solutions) if keep_states else None,
    )


def joined_solution(
    solutions: Sequence[Solution], rows: Sequence[Tensor], numbers: Sequence[Tensor]
) -> Solution:
    """Return the solution of a batch from those of its parts.

    Args:
        solutions: of the parts.
        rows: per part the nodes (n_i,) int64 that it holds.
        numbers: per part its graphs (G_i,) int64.
    """
    order = torch.cat(list(numbers)).argsort()
    names = ("status", "n_steps", "abs_residual", "rel_residual", "residual")
    books: dict[str, Any] = {
        name: torch.cat([getattr(s, name) for s in solutions])[order] for name in names
    }
    return replace(
        solutions[0],
        state=torch.cat([s.state for s in solutions])[torch.cat(list(rows)).argsort()],
        n_evals=sum(s.n_evals for s in solutions),
        row_evals=sum(s.row_evals for s in solutions),
        seconds=sum(s.seconds for s in solutions),
        **books,
    )


def extended_report(base: IGNNModelOutput, solution: Solution) -> IGNNModelOutput:
    """Return the output of a stack, its report extended in place by one more layer."""
    assert base.n_steps is not None and base.residual is not None and base.converged is not None
    base.n_steps = base.n_steps + solution.n_steps
    base.residual = torch.maximum(base.residual, solution.residual)
    base.converged = base.converged & solution.converged
    if base.hidden_states is not None:
        base.hidden_states = (*base.hidden_states, solution.state.detach())
    return base
