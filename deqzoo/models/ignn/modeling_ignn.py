"""Implicit graph neural networks (Gu, Chang, Zhu, Sojoudi and El Ghaoui, NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import can_return_tuple, logging

from deqzoo.equilibrium import Segments, Solution
from deqzoo.equilibrium.uncompiled import uncompiled
from deqzoo.errors import UserError
from deqzoo.models.base import DEQPreTrainedModel, Settings, check_keywords, require_dense
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields
from deqzoo.models.ignn.layer import ClippedSpectralNorm, GraphMap, ImplicitGraphLayer, linear
from deqzoo.models.ignn.outputs import (
    IGNNClassifierOutput,
    IGNNModelOutput,
    combined_report,
    extended_report,
    joined_solution,
)
from deqzoo.models.ignn.projection import project_rows
from deqzoo.models.weights import linear_tensors

logger = logging.get_logger(__name__)

IGNORED = -100
"""Label of what the loss leaves out, as in PyTorch."""
_RADIUS_MARGIN = 1e-5
"""Added to measured spectral radii: eigenvalues are not exact (upstream adds the same)."""


class IGNNPreTrainedModel(DEQPreTrainedModel):
    """Loading, initialisation and the weights' constraint, shared by the IGNN classes."""

    config_class = IGNNConfig
    config: IGNNConfig
    base_model_prefix = "ignn"
    main_input_name = "x"
    input_modalities: Any = ("graph",)
    narrow_tol_in_eps = 0.0  # contractions without norms: bfloat16 reaches residuals of 1e-4

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Uniform in ±1/sqrt(output width), then projected; linear layers as PyTorch does."""
        if isinstance(module, ImplicitGraphLayer):
            for parameter in module.parameters(recurse=False):
                init.uniform_(parameter, -module.scale, module.scale)
            radius = self.config.known_radius
            if radius is not None and not module.official and not module.norms:
                projection = project_rows(module.state_weight, module.bound(radius) or math.inf)
                init.copy_(module.state_weight, projection)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, ClippedSpectralNorm):
            init.ones_(module.gain)
            for buffer in (module.left, module.right):
                init.constant_(buffer, 1 / math.sqrt(len(buffer)))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as in transformers, then make sure that the weights meet their norm bound."""
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.enforce_constraint()
        return result

    @property
    def implicit_layers(self) -> list[ImplicitGraphLayer]:
        """All implicit layers, first to last."""
        return [m for m in self.modules() if isinstance(m, ImplicitGraphLayer)]

    def enforce_constraint(self) -> float:
        """Check the norm bound of every W where it does not depend on the graph, and mend it.

        Returns:
            The largest excess that was found; 0 where all weights met the bound.
        """
        radius = self.config.known_radius
        if radius is None:
            return 0.0
        excess = max(layer.excess(radius) for layer in self.implicit_layers)
        if excess > 0:
            logger.warning(
                f"a weight exceeded its norm bound {(self.config.kappa or 0.0) / radius:.3g} by "
                f"{excess:.3g} and was projected; without the bound an equilibrium is not certain"
            )
            self.project_()
        return excess

    def project_(self) -> None:
        """Project every stored W onto its norm ball: after each optimiser step in training.

        Where the spectral radius depends on the graph, the largest one that training has seen
        (`largest_radius` of the base model) counts; before the first forward there is nothing to
        project onto. Several processes must agree on it first, and a resumed run must restore it:
        `ProjectionCallback`, which `DEQTrainer` adds, does both; a loop of your own has to.
        """
        radius = self.config.known_radius or self.base_model.largest_radius
        if radius > 0:
            for layer in self.implicit_layers:
                layer.project_(radius)

    @uncompiled  # its result depends on values
    def read_graphs(
        self,
        x: Any,
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        symmetrize: bool = False,
    ) -> GraphBatch:
        """Turn any accepted input into a `GraphBatch` on the model's device, in its dtype.

        Args:
            x: node features with the other arguments, a torch_geometric `Data` or `Batch`, or a
                `GraphBatch`, which is taken as it is.
        """
        like = next(self.parameters())
        if isinstance(x, GraphBatch):
            if any(extra is not None for extra in (edge_index, edge_weight, batch)):
                raise UserError("a GraphBatch comes alone: its edges and graphs are in it")
            return x.to(like)
        n_graphs = None
        if edge_index is None and not isinstance(x, Tensor):
            if edge_weight is not None or batch is not None:
                raise UserError(
                    "edge_weight and batch belong into the graph object (data.edge_weight), or "
                    "beside x and edge_index as tensors"
                )
            fields = graph_fields(x)
            n_graphs = fields.pop("n_graphs")
            x, edge_index = fields["x"], fields["edge_index"]
            edge_weight, batch = fields["edge_weight"], fields["batch"]
        if edge_index is None:
            raise UserError("edge_index is missing: pass x and edge_index, or one graph object")
        graphs = GraphBatch.build(
            self.config, x, edge_index, edge_weight, batch, n_graphs, symmetrize
        )
        return graphs.to(like)


