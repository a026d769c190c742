"""Embedding and softmax of a large vocabulary in frequency clusters.

Grave et al. 2017, Baevski & Auli 2019. Words are sorted by frequency and cut into clusters. With
``div_val`` > 1 rarer clusters get narrower tables, each with its own projection to the model width;
with ``div_val`` 1 there is one table. The layout is Transformer-XL's, so that its checkpoints can
be converted.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqzoo.models.weights import linear_tensors

IGNORED = -100  # label of a position that is not scored, as everywhere in transformers


def cluster_bounds(vocab_size: int, cutoffs: list[int]) -> list[tuple[int, int]]:
    """First and one-past-last word index of every cluster."""
    edges = [0, *cutoffs, vocab_size]
    return list(zip(edges[:-1], edges[1:], strict=True))


def table_shapes(
    bounds: list[tuple[int, int]], d_embed: int, div_val: int
) -> list[tuple[int, int]]:
    """Rows and width of every table: one for all words, or ``floor(d_embed / div_val**i)`` wide."""
    if div_val == 1:
        return [(bounds[-1][1], d_embed)]
    return [(end - start, d_embed // div_val**i) for i, (start, end) in enumerate(bounds)]


class SharedLinear(nn.Module):
    """A linear map whose weight another part of the model may share.

    It is no `nn.Linear`, so that tools that rewrite all of those (adapters for "all-linear",
    dynamic quantisation) leave it alone: what they add in one place would be missing in the other,
    and a merge would put it into both.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    reset_parameters: Any = nn.Linear.reset_parameters
    forward: Any = nn.Linear.forward


class AdaptiveEmbedding(nn.Module):
    """Word indices (B, T) to vectors (B, T, d_model); the model scales them by sqrt(d_model)."""

    def __init__(
        self, vocab_size: int, d_model: int, d_embed: int, cutoffs: list[int], div_val: int
    ) -> None:
        super().__init__()
        self.bounds = cluster_bounds(vocab_size, cutoffs)
        self.scale = math.sqrt(d_model)
        shapes = table_shapes(self.bounds, d_embed, div_val)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size, width in shapes)
        has_projections = div_val > 1 or d_embed != d_model
        self.projections = nn.ModuleList(
            SharedLinear(width, d_model, bias=False)
            for _, width in (shapes if has_projections else [])
        )

    def forward(self, input_ids: Tensor, word_mask: Tensor | None = None) -> Tensor:
        """``word_mask`` (vocab_size,) multiplies the vectors word by word (embedding dropout)."""
        if len(self.tables) == 1:
            vectors = self.tables[0](input_ids)
            if self.projections:
                vectors = self.projections[0](vectors)
        else:
            vectors = self._cluster_vectors(input_ids)
        if word_mask is not None:
            vectors = vectors * word_mask[input_ids].unsqueeze(-1).to(vectors.dtype)
        return vectors

    def _cluster_vectors(self, words: Tensor) -> Tensor:
        """Every word is looked up in every cluster: to select some would wait for the device."""
        first, last = self.bounds[0], self.bounds[-1]
        vectors = self.projections[0](self.tables[0](words.clamp(max=first[1] - 1)))
        for bound, table, projection in zip(
            self.bounds[1:], self.tables[1:], self.projections[1:], strict=True
        ):
            start, end = bound
            nearest = words.clamp(start, None if bound == last else end - 1)
            part = projection(table(nearest - start))
            vectors = torch.where((words >= start).unsqueeze(-1), part, vectors)
        return vectors


