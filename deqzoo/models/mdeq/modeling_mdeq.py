"""Multiscale deep equilibrium models for images (Bai, Koltun and Kolter, NeurIPS 2020)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.utils import ModelOutput, can_return_tuple

from deqzoo.equilibrium.transforms import transformed
from deqzoo.errors import UserError
from deqzoo.models.base import (
    DEQPreTrainedModel,
    Settings,
    check_keywords,
    per_sample,
    require_dense,
)
from deqzoo.models.coarse import COARSE_TOL, can_start_coarsely, has_fast_bfloat16
from deqzoo.models.weights import row_norms

from .configuration_mdeq import MDEQConfig
from .layers_mdeq import (
    MDEQHead,
    MDEQInjection,
    MDEQStem,
    MDEQTransformation,
    WeightNormConv2d,
)
from .map_mdeq import CompiledMDEQMap, Masks, MDEQMap, Norm, State
from .native_norm import (
    cast_group_norm,
    group_norm,
    native_group_norm,
    native_norm_available,
    native_norm_ready,
    plain_group_norm,
)

IGNORED = -100  # label of a picture that is not scored, as everywhere in transformers


@dataclass
class MDEQModelOutput(ModelOutput):
    """Features of all resolutions and the solver's report.

    Args:
        last_hidden_state: the coarsest branch's features (B, C_n, H_n, W_n).
        pooler_output: means over the positions, of all branches side by side, (B, sum of C_i).
        features: per branch the equilibrium state (B, C_i, H_i, W_i), finest first.
        n_steps: updates of the state, int64 (B,).
        residual: residual of the returned state in the solver's stop mode, (B,).
        converged: whether it is below the tolerance, bool (B,).
        hidden_states: the features, with `output_hidden_states=True` only.
        state: the features detached, only with `output_state=True`.
        equilibrium_map: the `MDEQMap` that was solved, only with `output_state=True`.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    features: tuple[Tensor, ...] | None = None
    n_steps: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    state: tuple[Tensor, ...] | None = None
    equilibrium_map: MDEQMap | CompiledMDEQMap | None = None