class IGNNModel(IGNNPreTrainedModel):
    """The stack of implicit layers, without a head."""

    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^dense\."]

    def __init__(self, config: IGNNConfig) -> None:
        super().__init__(config)
        widths = [config.num_features, *config.hidden_sizes]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.layers = nn.ModuleList(implicit_layer(config, p, m) for p, m in pairs)
        self.skips = nn.ModuleList(
            nn.Linear(p, m) for p, m in (pairs if config.skip_connections else [])
        )
        self.largest_radius = 0.0  # measured in training so far
        self.gradient_checkpointing = False
        self.post_init()

    def _check_starts(self, graphs: GraphBatch, states: Sequence[Tensor] | None) -> None:
        """Refuse starts of other graphs or of another model; a head's own may follow."""
        if states is None:
            return
        shapes = [tuple(state.shape) for state in states]
        expected_shapes = [(graphs.features.shape[0], width) for width in self.config.hidden_sizes]
        if shapes[: len(expected_shapes)] != expected_shapes:
            raise UserError(
                "initial_states must have a state for each layer, of shapes "
                f"{expected_shapes}, got {shapes}"
            )

    def radius(self, graphs: GraphBatch) -> float:
        """Spectral radius that the norm bound of this batch is made for."""
        known_radius = self.config.known_radius
        if known_radius is not None:
            return known_radius
        radius = graphs.adjacency.spectral_radius + _RADIUS_MARGIN
        if self.training:
            self.largest_radius = max(self.largest_radius, radius)
        return radius

    @uncompiled  # the compiler does not know sparse matrices
    def solve_layer(
        self,
        layer: ImplicitGraphLayer,
        x: Tensor,
        graphs: GraphBatch,
        start: Tensor | None,
        solver: Settings,
        gradient: Settings,
    ) -> Solution:
        """Solve one implicit layer fed with x (n, p).

        The solve starts from `start` (n, m), or from the injection, as upstream's does. In
        evaluation a graph whose radius W is too large for is solved apart, so that the projection
        made for it does not reach the others of its batch.
        """
        radius = self.radius(graphs)
        depends_on_graphs = self.config.known_radius is None and graphs.n_graphs > 1
        if not depends_on_graphs or self.training or self.config.official or layer.allows(radius):
            layout = Segments(graphs.index, graphs.n_graphs)
            equation = layer(x, graphs.adjacency, radius)
            return self._solve_part(equation, start, layout, solver, gradient)
        solutions, rows, numbers = [], [], self._groups(layer, graphs)
        for group in numbers:
            place = graphs.index.new_full((graphs.n_graphs,), -1)
            place[group] = torch.arange(len(group), device=place.device)
            nodes = (place[graphs.index] >= 0).nonzero().squeeze(1)
            group_radius = max(graphs.radii[i] for i in group) + _RADIUS_MARGIN
            equation = layer(x.index_select(0, nodes), graphs.adjacency.select(nodes), group_radius)
            layout = Segments(place[graphs.index[nodes]], len(group))
            group_start = None if start is None else start[nodes]
            solutions.append(self._solve_part(equation, group_start, layout, solver, gradient))
            rows.append(nodes)
        cells = [place.new_tensor(group) for group in numbers]
        return joined_solution(solutions, rows, cells)

    def _groups(self, layer: ImplicitGraphLayer, graphs: GraphBatch) -> list[list[int]]:
        """Indices of graphs to solve together: all that W is small enough for, each other alone."""
        fits = [layer.allows(radius + _RADIUS_MARGIN) for radius in graphs.radii]
        inside = [i for i, fit in enumerate(fits) if fit]
        return [[i] for i, fit in enumerate(fits) if not fit] + ([inside] if inside else [])

    def _solve_part(
        self,
        equation: GraphMap,
        start: Tensor | None,
        layout: Segments,
        solver: Settings,
        gradient: Settings,
    ) -> Solution:
        start = equation.injection.detach() if start is None else start
        return self.solve(equation, start, layout=layout, solver=solver, gradient=gradient)

    @can_return_tuple
    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        initial_states: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        solver: Settings = None,
        gradient: Settings = None,
        **keywords: Any,
    ) -> IGNNModelOutput:
        """Find the equilibrium of every layer.

        Args:
            x: (n, num_features) node features; or a torch_geometric `Data` / `Batch` or a
                `GraphBatch` alone.
            edge_index: (2, e) int64.
            edge_weight: (e,) not negative, 1 by default.
            batch: (n,) int64, the graph of each node; one graph by default.
            initial_states: per layer a start (n, m_i), e.g. `hidden_states` of an earlier call
                on the same graphs: fewer steps, the same equilibrium.
            output_hidden_states: return each layer's equilibrium.
            solver: settings for this call, over those of the config.
            gradient: likewise.

        Raises:
            UserError: the input does not describe graphs that this model reads.
        """
        check_keywords(self, keywords)
        graphs = self.read_graphs(x, edge_index, edge_weight, batch)
        self._check_starts(graphs, initial_states)
        x, solutions = graphs.features, []
        for i, layer in enumerate(self.layers):
            start = initial_states[i] if initial_states is not None else None
            solution = self.solve_layer(layer, x, graphs, start, solver, gradient)
            solutions.append(solution)
            if len(self.skips):
                weight, bias = linear_tensors(self.skips[i])
                x = nn.functional.elu(solution.state + linear(x, weight) + bias)
            else:
                x = solution.state
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return combined_report(x, solutions, bool(output_hidden_states))