def _log_softmax(scores: Tensor) -> Tensor:
    """In float32 or wider: autocast on CPUs would keep three digits of a log-probability."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.log_softmax(scores, dim=-1, dtype=wide)


class AdaptiveSoftmax(nn.Module):
    """Hidden states (..., d_model) to log-probabilities of the next word.

    Tail cluster i >= 1 is reached through head column ``c_1 + n - i``, counted from the end as in
    Transformer-XL. Without cutoffs this is an ordinary softmax layer.
    """

    def __init__(
        self, vocab_size: int, d_model: int, d_embed: int, cutoffs: list[int], div_val: int
    ) -> None:
        super().__init__()
        self.bounds = cluster_bounds(vocab_size, cutoffs)
        self.vocab_size = vocab_size
        n_tails = len(self.bounds) - 1
        shapes = table_shapes(self.bounds, d_embed, div_val)
        self.tables = nn.ModuleList(SharedLinear(width, size) for size, width in shapes)
        projection_widths = [d_embed // div_val**i for i in range(n_tails + 1)]
        if div_val == 1 and d_embed == d_model:
            projection_widths = []
        # Weights are (d_model, width), the embedding's orientation, so that both can share one.
        self.projections = nn.ModuleList(
            SharedLinear(width, d_model, bias=False) for width in projection_widths
        )
        self.clusters = nn.Linear(d_embed, n_tails) if n_tails else None

    def _cluster_tables(self) -> list[tuple[Tensor, Any]]:
        """Rows and biases of every cluster."""
        if len(self.tables) == len(self.bounds):
            return [linear_tensors(table) for table in self.tables]
        # One split: its backward joins the parts' gradients, slices would each fill a whole table.
        sizes = [end - start for start, end in self.bounds]
        weight, bias = linear_tensors(self.tables[0])
        assert bias is not None
        return list(zip(weight.split(sizes), bias.split(sizes), strict=True))

    def _project(self, hidden: Tensor, index: int) -> Tensor:
        return hidden @ linear_tensors(self.projections[index])[0] if self.projections else hidden

    def _head(self, hidden: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Log-probabilities of the first cluster's words, then of the tails: (..., c_1 + n)."""
        features = self._project(hidden, 0)
        scores = F.linear(features, *table)
        if self.clusters is not None:
            scores = torch.cat([scores, self.clusters(features)], dim=-1)
        return _log_softmax(scores)

    def _tail(self, hidden: Tensor, index: int, table: tuple[Tensor, Tensor]) -> Tensor:
        return _log_softmax(F.linear(self._project(hidden, index), *table))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., vocab_size) in the dtype of ``hidden``: raw scores without cutoffs, else
        log-probabilities.

        Either way their log-softmax is the model's log-probability.
        """
        return self._scores(hidden).to(hidden.dtype)

    def _scores(self, hidden: Tensor) -> Tensor:
        tables = self._cluster_tables()
        if self.clusters is None:
            return F.linear(self._project(hidden, 0), *tables[0])
        head = self._head(hidden, tables[0])
        first = self.bounds[0][1]
        parts = [head[..., :first]]
        for index in range(1, len(self.bounds)):
            gate = head[..., first + len(self.bounds) - 1 - index].unsqueeze(-1)
            parts.append(gate + self._tail(hidden, index, tables[index]))
        return torch.cat(parts, dim=-1)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods in nats of ``targets`` (...), zero where the target is -100,
        in float32 or wider.

        A cluster is evaluated for the positions whose targets lie in it alone, so
        that no (..., vocab_size) tensor exists when there are cutoffs. To find them waits for the
        device; see `dense_nll`.

        Raises:
            ValueError: the targets' shape is not that of ``hidden`` without its last dimension.
        """
        if targets.shape != hidden.shape[:-1]:
            raise ValueError(
                f"targets {tuple(targets.shape)} do not fit states {tuple(hidden.shape)}: one "
                "target per state"
            )
        if self.clusters is None:
            return self.dense_nll(hidden, targets)
        flat, words = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        positions = (words != IGNORED).nonzero().squeeze(1)
        if positions.numel() < words.numel():
            position_losses = self._flat_nll(flat[positions], words[positions])
            losses = position_losses.new_zeros(words.shape).index_put((positions,), position_losses)
        else:
            losses = self._flat_nll(flat, words)
        return losses.view(targets.shape)

    def dense_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`nll` from all scores (..., vocab_size): nothing is selected, so no step waits."""
        scores = _log_softmax(self._scores(hidden)).flatten(0, -2)
        losses = F.nll_loss(scores, targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view(targets.shape)

    def _flat_nll(self, hidden: Tensor, words: Tensor) -> Tensor:
        tables = self._cluster_tables()
        first, n_tails = self.bounds[0][1], len(self.bounds) - 1
        column, parts, places = words, [], []
        for index, (start, end) in enumerate(self.bounds[1:], start=1):
            inside = (words >= start) & (words < end)
            column = torch.where(inside, first + n_tails - index, column)
            # A cluster without a target is evaluated on no position, so that its weights take part
            # in every backward pass: DistributedDataParallel waits for all of them.
            place = inside.nonzero().squeeze(1)
            tail = self._tail(hidden[place], index, tables[index])
            parts.append(tail.gather(1, (words[place] - start).unsqueeze(1)).squeeze(1))
            places.append(place)
        likelihood = self._head(hidden, tables[0]).gather(1, column.unsqueeze(1)).squeeze(1)
        return -likelihood.index_add(0, torch.cat(places), torch.cat(parts))
