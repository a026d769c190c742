"""What the families share: solver and gradient settings, from config, model and call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from deqzoo.equilibrium import (
    GRADIENTS,
    SOLVERS,
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
from deqzoo.equilibrium.fixed import fixed_point_of_steps, has_fixed_steps
from deqzoo.equilibrium.solvers import BackwardReport
from deqzoo.equilibrium.state import State, leaves
from deqzoo.equilibrium.uncompiled import uncompiled
from deqzoo.errors import UserError
from deqzoo.models.coarse import solve_from_coarse
from deqzoo.models.weights import WeightNorm, normalised_parts
from deqzoo.sealed import require_inside, require_weights_as_sealed
from deqzoo.zoo import bundled_source

logger = logging.get_logger(__name__)

_LOADING = threading.RLock()

Settings = Mapping[str, Any] | str | Solver | Gradient | None
"""Per-call settings: a name, a dict merged over the model's own, a whole solver or gradient (of a
class of your own too), or None for the model's own."""


def merge_settings(own: Mapping[str, Any], change: Settings, shared_keys: tuple[str, ...]) -> Any:
    """Lay a change of settings over a model's own ones; a whole solver or gradient replaces them.

    A dict without "name" changes single settings. Another name starts from that method's defaults,
    except that the settings in `shared_keys`, which mean the same for all methods, stay.

    Raises:
        ValueError: the change is no `Settings`.
    """
    if change is None:
        return dict(own)
    if isinstance(change, (Solver, Gradient)):
        return change
    if not isinstance(change, (str, Mapping)):
        raise ValueError(
            f"settings are a name, a dict, or a solver or gradient, not {type(change).__name__}"
        )
    changes = {"name": change} if isinstance(change, str) else dict(change)
    if changes.get("name", own["name"]) == own["name"]:
        return {**own, **changes}
    return {**{key: own[key] for key in shared_keys if key in own}, **changes}


def joined_settings(name: Settings, settings: Mapping[str, Any]) -> Settings:
    """One change of settings: a name, dict, solver or gradient, with single settings over it."""
    if name is None:
        return settings
    if isinstance(name, (Solver, Gradient)):
        return replace(name, **settings) if settings else name
    return {"name": name, **settings} if isinstance(name, str) else {**name, **settings}


def stored_settings(method: Solver | Gradient) -> dict[str, Any]:
    """Settings as a config keeps them.

    Raises:
        ValueError: a class that a config could not find again by its name.
    """
    registry: Mapping[str, type] = SOLVERS if isinstance(method, Solver) else GRADIENTS
    if registry.get(method.name) is not type(method):
        where = "SOLVERS" if isinstance(method, Solver) else "GRADIENTS"
        raise ValueError(
            f"{type(method).__name__} cannot be kept in a config, which finds it by name only: set "
            f"deqzoo.equilibrium.{where}[{method.name!r}] = {type(method).__name__} first, or pass "
            "it to single calls"
        )
    return method.to_dict()


SHARED_BY_SOLVERS = ("max_steps", "tol", "stop_mode", "criterion", "check_every", "patience")