class _IGNNClassifier(IGNNPreTrainedModel):
    """How the forward of every classifier starts and ends."""

    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it where it accumulates
    ignn: Any

    def _states(
        self,
        graphs: GraphBatch,
        initial_states: Sequence[Tensor] | None,
        output_hidden_states: bool | None,
        solver: Settings,
        gradient: Settings,
    ) -> IGNNModelOutput:
        return self.ignn(
            graphs,
            initial_states=initial_states,
            output_hidden_states=output_hidden_states,
            solver=solver,
            gradient=gradient,
            return_dict=True,
        )

    def _classifier_output(
        self,
        logits: Tensor,
        labels: Tensor | None,
        base: IGNNModelOutput,
        mask: Tensor | None = None,
    ) -> IGNNClassifierOutput:
        """Return logits, the loss of those in the mask, and the solver's report."""
        loss = None
        if labels is not None:
            loss = classification_loss(self.config, logits, labels, mask)
        return IGNNClassifierOutput(
            loss=loss,
            logits=logits,
            n_steps=base.n_steps,
            residual=base.residual,
            converged=base.converged,
            hidden_states=base.hidden_states,
        )


class IGNNForGraphClassification(_IGNNClassifier):
    """Sum over each graph's nodes, then a classifier of two linear layers."""

    def __init__(self, config: IGNNConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        width = config.hidden_sizes[-1]
        self.ignn = IGNNModel(config)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width, self.num_labels, bias=config.classifier_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        labels: Tensor | None = None,
        initial_states: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        solver: Settings = None,
        gradient: Settings = None,
        **keywords: Any,
    ) -> IGNNClassifierOutput:
        """Classify graphs; arguments as in `IGNNModel.forward`.

        Args:
            labels: (G,) int64; the loss is their mean cross-entropy. With
                `problem_type="multi_label_classification"` (G, num_labels) of 0 and 1.
        """
        check_keywords(self, keywords)
        symmetrize = self.config.official and not self.training
        graphs = self.read_graphs(x, edge_index, edge_weight, batch, symmetrize)
        base = self._states(graphs, initial_states, output_hidden_states, solver, gradient)
        nodes: Any = base.last_hidden_state
        if graphs.counts is not None:
            nodes = nodes * graphs.counts[:, None]
        # In float32 or wider: a sum of ones in bfloat16 stops at 256.
        wide = nodes.to(torch.promote_types(nodes.dtype, torch.float32))
        sums = wide.new_zeros(graphs.n_graphs, nodes.shape[1]).index_add(0, graphs.index, wide)
        logits = self.classifier(self.dropout(self.dense(sums.to(nodes.dtype)).relu()))
        return self._classifier_output(logits, labels, base)