@dataclass
class MDEQImageClassifierOutput(ModelOutput):
    """Logits (B, num_labels), the loss when labels were given, and the report of `MDEQModelOutput`.

    `hidden_states` holds the features, with `output_hidden_states=True` only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    n_steps: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    state: tuple[Tensor, ...] | None = None
    equilibrium_map: MDEQMap | CompiledMDEQMap | None = None


@dataclass
class MDEQBackboneOutput(ModelOutput):
    """Feature maps (B, C_i, H_i, W_i) of `config.out_features`, and `MDEQModelOutput`'s report.

    `hidden_states` holds the features of all branches, with `output_hidden_states=True` only.
    """

    feature_maps: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    n_steps: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None


class MDEQPreTrainedModel(DEQPreTrainedModel):
    """Loading, initialisation and diagnostics shared by the MDEQ classes."""

    config_class = MDEQConfig
    base_model_prefix = "mdeq"
    main_input_name = "pixel_values"
    input_modalities: Any = ("image",)
    without_weight_norm = "none"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The reference's initialisation; see `MDEQConfig.initializer_range`.

        The reference draws N(0, 0.01^2) for all convolutions, but its weight normalisation discards
        that for the weight-normalised ones, which keep PyTorch's default.
        """
        std = self.config.initializer_range
        if isinstance(module, WeightNormConv2d):
            bound = 1 / math.sqrt(module.direction[0].numel())
            init.uniform_(module.direction, -bound, bound)
            init.copy_(module.get_parameter("magnitude"), row_norms(module.direction))
        elif isinstance(module, nn.Conv2d) and std is not None:
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.normal_(module.bias, std=std)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            if module.weight is not None:
                init.ones_(module.weight)
                init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                statistics: Any = module
                init.zeros_(statistics.running_mean)
                init.ones_(statistics.running_var)
                init.zeros_(statistics.num_batches_tracked)

    def compile_map(self, enabled: bool = True) -> None:
        """Run the equilibrium map under torch.compile, or no longer.

        Compilation happens at the first forward of each batch shape, so batches should have one
        size; converged samples then do not leave the batch.
        """
        self.base_model.map_compiled = enabled

    def use_native_norm(self, enabled: bool = True) -> bool:
        """Use the compiled group norm of `native_norm` in the map, or no longer.

        Returns:
            Whether it is in use; it is not where it cannot be compiled.
        """
        native = enabled and native_norm_available()
        self.base_model.norm = native_group_norm if native else group_norm
        return native

    def use_training_kernels(
        self, compiled: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Prepare the map for training; see `DEQPreTrainedModel.use_training_kernels`."""
        super().use_training_kernels(compiled, dtype)
        self.compile_map(compiled)
        self.base_model.map_precision = dtype
        if compiled:
            self.base_model.norm = plain_group_norm
        elif self.device.type != "cpu":
            self.base_model.norm = cast_group_norm
        else:
            self.use_native_norm()

    def takes_inference_kernels(self) -> bool:
        """Whether a forward would now take the fast path: on the CPU, in float32, untracked."""
        base = self.base_model
        return (
            base.inference_kernels
            and os.environ.get("DEQZOO_PLAIN_INFERENCE", "0") in ("", "0")
            and not (self.training or torch.is_grad_enabled() or base.map_compiled)
            and not (torch.compiler.is_compiling() or torch.compiler.is_exporting())
            and not (transformed() or torch.is_autocast_enabled("cpu"))
            and self.device.type == "cpu"
            and self.dtype == torch.float32
        )

    def starts_coarsely(self, solver: Settings = None) -> bool:
        """Whether a fast forward with these settings begins its solve in bfloat16.

        With settings of a call every step is in float32.
        """
        return solver is None and has_fast_bfloat16() and can_start_coarsely(self.resolve_solver())

    def inference_path(self, solver: Settings = None) -> str:
        """The kernels that a forward in evaluation mode without gradients now takes, in words."""
        with torch.no_grad():
            if not self.takes_inference_kernels():
                return "plain"
        parts = ["channels last"]
        if self.inference_norm() is native_group_norm:
            parts.append("compiled norm")
        if self.starts_coarsely(solver):
            parts.append(f"bfloat16 to {COARSE_TOL:g}")
        return ", ".join(parts)

    def inference_norm(self) -> Norm:
        """The norm of a fast forward: the compiled one if that is ready, else the model's own."""
        own: Norm = self.base_model.norm
        return native_group_norm if own is group_norm and native_norm_ready() else own

    def inference_map(self, pixel_values: Tensor) -> tuple[MDEQMap, State]:
        """`equilibrium_map` as a forward now solves it: on the fast path where that is taken.

        Such a map can be differentiated once at most.
        """
        f, state = self.equilibrium_map(pixel_values)
        return self._for_inference(f, state) if self.takes_inference_kernels() else (f, state)

    def _for_inference(self, f: MDEQMap, state: State) -> tuple[MDEQMap, State]:
        state = tuple(z.contiguous(memory_format=torch.channels_last) for z in state)
        return f.channels_last(self.inference_norm()), state

    def forward_features(self, pixel_values: Tensor) -> State:
        """The equilibrium (B, C_i, H_i, W_i) of every resolution, finest first: timm's name."""
        return self.base_model(pixel_values, return_dict=True).features

    def equilibrium_map(
        self, pixel_values: Tensor, dropout_masks: Masks | None = None
    ) -> tuple[MDEQMap, State]:
        """The map of a batch and the state from which its solve starts.

        Args:
            pixel_values: (B, 3, H, W), normalised.
            dropout_masks: per branch and block (B, C_i, 1, 1) instead of random ones.
        """
        return self.base_model.build_map(pixel_values, dropout_masks)


class MDEQModel(MDEQPreTrainedModel):
    """The equilibrium states of a picture at several resolutions, without a head."""

    _keys_to_ignore_on_load_unexpected = [r"^head\.", r"^classifier\."]

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__(config)
        self.stem = MDEQStem(config)
        self.injection = MDEQInjection(config) if config.injection_transform else None
        self.transformation = MDEQTransformation(config)
        self.map_compiled = False
        self.map_precision: torch.dtype | None = None  # in training; None: what autocast says
        self.norm: Norm = group_norm
        self.gradient_checkpointing = False
        self.post_init()

    def inject(self, pixel_values: Tensor) -> Tensor:
        """The finest branch's injection (B, C_0, H_0, W_0); the other branches have none."""
        x = self.stem(pixel_values)
        return x if self.injection is None else self.injection(x)

    def build_map(
        self, pixel_values: Tensor, dropout_masks: Masks | None = None
    ) -> tuple[MDEQMap, State]:
        """The map of a batch, its weights normalised and masks drawn once, and the zero state."""
        pixel_values = self._check_pixels(pixel_values)
        injection = self.inject(pixel_values)
        batch, _, height, width = injection.shape
        state = tuple(
            injection.new_zeros(batch, channels, height >> i, width >> i, dtype=pixel_values.dtype)
            for i, channels in enumerate(self.config.channels)
        )
        first: Any = self.stem.convolutions[1]
        if first.weight.is_contiguous(memory_format=torch.channels_last):
            state = tuple(z.contiguous(memory_format=torch.channels_last) for z in state)
        if dropout_masks is None and self.training and self.config.dropout > 0:
            dropout_masks = self._draw_masks(injection)
        n_blocks = list(self.config.blocks_per_branch)
        if dropout_masks is not None and [len(masks) for masks in dropout_masks] != n_blocks:
            raise UserError(f"dropout_masks must hold, branch by branch, {n_blocks} masks")
        f = MDEQMap(
            tensors=self.transformation.tensors(),
            injections=(injection,) + (None,) * (len(state) - 1),
            masks=dropout_masks,
            num_groups=self.config.num_groups,
            norm=self.norm,
        )
        return f, state

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        solver: Settings = None,
        gradient: Settings = None,
        shallow: bool = False,
        dropout_masks: Masks | None = None,
        output_hidden_states: bool | None = None,
        output_state: bool = False,
        **keywords: Any,
    ) -> MDEQModelOutput:
        """Solve for the equilibrium of every picture.

        Args:
            pixel_values: (B, 3, H, W), floating, normalised; H and W multiples of
                `config.size_divisor`.
            solver: settings for this call, over those of the config.
            gradient: likewise.
            shallow: apply the map `config.unroll_layers` times instead, with ordinary
                back-propagation. The reported residual is that of the state before the last
                application.
            dropout_masks: per branch and block (B, C_i, 1, 1) instead of random ones.
            output_hidden_states: also return the features as `hidden_states`; by default as the
                configuration says.
            output_state: also return the map and the state, for `jacobian_loss`.

        Raises:
            UserError: pictures of a wrong shape or dtype, or a keyword that asks for what an MDEQ
                does not have.
        """
        check_keywords(self, keywords)
        f, z0 = self.build_map(pixel_values, dropout_masks)
        if self.map_precision is not None and self.training:
            f = f.in_precision(self.map_precision)
        g: Any = CompiledMDEQMap(f) if self.map_compiled else f
        coarse = None
        if self.takes_inference_kernels():
            g, z0 = self._for_inference(f, z0)
            coarse = g.in_precision(torch.bfloat16) if self.starts_coarsely(solver) else None
        if shallow:
            output = self._unroll(g, z0, tol=self.resolve_solver(solver).tol)
        else:
            solution = self.solve(g, z0, solver=solver, gradient=gradient, coarse=coarse)
            output = _model_output(tuple(solution.state), **per_sample(solution))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states:
            output.hidden_states = output.features
        if output_state:
            output.state = tuple(z.detach() for z in output.features or ())
            # The compiled map and norm cannot be differentiated twice, as the exact penalty needs.
            output.equilibrium_map = g if self.fixed_steps else f.twice_differentiable()
        return output

    def _unroll(self, f: Callable[[State], State], state: State, tol: float) -> MDEQModelOutput:
        layers = self.config.unroll_layers
        previous, state = self.iterate(f, state, layers)
        with torch.no_grad():
            change = _squared_norms(tuple(a - b for a, b in zip(state, previous, strict=True)))
            residual = (change / _squared_norms(state).clamp_min(1e-30)).sqrt()
        return _model_output(
            state,
            n_steps=torch.full_like(residual, layers, dtype=torch.int64),
            residual=residual,
            converged=residual <= tol,
        )

    def _draw_masks(self, like: Tensor) -> Masks:
        """Per branch and block a mask (B, C_i, 1, 1) with entries 0 or 1 / (1 - dropout)."""
        keep = 1 - self.config.dropout
        return tuple(
            tuple(
                like.new_empty(like.shape[0], channels, 1, 1).bernoulli_(keep).div_(keep)
                for _ in range(blocks)
            )
            for channels, blocks in zip(
                self.config.channels, self.config.blocks_per_branch, strict=True
            )
        )

    def _check_pixels(self, pixel_values: Tensor) -> Tensor:
        """Pictures in the model's dtype, or a `UserError`."""
        channels, divisor = self.config.num_channels, self.config.size_divisor
        if pixel_values is None:
            raise UserError("pixel_values is missing: pass what the image processor makes")
        require_dense(pixel_values=pixel_values)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise UserError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected "
                f"(batch, {channels}, height, width), as the image processor makes it"
            )
        if not pixel_values.is_floating_point():
            raise UserError(
                f"pixel_values has dtype {pixel_values.dtype}; expected normalised floating point "
                "values, as the image processor makes them"
            )
        height, width = pixel_values.shape[-2:]
        if height < divisor or width < divisor or height % divisor or width % divisor:
            raise UserError(
                f"pixel_values is {height}x{width}, but this model halves pictures "
                f"{divisor.bit_length() - 1} times: height and width must be multiples of {divisor}"
            )
        return pixel_values.to(self.dtype)