class DEQConfigMixin:
    """Settings of the equilibrium, in every family's config.

    Declare `solver: dict | str | Solver | None = None` and likewise `gradient` in the config class,
    set the class's defaults below, and call `complete_equilibrium()` in `__post_init__`: from then
    on both are dicts of all settings.
    """

    default_solver: dict[str, Any] = {"name": "anderson", "max_steps": 30, "tol": 1e-3}
    default_gradient: dict[str, Any] = {"name": "upg", "steps": 5, "damping": 0.5}

    solver: Any
    gradient: Any

    def complete_equilibrium(self) -> None:
        """Fill in and check the settings.

        Raises:
            ValueError: unknown name or option, or a value out of range.
        """
        solver = merge_settings(self.default_solver, self.solver, SHARED_BY_SOLVERS)
        gradient = merge_settings(self.default_gradient, self.gradient, ())
        self.solver = stored_settings(make_solver(solver))
        self.gradient = stored_settings(make_gradient(gradient))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; the zoo's names are known too."""
        source = bundled_source(pretrained_model_name_or_path, kwargs.get("revision"))
        config: Any = super()
        return config.from_pretrained(source, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, which replaces a stored value by a keyword of `from_pretrained`.

        Here `from_pretrained(name, solver={"max_steps": 50})` changes single settings of the
        stored solver, and likewise of the gradient.

        Raises:
            StrictDataclassError: settings that contradict each other, or a value out of range.
        """
        names = ("solver", "gradient")
        changes: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        config: Any = super()
        result = config.from_dict(cls.merged(config_dict, changes), **kwargs)
        # The other keywords were set one by one, on a configuration that had been checked before.
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    @classmethod
    def merged(cls, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Lay changes over settings; those of `solver` and `gradient` one by one."""
        result = {**settings, **changes}
        for key, shared_keys in (("solver", SHARED_BY_SOLVERS), ("gradient", ())):
            own = settings.get(key) or getattr(cls, f"default_{key}")
            if changes.get(key) is not None:
                result[key] = merge_settings(own, changes[key], shared_keys)
            elif key in changes:
                result[key] = settings.get(key)
        return result


def _remove_older_weights(folder: Path) -> None:
    """Of weights in one file beside an index of shards, remove those of an earlier save.

    Saving removes the shards of an earlier save, but neither their index nor a single file.
    """
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if not (single.is_file() and index.is_file()):
        return
    shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    are_there = all((folder / name).is_file() for name in shards)
    (single if are_there else index).unlink()


class DEQPreTrainedModel(PreTrainedModel):
    """Base of all families: owns how an equilibrium is solved and differentiated."""

    config: PreTrainedConfig
    base_model: Any
    supports_gradient_checkpointing = True
    # Finest relative tolerance of states narrower than float32, in units of their dtype's eps:
    # below, the rounding of F alone decides whether a residual meets it, and most never do.
    narrow_tol_in_eps = 3.0
    without_weight_norm: Any = None  # what `config.weight_norm` is after `fold_weight_norm`
    _warned_unsolved = False
    _warned_narrow = False
    fixed_steps = False  # see `use_fixed_steps`
    inference_kernels = True  # see `use_inference_kernels`
    solver_seconds = 0.0  # wall time in solvers so far; training logs its share
    backward_report: BackwardReport | None = None  # of the newest solve; its backward fills it in

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; the zoo's names are known too.

        From safetensors alone, and one at a time in a process:
        transformers replaces a method of all models while it loads one, which two loads at once
        would leave replaced for ever.

        Raises:
            UserError: links lead out of a folder, its weights are not as its SHA256SUMS say, or
                they hold numbers that are not finite; or code of the repository is asked for.
        """
        if kwargs.pop("trust_remote_code", None):
            raise UserError("no code of a repository is ever run here; leave trust_remote_code out")
        if kwargs.setdefault("use_safetensors", True) is False:
            raise UserError("weights load from safetensors only; `deqzoo convert` reads a pickle")
        source = bundled_source(pretrained_model_name_or_path, kwargs.get("revision"))
        inside = kwargs.get("subfolder") or ""
        folder = None if source is None else Path(source, inside)
        if folder is not None and folder.is_dir():
            require_inside(folder)
            require_weights_as_sealed(folder)
        with _LOADING:
            result = super().from_pretrained(source, *args, **kwargs)
        _require_finite(result[0] if isinstance(result, tuple) else result, source)
        return result

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As transformers' own.

        Layers whose weight was replaced, which ends their normalisation, are written as the config
        says; and weights in one file and in shards never lie side by side, of which a loader would
        take the one file, however old.
        """
        folded = {n: m for n, m in self.named_modules() if hasattr(m, "folded_from")}
        if folded and self.config.weight_norm != self.without_weight_norm:
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            for name, module in folded.items():
                weight = state_dict.pop(f"{name}.weight", None)
                if weight is not None:
                    direction, lengths = normalised_parts(weight, otherwise=1.0)
                    state_dict[f"{name}.direction"] = direction
                    state_dict[f"{name}.{module.folded_from.length_name}"] = lengths
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            _remove_older_weights(Path(save_directory))

    def set_solver(self, name: Settings = None, **settings: Any) -> None:
        """Change the solver from now on (stored in the config).

        Args:
            name: solver, or a dict of settings; None keeps it and changes single settings.
            settings: `max_steps`, `tol`, `stop_mode`, `damping`, and the solver's own.

        Raises:
            ValueError: unknown name or option, a value out of range, or a solver of a class of
                your own that is not in `deqzoo.equilibrium.SOLVERS`.
        """
        self.config.solver = stored_settings(self.resolve_solver(joined_settings(name, settings)))

    def set_gradient(self, name: Settings = None, **settings: Any) -> None:
        """Change the gradient from now on (stored in the config).

        Args:
            name: gradient, or a dict of settings; None keeps it and changes single settings.
            settings: of the gradient.

        Raises:
            ValueError: unknown name or option, a value out of range, or a gradient of a class of
                your own that is not in `deqzoo.equilibrium.GRADIENTS`.
        """
        self.config.gradient = stored_settings(
            self.resolve_gradient(joined_settings(name, settings))
        )

    def use_fixed_steps(self, enabled: bool = True) -> None:
        """Run training solves with `tol` 0 by `fixed_point_of_steps`, or no longer.

        Such a forward pass never waits for a GPU. Other solvers and gradients, and evaluation mode,
        stay as they are.
        """
        self.base_model.fixed_steps = enabled

    def takes_fixed_steps(self, solver: Settings = None, gradient: Settings = None) -> bool:
        """Whether a solve with these settings would now be one of `fixed_point_of_steps`."""
        applies = self.base_model.fixed_steps and self.training and torch.is_grad_enabled()
        if not applies or self._recomputes:
            return False
        return has_fixed_steps(self.resolve_solver(solver), self.resolve_gradient(gradient))

    def use_training_kernels(
        self, compiled: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Prepare the map for training on the device the model is on: fixed steps where `tol` is 0.

        Args:
            compiled: run the map under torch.compile, where the family offers it.
            dtype: precision of the map in training, where the family offers it; None: autocast's.
        """
        self.use_fixed_steps()

    def use_inference_kernels(self, enabled: bool = True) -> None:
        """Let forwards without gradients take the CPU's fast path (the default), or no longer.

        The environment variable DEQZOO_PLAIN_INFERENCE=1 switches it off for all models.
        `inference_path` describes it.
        """
        self.base_model.inference_kernels = enabled

    def inference_path(self, solver: Settings = None) -> str:
        """The kernels that a forward in evaluation mode without gradients now takes, in words."""
        return "plain"

    def fold_weight_norm(self) -> None:
        """Turn weight-normalised layers into plain ones with the same weights, for good.

        The outputs stay. For tools that need a parameter called `weight`: pruning, quantisation.
        Training goes on without the normalisation.
        """
        for module in self.modules():
            if isinstance(module, WeightNorm):
                module.fold()
        if self.without_weight_norm is not None:
            self.config.weight_norm = self.without_weight_norm

    def resolve_solver(self, change: Settings = None) -> Solver:
        """The solver that a call with these settings uses: the config's own, with the change."""
        own = self._own_settings("solver", SHARED_BY_SOLVERS)
        return make_solver(merge_settings(own, change, SHARED_BY_SOLVERS))

    def resolve_gradient(self, change: Settings = None) -> Gradient:
        """The gradient that a call with these settings uses."""
        return make_gradient(merge_settings(self._own_settings("gradient", ()), change, ()))

    def _own_settings(self, key: str, shared_keys: tuple[str, ...]) -> Any:
        """The config's settings, completed where somebody assigned a name, an object or a part."""
        own = getattr(self.config, key)
        if not isinstance(own, Mapping) or "name" not in own:
            if isinstance(own, (Solver, Gradient)):
                own = stored_settings(own)
            else:
                own = merge_settings(getattr(type(self.config), f"default_{key}"), own, shared_keys)
            setattr(self.config, key, own)
        return own

    def solve(
        self,
        f: Callable[[State], State],
        z0: State,
        layout: Layout | None = None,
        solver: Settings = None,
        gradient: Settings = None,
        coarse: Callable[[State], State] | None = None,
        **options: Any,
    ) -> Solution:
        """Solve h = f(h) with this model's settings and give it the model's backward pass.

        States narrower than float32, those of models loaded in half precision, are solved to 3 eps
        of their dtype at the finest: a relative residual of 0.023 in bfloat16, 0.0029 in float16
        (IGNN's excepted). A tolerance of 0, which asks for all steps, stays.

        Args:
            f: the map, bound to its inputs.
            z0: start.
            layout: what one independent sample is; one per batch entry by default.
            solver: change for this call.
            gradient: change for this call.
            options: `trace`, `callback`, `sample_steps`, `compact` of `fixed_point`.

        Raises:
            ValueError: unknown settings; or gradient checkpointing is on in training and the
                gradient records the map only once (implicit, npg, jfb), so that it saves nothing.
        """
        chosen_solver = self._resolvable(self.resolve_solver(solver), leaves(z0)[0].dtype)
        chosen_gradient = self.resolve_gradient(gradient)
        if not options and self.takes_fixed_steps(chosen_solver, chosen_gradient):
            return fixed_point_of_steps(f, z0, chosen_solver, chosen_gradient, layout)
        if coarse is not None and not options:
            solution = solve_from_coarse(f, coarse, z0, chosen_solver, layout)
        else:
            solution = fixed_point(
                f,
                z0,
                solver=chosen_solver,
                gradient=chosen_gradient,
                layout=layout,
                checkpoint=self._recomputes,
                **options,
            )
        self._note(solution)
        if chosen_solver.tol > 0:  # else steps are asked for, not convergence
            self._warn_unsolved(solution)
        return solution

    @uncompiled  # else torch.compile would make a new graph for every value of the clock
    def _note(self, solution: Solution) -> None:
        self.solver_seconds += solution.seconds
        self.backward_report = solution.backward

    def _resolvable(self, solver: Solver, dtype: torch.dtype) -> Solver:
        """The solver with a tolerance that states of a dtype can meet; says once if it differs."""
        if dtype.itemsize >= 4 or solver.stop_mode != "rel":
            return solver
        finest = self.narrow_tol_in_eps * torch.finfo(dtype).eps
        if solver.tol == 0 or solver.tol >= finest:
            return solver
        if not (self._warned_narrow or self.training or torch.compiler.is_compiling()):
            self._warned_narrow = True
            slow = dtype == torch.float16 and self.device.type == "cpu"
            logger.warning(
                f"{dtype} cannot resolve the tolerance {solver.tol:.1e}; equilibria are solved to "
                f"{finest:.1e}. Load the model in float32 for more"
                f"{', and for speed: CPUs emulate float16' if slow else ''}. This is said once."
            )
        return replace(solver, tol=finest)

    @property
    def _recomputes(self) -> bool:
        """Whether the steps being recorded are recomputed in the backward pass."""
        checkpointing = bool(getattr(self, "gradient_checkpointing", False))
        return checkpointing and self.training and torch.is_grad_enabled()

    def iterate(self, f: Callable[[State], State], state: State, n: int) -> tuple[State, State]:
        """Apply a map n ≥ 1 times, differentiably; return the last state but one, and the last."""
        previous = state
        for _ in range(n):
            previous = state
            state = recompute(f, state, use_reentrant=False) if self._recomputes else f(state)
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
        is_unsolved = solution.status != Status.CONVERGED
        if solution.status.device.type != "cpu" or not bool(is_unsolved.any()):
            return
        self._warned_unsolved = True
        logger.warning(
            f"{int(is_unsolved.sum())} of {is_unsolved.numel()} equilibria did not reach the "
            f"tolerance (largest residual {float(solution.residual.max()):.1e}); raise max_steps "
            "with set_solver(max_steps=...) or read `converged` of the output. This is said once."
        )


#: Keywords that transformers, PEFT and generate() pass to any model, often without effect.
STANDARD_KEYWORDS = frozenset(
    "attention_mask bool_masked_pos cache_position head_mask inputs_embeds is_first_iteration "
    "interpolate_pos_encoding labels num_items_in_batch output_attentions output_hidden_states "
    "output_router_logits past_key_values position_ids return_dict token_type_ids use_cache".split()
)


def require_dense(**values: Any) -> None:
    """Refuse arguments of a forward, by name, that are no dense tensors; None is let through.

    Raises:
        UserError: something else.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise UserError(f"{name} must be a dense tensor, got {value.layout}; use to_dense()")


def check_keywords(model: PreTrainedModel, keywords: Mapping[str, Any]) -> None:
    """Accept standard keywords without effect (None or False), refuse everything else.

    Raises:
        UserError: a standard keyword with a value that this model does not support.
        TypeError: a name that no model knows.
    """
    for name, value in keywords.items():
        if name not in STANDARD_KEYWORDS:
            raise TypeError(f"{type(model).__name__} got an unexpected keyword argument {name!r}")
        if value is None or value is False or name in ("num_items_in_batch", "is_first_iteration"):
            continue
        if name == "output_attentions":
            raise UserError(
                f"{type(model).__name__} keeps no attention weights, since its map is applied many "
                "times; leave output_attentions out"
            )
        raise UserError(f"{type(model).__name__} has no use for {name}; leave it out")


def _require_finite(model: PreTrainedModel, source: Any) -> None:
    """Refuse weights that are not finite.

    Raises:
        UserError: some are infinite or NaN.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    bad = [name for name, t in tensors if t.device.type != "meta" and not t.isfinite().all()]
    if bad:
        raise UserError(
            f"the weights of {source} are damaged: {len(bad)} of their tensors hold numbers that "
            f"are not finite, e.g. {bad[0]}"
        )


def per_sample(solution: Solution) -> dict[str, Tensor]:
    """The report that every model output carries: n_steps, residual, converged."""
    return {
        "n_steps": solution.n_steps,
        "residual": solution.residual,
        "converged": solution.converged,
    }
