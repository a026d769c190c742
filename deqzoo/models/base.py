"""What the families share: solver and gradient settings, from config, model and call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from deqzoo.equilibrium import (
    Gradient,
    Layout,
    Solution,
    Solver,
    Status,
    fixed_point,
    jacobian_penalty,
    make_gradient,
    make_solver,
    spectral_radius,
)
from deqzoo.equilibrium.solvers import BackwardReport
from deqzoo.equilibrium.state import State

logger = logging.get_logger(__name__)

Settings = Mapping[str, Any] | str | Solver | Gradient | None
"""Per-call settings: a name, a dict merged over the model's own, a whole solver or gradient, or
None for the model's own."""


def merge_settings(own: Mapping[str, Any], change: Settings, shared: tuple[str, ...]) -> dict:
    """Lay a change of settings over a model's own ones.

    A dict without "name" changes single settings. Another name starts from that choice's
    defaults, except that the `shared` settings, which mean the same for every choice, stay.

    Raises:
        ValueError: the change is none of what `Settings` names.
    """
    if change is None:
        return dict(own)
    if isinstance(change, (Solver, Gradient)):
        return change.to_dict()
    if not isinstance(change, (str, Mapping)):
        raise ValueError(
            f"settings are a name, a dict, or a solver or gradient, not {type(change).__name__}"
        )
    changed = {"name": change} if isinstance(change, str) else dict(change)
    if changed.get("name", own["name"]) == own["name"]:
        return {**own, **changed}
    return {**{key: own[key] for key in shared if key in own}, **changed}


SHARED_BY_SOLVERS = ("max_steps", "tol", "stop_mode", "check_every", "patience")


class DEQConfigMixin:
    """Settings of the equilibrium, in every family's config.

    Declare `solver: dict | None = None` and `gradient: dict | None = None` in the config class,
    set the class's defaults below, and call `complete_equilibrium()` in `__post_init__`.
    """

    default_solver: dict[str, Any] = {"name": "anderson", "max_steps": 30, "tol": 1e-3}
    default_gradient: dict[str, Any] = {"name": "upg", "steps": 5, "damping": 0.5}

    solver: dict | None
    gradient: dict | None

    def complete_equilibrium(self) -> None:
        """Fill in and check the settings.

        Raises:
            ValueError: unknown name or option, or a value out of range.
        """
        solver = merge_settings(self.default_solver, self.solver, SHARED_BY_SOLVERS)
        gradient = merge_settings(self.default_gradient, self.gradient, ())
        self.solver = make_solver(solver).to_dict()
        self.gradient = make_gradient(gradient).to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, which replaces a stored value by a keyword of `from_pretrained`.

        Here `from_pretrained(name, solver={"max_steps": 50})` changes single settings of the
        stored solver, and likewise of the gradient.
        """
        changes = {key: kwargs.pop(key) for key in ("solver", "gradient") if key in kwargs}
        return super().from_dict(cls.merged(config_dict, changes), **kwargs)

    @classmethod
    def merged(cls, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Lay changes over settings; those of `solver` and `gradient` one by one."""
        result = {**settings, **changes}
        for key, shared in (("solver", SHARED_BY_SOLVERS), ("gradient", ())):
            own = settings.get(key) or getattr(cls, f"default_{key}")
            if changes.get(key) is not None:
                result[key] = merge_settings(own, changes[key], shared)
            elif key in changes:
                result[key] = settings.get(key)
        return result