class IGNNForNodeClassification(_IGNNClassifier):
    """A class, or several labels, for every node."""

    def __init__(self, config: IGNNConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        width = config.hidden_sizes[-1]
        self.ignn = IGNNModel(config)
        self.implicit_head = None
        if config.implicit_head:
            self.implicit_head = implicit_layer(config, width, self.num_labels)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width, self.num_labels, bias=config.classifier_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
        batch: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        initial_states: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        solver: Settings = None,
        gradient: Settings = None,
        **keywords: Any,
    ) -> IGNNClassifierOutput:
        """Classify nodes; arguments as in `IGNNModel.forward`.

        Args:
            labels: (n,) int64, or (n, num_labels) of 0 and 1 with
                `problem_type="multi_label_classification"`.
            mask: (n,) bool, the nodes whose labels count in the loss.
        """
        check_keywords(self, keywords)
        graphs = self.read_graphs(x, edge_index, edge_weight, batch)
        base = self._states(graphs, initial_states, output_hidden_states, solver, gradient)
        nodes: Any = base.last_hidden_state
        if self.config.normalize_states:
            nodes = nn.functional.normalize(nodes, dim=1)
        logits = self.classifier(nodes if self.implicit_head is not None else self.dropout(nodes))
        if self.implicit_head is not None:
            start = initial_states[-1] if initial_states is not None else None
            if start is not None and start.shape != (len(nodes), self.config.num_labels):
                raise UserError(
                    "initial_states must end with a state of the head, of shape "
                    f"{(len(nodes), self.config.num_labels)}, got {tuple(start.shape)}"
                )
            solution = self.ignn.solve_layer(
                self.implicit_head, nodes, graphs, start, solver, gradient
            )
            logits = logits + solution.state
            base = extended_report(base, solution)
        return self._classifier_output(logits, labels, base, mask)


def implicit_layer(config: IGNNConfig, in_features: int, out_features: int) -> ImplicitGraphLayer:
    """Build one layer with the configuration's settings."""
    return ImplicitGraphLayer(
        in_features,
        out_features,
        local_injection=config.local_injection,
        kappa=config.kappa,
        spectral_norm=config.weight_norm == "spectral",
        official=config.official,
    )


def classification_loss(
    config: IGNNConfig, logits: Tensor, labels: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy, or mean binary cross-entropy for multi-label problems.

    Args:
        config: says which.
        logits: (n, c).
        labels: (n,) classes, -100 for none, or (n, c) of 0 and 1.
        mask: (n,) bool, the rows that count.

    Raises:
        UserError: labels or a mask of the wrong shape or type, labels of no class, or a model of
            `problem_type` "regression".
    """
    require_dense(labels=labels, mask=mask)
    if config.problem_type == "regression":
        raise UserError(
            "graph models have no loss for problem_type 'regression'; compute it from logits"
        )
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != logits.shape[:1]):
        raise UserError(
            f"mask must be bool of shape ({len(logits)},), one entry per node, got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    if config.problem_type == "multi_label_classification":
        if labels.shape != logits.shape:
            raise UserError(
                f"labels have shape {tuple(labels.shape)}, but this multi-label model needs "
                f"{tuple(logits.shape)}"
            )
        labels = labels.to(logits)
        if mask is not None:
            # NaN, the mark of nodes without labels, would reach the gradient.
            labels = labels.masked_fill(~mask.unsqueeze(1), 0)
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels <= 1)).all()):
            raise UserError(
                "labels of a multi-label model must lie in [0, 1]; leave rows without labels out "
                "by mask"
            )
        if mask is None:
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)
        # No selection of rows: their number would have to come from the device.
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return each.mean(1).masked_fill(~mask, 0).sum() / mask.sum()
    if labels.numel() != len(logits):
        raise UserError(f"{labels.numel()} labels for {len(logits)} predictions")
    flat = labels.reshape(-1)
    if not (flat.is_floating_point() or flat.dtype == torch.int64):
        flat = flat.long()  # so that it can hold IGNORED
    if mask is not None:
        flat = flat.masked_fill(~mask, IGNORED)
    if flat.device.type == "cpu":  # elsewhere every step would wait for the device
        whole = flat.long()
        inside = ((whole >= 0) & (whole < logits.shape[1])) | (whole == IGNORED)
        if not bool((inside & (whole == flat)).all()):
            raise UserError(
                f"labels must be whole numbers from 0 to {logits.shape[1] - 1}, this model's "
                f"classes, got {flat.min().item()} to {flat.max().item()}"
            )
    return nn.functional.cross_entropy(logits, flat.long())


__all__ = [
    "IGNNForGraphClassification",
    "IGNNForNodeClassification",
    "IGNNModel",
    "IGNNPreTrainedModel",
]
