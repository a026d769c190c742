"""What the DEQ-Transformer classes return."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from deqzoo.models.deq_transformer.block import CompiledMap, EquilibriumMap
from deqzoo.models.deq_transformer.cache_deq_transformer import DEQTransformerCache
from deqzoo.models.deq_transformer.inputs import reordered


class CachingOutput(ModelOutput):
    """An output whose `cache` also answers to `past_key_values`.

    transformers renamed it in 5.24 and has the old name as a property since; generation of older
    releases asks for the old name.
    """

    if not hasattr(ModelOutput, "past_key_values"):

        @property
        def past_key_values(self) -> DEQTransformerCache | None:
            return getattr(self, "cache", None)

        def __contains__(self, key: object) -> bool:
            return super().__contains__("cache" if key == "past_key_values" else key)

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__("cache" if key == "past_key_values" else key)


@dataclass
class DEQTransformerModelOutput(CachingOutput):
    """States of a DEQ-Transformer and how its solve went.

    Attributes:
        last_hidden_state: (B, T, d) equilibrium.
        cache: cache that now holds these tokens too.
        memory: states (B, M, d) and injections (B, M, 3d) for the next segment.
        n_steps, residual, converged: (B,) worst over the real tokens of a sample.
        token_steps, token_residual, token_converged: (B, T) the same token by token; a causal
            solver counts a token as converged when all before it are.
        hidden_states: (B, T, d) word vectors and last_hidden_state, with
            `output_hidden_states=True`.
        state: last_hidden_state detached, only with `output_state=True`.
        equilibrium_map: the map that was solved, only with `output_state=True`.
    """

    last_hidden_state: Tensor | None = None
    cache: DEQTransformerCache | None = None
    memory: tuple[Tensor, Tensor] | None = None
    n_steps: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None
    token_steps: Tensor | None = None
    token_residual: Tensor | None = None
    token_converged: Tensor | None = None
    hidden_states: tuple[Tensor, Tensor] | None = None
    state: Tensor | None = None
    equilibrium_map: EquilibriumMap | CompiledMap | None = None


@dataclass
class DEQTransformerCausalLMOutput(CachingOutput):
    """Scores of the next word; the fields of :class:`DEQTransformerModelOutput` follow.

    Attributes:
        loss: mean negative log-likelihood in nats.
        logits: (B, T, vocab_size); their log-softmax is the model's log-probability.
        nll: (B, T) negative log-likelihood of the word after each token, in token order; zero
            where nothing is scored.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: DEQTransformerCache | None = None
    memory: tuple[Tensor, Tensor] | None = None
    nll: Tensor | None = None
    n_steps: Tensor | None = None
    residual: Tensor | None = None
    converged: Tensor | None = None
    token_steps: Tensor | None = None
    token_residual: Tensor | None = None
    token_converged: Tensor | None = None
    hidden_states: tuple[Tensor, Tensor] | None = None
    state: Tensor | None = None
    equilibrium_map: EquilibriumMap | CompiledMap | None = None


@dataclass(frozen=True)
class SolveReport:
    """State (B, T, d) of a solve and its report token by token, each (B, T)."""

    state: Tensor
    steps: Tensor
    residual: Tensor
    converged: Tensor

    def reordered(self, order: Tensor) -> "SolveReport":
        """The report with the positions of every row in another order (B, T)."""
        parts = (self.state, self.steps, self.residual, self.converged)
        return SolveReport(*(reordered(part, order) for part in parts))

    def per_sample(self, valid: Tensor | None) -> dict[str, Tensor]:
        """Worst values over the real tokens (``valid`` (B, T)) of every sample."""
        steps, residual, converged = self.steps, self.residual, self.converged
        if valid is not None:
            steps = steps.masked_fill(~valid, 0)
            residual = residual.masked_fill(~valid, 0.0)
            converged = converged | ~valid
        return {
            "n_steps": steps.amax(1),
            "residual": residual.amax(1),
            "converged": converged.all(1),
            "token_steps": steps,
            "token_residual": residual,
            "token_converged": converged,
        }


def token_residual(z: Tensor, fz: Tensor) -> Tensor:
    """Relative residual of every token, (B, T) in float32 or wider."""
    work = torch.promote_types(z.dtype, torch.float32)
    difference = torch.linalg.vector_norm(fz - z, dim=-1, dtype=work)
    return difference / (torch.linalg.vector_norm(fz, dim=-1, dtype=work) + 1e-9)