class DEQPreTrainedModel(PreTrainedModel):
    """Base of all families: owns how an equilibrium is solved and differentiated."""

    config: PreTrainedConfig
    supports_gradient_checkpointing = True
    _warned_unsolved = False
    solver_seconds = 0.0  # wall time in solvers so far; training logs its share
    backward_report: BackwardReport | None = None  # of the newest solve; its backward fills it in

    def set_solver(self, name: str | None = None, **settings: Any) -> None:
        """Change the solver from now on (stored in the config).

        Args:
            name: solver; None keeps it and changes single settings.
            settings: `max_steps`, `tol`, `stop_mode`, `damping`, and the solver's own.

        Raises:
            ValueError: unknown name or option, or a value out of range.
        """
        change = settings if name is None else {"name": name, **settings}
        self.config.solver = self._solver(change)

    def set_gradient(self, name: str | None = None, **settings: Any) -> None:
        """Change the gradient from now on (stored in the config).

        Raises:
            ValueError: unknown name or option, or a value out of range.
        """
        change = settings if name is None else {"name": name, **settings}
        self.config.gradient = self._gradient(change)

    def _solver(self, change: Settings) -> dict[str, Any]:
        own = self.config.solver
        return make_solver(merge_settings(own, change, SHARED_BY_SOLVERS)).to_dict()

    def _gradient(self, change: Settings) -> dict[str, Any]:
        return make_gradient(merge_settings(self.config.gradient, change, ())).to_dict()

    def solve(
        self,
        f: Callable[[State], State],
        z0: State,
        layout: Layout | None = None,
        solver: Settings = None,
        gradient: Settings = None,
        **options: Any,
    ) -> Solution:
        """Solve h = f(h) with this model's settings and give it the model's backward pass.

        Args:
            f: the map, bound to its inputs.
            z0: start.
            layout: what one independent sample is.
            solver: change for this call.
            gradient: change for this call.
            options: `trace`, `callback`, `sample_steps`, `compact` of `fixed_point`.

        Raises:
            ValueError: unknown settings; or gradient checkpointing is on in training and the
                gradient records the map only once (implicit, npg, jfb), so that it saves nothing.
        """
        solution = fixed_point(
            f,
            z0,
            solver=self._solver(solver),
            gradient=self._gradient(gradient),
            layout=layout,
            checkpoint=self._recomputing,
            **options,
        )
        self.solver_seconds += solution.seconds
        self.backward_report = solution.backward
        self._warn_unsolved(solution)
        return solution

    @property
    def _recomputing(self) -> bool:
        """Whether the steps being recorded are recomputed in the backward pass."""
        wanted = bool(getattr(self, "gradient_checkpointing", False))
        return wanted and self.training and torch.is_grad_enabled()

    def iterate(self, f: Callable[[State], State], state: State, n: int) -> tuple[State, State]:
        """Apply a map n ≥ 1 times, differentiably; return the last state but one, and the last."""
        previous = state
        for _ in range(n):
            previous = state
            state = recompute(f, state, use_reentrant=False) if self._recomputing else f(state)
        return previous, state

    def jacobian_loss(
        self,
        f: Callable[[State], State],
        state: State,
        n_probes: int = 1,
        probes: Sequence[State] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Estimate of ‖∂F/∂h‖²_F / d at a state, the mean over the batch, to add to the loss.

        Args:
            f, state: `equilibrium_map` and `state` of an output made with `output_state=True`.
            n_probes: random vectors per sample.
            probes: those vectors, shaped like the state, instead of random ones.
            generator: source of the random vectors.
        """
        return jacobian_penalty(f, state, n_probes, probes, generator)

    def spectral_radius(
        self,
        f: Callable[[State], State],
        state: State,
        n_iter: int = 60,
        estimator: Literal["growth", "rayleigh"] = "growth",
        v0: State | None = None,
        generator: torch.Generator | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Spectral radius of ∂F/∂h per sample, (B,); see `deqzoo.equilibrium.spectral_radius`."""
        return spectral_radius(f, state, n_iter, estimator, v0, generator, layout)

    def _warn_unsolved(self, solution: Solution) -> None:
        """Say once per model that a solve ended early; training logs the share of such samples."""
        if self._warned_unsolved or self.training or torch.compiler.is_compiling():
            return
        unsolved = solution.status != Status.CONVERGED
        if solution.status.device.type != "cpu" or not bool(unsolved.any()):
            return
        self._warned_unsolved = True
        logger.warning(
            f"{int(unsolved.sum())} of {unsolved.numel()} equilibria did not reach the tolerance "
            f"(largest residual {float(solution.residual.max()):.1e}); raise max_steps with "
            "set_solver(max_steps=...) or read `converged` of the output. This is said once."
        )


def per_sample(solution: Solution) -> dict[str, Tensor]:
    """The report that every model output carries: n_steps, residual, converged."""
    return {
        "n_steps": solution.n_steps,
        "residual": solution.residual,
        "converged": solution.converged,
    }
