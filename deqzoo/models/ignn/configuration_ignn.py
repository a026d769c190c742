"""Configuration of implicit graph neural networks."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from deqzoo.equilibrium import Gradient, Solver
from deqzoo.models.base import DEQConfigMixin


@strict
class IGNNConfig(DEQConfigMixin, PreTrainedConfig):
    r"""Architecture, adjacency, solver and gradient of an IGNN.

    With no arguments this is the graph classifier of the paper on data with one node feature.

    Args:
        num_features: p, width of the node features.
        hidden_sizes: widths m of the implicit layers.
        skip_connections: follow each layer by x <- ELU(layer(x) + V x), as the PPI model does.
        local_injection: B = Omega_1 U A + Omega_2 U in place of B = Omega_1 U A.
        kappa: the infinity norm of every W stays at most kappa / (spectral radius of A); None
            leaves W free (nothing then guarantees an equilibrium).
        normalization: of the adjacency: "augmented" D^-1/2 (A + I) D^-1/2, "symmetric" without the
            self loops, "none".
        directed: accept graphs whose edges have no reverse.
        spectral_radius: of the adjacency, where it is known beforehand; None takes 1 for
            normalised undirected graphs, which is exact with self loops, and measures others:
            of each graph in evaluation, so that its output does not depend on its batch, and of
            the whole batch in training, where the largest graph sets the bound on W for all.
        weight_norm: "spectral" scales each weight below its estimated spectral norm (TorchDEQ's
            PPI recipe), "none" leaves it.
        dropout: probability, before the last classifier.
        implicit_head: node classifiers end in one more implicit layer plus a linear one (PPI)
            instead of a linear one alone.
        normalize_states: node classifiers divide each node's state by its Euclidean norm.
        classifier_bias: whether the last linear layer has a bias.
        official: reproduce the published code's behaviour where it differs: its unused
            parameters, the projection of stored weights in every forward (evaluation too), A + A^T
            in the evaluation of graph classifiers, and the gradient of W that is wrong for
            directed graphs. Meant for parity tests and converted checkpoints.
        decision_threshold: probability from which one of several labels is named, chosen on
            validation data; it changes no output of the model.
        graph_encoding: what the classes and node features of a graph classifier stand for, as
            `deqzoo.data.tu.GraphEncoding` has it; None where it is not known.
        solver: the equilibrium solver's settings, as in `deqzoo.equilibrium.make_solver`.
        gradient: the gradient's settings, as in `deqzoo.equilibrium.make_gradient`.

    Raises:
        ValueError: settings out of range, with the offending value.
    """

    model_type = "ignn"
    keys_to_ignore_at_inference = ["n_steps", "residual", "converged", "hidden_states"]
    default_solver = {"name": "fixed_point", "max_steps": 300, "tol": 1e-5}
    default_gradient = {"name": "upg", "steps": 5, "damping": 0.5}

    solver: dict[str, Any] | str | Solver | None = None
    gradient: dict[str, Any] | str | Gradient | None = None
    num_features: int = 1
    hidden_sizes: list[int] | tuple[int, ...] = (64, 64, 64)
    skip_connections: bool = False
    local_injection: bool = False
    kappa: float | int | None = 0.9
    normalization: Literal["augmented", "symmetric", "none"] = "augmented"
    directed: bool = False
    spectral_radius: float | int | None = None
    weight_norm: Literal["none", "spectral"] = "none"
    dropout: float | int = 0.5
    implicit_head: bool = False
    normalize_states: bool = False
    classifier_bias: bool = True
    official: bool = False
    decision_threshold: float = 0.5
    graph_encoding: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.hidden_sizes = list(self.hidden_sizes)
        self.complete_equilibrium()
        super().__post_init__(**kwargs)

    @property
    def known_radius(self) -> float | None:
        """Spectral radius, or a bound, of every adjacency that the model sees, if there is one."""
        if self.spectral_radius is not None:
            return float(self.spectral_radius)
        return 1.0 if self.normalization != "none" and not self.directed else None

    def validate_sizes(self) -> None:
        """Widths are positive."""
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must list positive widths")
        if self.num_features < 1:
            raise ValueError(f"num_features={self.num_features} must be positive")

    def validate_numbers(self) -> None:
        """Bounds make sense: kappa = 0 would zero every W."""
        lowest_ok = self.kappa is None or 0 < self.kappa or (self.official and self.kappa == 0)
        if not lowest_ok or (self.kappa is not None and self.kappa >= 1):
            raise ValueError(f"kappa={self.kappa} must be in (0, 1), or None for no bound")
        if self.spectral_radius is not None and self.spectral_radius <= 0:
            raise ValueError(f"spectral_radius={self.spectral_radius} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not 0 < self.decision_threshold < 1:
            raise ValueError(f"decision_threshold={self.decision_threshold} must be in (0, 1)")