class MDEQBackbone(BackboneMixin, MDEQModel):
    """The equilibrium states as feature maps, as detectors and the like take them."""

    has_attentions = False

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__(config)
        self.num_features = list(config.channels)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **keywords: Any) -> MDEQBackboneOutput:
        """Solve for the equilibrium of every picture; arguments as in `MDEQModel.forward`."""
        output = MDEQModel.forward(self, pixel_values, return_dict=True, **keywords)
        return MDEQBackboneOutput(
            feature_maps=tuple(output.features[i] for i in self.out_indices),
            hidden_states=output.hidden_states,
            n_steps=output.n_steps,
            residual=output.residual,
            converged=output.converged,
        )


class MDEQForImageClassification(MDEQPreTrainedModel):
    """An MDEQ with the multiscale head and a linear classifier."""

    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it where it accumulates

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForImageClassification"  # which transformers guesses from a class's name
        self.num_labels = int(config.num_labels or 0)
        self.mdeq = MDEQModel(config)
        self.head = MDEQHead(config)
        self.classifier = nn.Linear(config.final_channels, self.num_labels)
        self.post_init()

    def _check_labels(self, labels: Tensor | None, pictures: Any) -> None:
        """Refuse labels that are not what the model learns: before a solve, and in one line."""
        require_dense(labels=labels)
        if labels is None or not isinstance(pictures, Tensor) or pictures.ndim == 0:
            return
        n_pictures = len(pictures)
        shape, kind = (n_pictures, self.num_labels), self.config.problem_type
        if kind == "multi_label_classification" or kind == "regression" and self.num_labels > 1:
            if tuple(labels.shape) != shape:
                raise UserError(
                    f"labels have shape {tuple(labels.shape)}, but this model of problem_type "
                    f"{kind!r} needs {shape}"
                )
            return
        if labels.numel() != n_pictures:
            raise UserError(f"{labels.numel()} labels for {n_pictures} pictures; pass one for each")
        if kind == "regression":
            return
        if labels.dtype != torch.int64:
            raise UserError(
                f"labels must be class indices of dtype int64, got {labels.dtype}; convert by "
                '.long(), or set problem_type="multi_label_classification" for several per picture'
            )
        if labels.device.type == "cpu":  # elsewhere every step would wait for the device
            foreign_labels = labels[
                ((labels < 0) | (labels >= self.num_labels)) & (labels != IGNORED)
            ]
            if foreign_labels.numel():
                raise UserError(
                    f"labels hold {foreign_labels.flatten()[0]}, but this model's classes are "
                    f"numbered from 0 to {self.num_labels - 1}"
                )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        solver: Settings = None,
        gradient: Settings = None,
        shallow: bool = False,
        dropout_masks: Masks | None = None,
        output_hidden_states: bool | None = None,
        output_state: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **keywords: Any,
    ) -> MDEQImageClassifierOutput:
        """Classify pictures; arguments as in `MDEQModel.forward`.

        Args:
            labels: class indices (B,); the loss is their mean cross-entropy.
            output_hidden_states: also return the features of all resolutions; by default as the
                configuration says.
            num_items_in_batch: divide the summed loss by this number instead of the batch size.
        """
        check_keywords(self, keywords)
        self._check_labels(labels, pixel_values)
        base = self.mdeq(
            pixel_values,
            solver=solver,
            gradient=gradient,
            shallow=shallow,
            dropout_masks=dropout_masks,
            output_hidden_states=output_hidden_states,
            output_state=output_state,
            return_dict=True,
        )
        logits = self.classifier(self.head(base.features))
        if not self.training:
            # Where no state was ever finite the scores would be those of the start: NaN instead.
            is_unknown = ~base.residual.isfinite().unsqueeze(1)
            logits = logits.masked_fill(is_unknown, float("nan"))
        loss = None
        if labels is not None:
            if self.config.problem_type == "multi_label_classification":
                labels = labels.to(logits.dtype)
            loss = self.loss_function(
                labels, logits, self.config, num_items_in_batch=num_items_in_batch
            )
        return MDEQImageClassifierOutput(
            loss=loss,
            logits=logits,
            n_steps=base.n_steps,
            residual=base.residual,
            converged=base.converged,
            hidden_states=base.hidden_states,
            state=base.state,
            equilibrium_map=base.equilibrium_map,
        )


def _model_output(features: State, **report: Any) -> MDEQModelOutput:
    """The output for the features of all branches, with the solver's report."""
    return MDEQModelOutput(
        last_hidden_state=features[-1],
        pooler_output=torch.cat([z.mean((2, 3)) for z in features], dim=1),
        features=features,
        **report,
    )


def _squared_norms(state: State) -> Tensor:
    """Squared norm over all branches, per sample, in float32 or better: (B,)."""
    dtype = torch.promote_types(state[0].dtype, torch.float32)
    total: Any = sum(z.flatten(1).to(dtype).square().sum(1) for z in state)
    return total


__all__ = ["MDEQBackbone", "MDEQForImageClassification", "MDEQModel", "MDEQPreTrainedModel"]
