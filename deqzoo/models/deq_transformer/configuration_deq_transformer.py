"""Configuration of the DEQ-Transformer language model."""

import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from deqzoo.equilibrium import Gradient, Solver
from deqzoo.models.base import DEQConfigMixin
from deqzoo.models.deq_transformer.presets_deq_transformer import PRESETS

VARIANTS = ("locuslab-deq", "torchdeq-seq", "torchdeq-lm")
DEFAULT_WINDOW = 1000  # what local_size 0 stands for


@strict
class DEQTransformerConfig(DEQConfigMixin, PreTrainedConfig):
    """Shape and behaviour of a DEQ-Transformer (Bai, Kolter & Koltun 2019).

    Args:
        variant: the block. ``locuslab-deq`` and ``torchdeq-seq`` have one attention and one
            feed-forward part and differ in pre-LN only; ``torchdeq-lm`` has ``n_sublayers``.
        d_model, d_embed, n_head, d_inner: width, embedding width, heads, hidden width.
        norm_placement: ``post`` or ``pre`` layer norm.
        weight_norm: weight normalisation of the block's linear maps.
        cutoffs, div_val: clusters of the adaptive embedding and softmax; no cutoffs: plain ones.
        tie_word_embeddings, tie_projections: share tables, and then projections per cluster.
        local_size: window of the attention in tokens, 0 for 1000; distances 0 .. window-1 are seen.
        mem_len: solved tokens handed from one training segment to the next.
        tgt_len: segment length of training and evaluation.
        dropout, dropatt, dropword: variational, attention and whole-word dropout (embedding rows).
        input_dropout, position_dropout, hidden_dropout, final_dropout: variational dropout of the
            word vectors, of the position vectors, inside the block, and before the softmax; None
            takes ``dropout``.
        output_dropout: what the mask before the softmax drops: whole tokens (as upstream) or
            features (the same ones at every position of a sequence).
        fixed_iterations: apply F this often instead of solving; for the variants that have no
            equilibrium (``torchdeq-lm``, pre-LN ``torchdeq-seq``).
        unroll_layers: applications of F in the shallow (unrolled) mode of early training.
        causal: strictly causal solver. False mixes Anderson and Broyden over the whole sequence,
            as the official code does; later tokens then leak into earlier states.
        solver, gradient: settings of the equilibrium, see `deqzoo.equilibrium`. A model in half
            precision is solved to 3 eps of its dtype at the finest (0.023 in bfloat16), whatever
            `tol` says: rounding alone moves F by about as much.
    """

    model_type = "deq_transformer"
    keys_to_ignore_at_inference = [
        "cache", "memory", "nll", "n_steps", "residual", "converged",
        "token_steps", "token_residual", "token_converged", "hidden_states", "state",
        "equilibrium_map",
    ]  # fmt: skip
    # Where acceleration stalls the solver falls back to plain steps.
    default_solver = {"name": "anderson", "max_steps": 30, "tol": 1e-3, "patience": 8}
    default_gradient = {"name": "upg", "steps": 5, "damping": 0.8}
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_head",
        "intermediate_size": "d_inner",
        "num_hidden_layers": "n_sublayers",
    }

    variant: Literal["locuslab-deq", "torchdeq-seq", "torchdeq-lm"] = "locuslab-deq"
    vocab_size: int = 33278
    d_model: int = 256
    d_embed: int = 256
    n_head: int = 8
    d_inner: int = 1024
    n_sublayers: int = 1
    norm_placement: Literal["post", "pre"] = "post"
    weight_norm: bool = True
    cutoffs: list[int] | tuple[int, ...] = ()
    div_val: int = 1
    tie_word_embeddings: bool = True
    tie_projections: list[bool] | tuple[bool, ...] = ()
    local_size: int = 0
    mem_len: int = 150
    tgt_len: int = 150
    dropout: float | int = 0.0
    dropatt: float | int = 0.0
    dropword: float | int = 0.0
    input_dropout: float | int | None = None
    position_dropout: float | int | None = None
    hidden_dropout: float | int | None = None
    final_dropout: float | int | None = None
    output_dropout: Literal["token", "feature"] = "token"
    fixed_iterations: int | None = None
    unroll_layers: int = 2
    causal: bool = True
    solver: dict[str, Any] | str | Solver | None = None
    gradient: dict[str, Any] | str | Gradient | None = None
    initializer_range: float | int = 0.01
    use_cache: bool | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.cutoffs = [int(cutoff) for cutoff in self.cutoffs]
        n_clusters = len(self.cutoffs) + 1
        # Transformer-XL's usual choice: the first projection separate, the others shared.
        default = [i > 0 and self.tie_word_embeddings for i in range(n_clusters)]
        self.tie_projections = [bool(t) for t in self.tie_projections] or default
        if self.fixed_iterations is None and self._lacks_equilibrium():
            self.fixed_iterations = 12
        if self.use_cache is None:  # only equilibria can be cached
            self.use_cache = self.fixed_iterations is None
        self.complete_equilibrium()
        super().__post_init__(**kwargs)

    def _lacks_equilibrium(self) -> bool:
        raw_residual = self.variant == "torchdeq-seq" and self.norm_placement == "pre"
        return raw_residual or self.variant == "torchdeq-lm"

    @property
    def window(self) -> int:
        """Number of distances a token sees, itself included."""
        return self.local_size or DEFAULT_WINDOW

    def dropout_rate(self, place: str) -> float:
        """Rate of the variational dropout at "input", "position", "hidden" or "final"."""
        rate = getattr(self, f"{place}_dropout")
        return self.dropout if rate is None else rate

    @property
    def d_head(self) -> int:
        """Features per head."""
        return self.d_model // self.n_head

    @property
    def kind(self) -> str:
        """Form of the block, see :func:`deqzoo.models.deq_transformer.block.apply_layer`."""
        if self.variant == "torchdeq-lm":
            return "sandwich"
        if self.norm_placement == "post":
            return "post"
        return "pre_normalized" if self.variant == "locuslab-deq" else "pre"

    @property
    def has_equilibrium(self) -> bool:
        """Whether F is solved; False: it is applied a fixed number of times."""
        return self.fixed_iterations is None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `DEQConfigMixin.from_dict`, except for `variant`: while a model is loaded it is the
        variant of the weights' file, as in transformers, not the setting of that name."""
        files = kwargs.pop("variant", None) if kwargs.get("return_unused_kwargs") else None
        result: Any = super().from_dict(config_dict, **kwargs)
        return result if files is None else (result[0], {**result[1], "variant": files})

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DEQTransformerConfig":
        """A named configuration, with any setting replaced.

        `solver` and `gradient` change single settings, as in `from_pretrained`.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(
                f"unknown DEQ-Transformer preset {name!r}; the presets are {', '.join(PRESETS)}"
            )
        return cls(**cls.merged(copy.deepcopy(PRESETS[name]), overrides))

    def validate_shape(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.d_model % 2 or self.d_model % self.n_head:
            raise ValueError(
                f"d_model {self.d_model} must be even and a multiple of n_head {self.n_head}."
            )
        edges = [0, *self.cutoffs, self.vocab_size]
        if any(a >= b for a, b in zip(edges[:-1], edges[1:], strict=True)):
            raise ValueError(
                f"cutoffs {list(self.cutoffs)} must rise strictly between 0 and vocab_size "
                f"{self.vocab_size}."
            )
        if self.div_val < 1 or self.d_embed // self.div_val ** len(self.cutoffs) < 1:
            raise ValueError(
                f"div_val {self.div_val} leaves the last of {len(self.cutoffs) + 1} clusters no "
                f"feature of d_embed {self.d_embed}; use a smaller div_val or fewer cutoffs."
            )
        if len(self.tie_projections) != len(self.cutoffs) + 1:
            raise ValueError(
                f"tie_projections needs one flag per cluster ({len(self.cutoffs) + 1}), "
                f"got {len(self.tie_projections)}."
            )
        if any(self.tie_projections) and not self.tie_word_embeddings:
            raise ValueError(
                "tie_projections needs tie_word_embeddings: either both are tied or nothing."
            )
        if min(self.local_size, self.mem_len) < 0:
            raise ValueError("local_size and mem_len must not be negative.")

    def validate_iterations(self) -> None:
        """Refuse solving where there is no equilibrium, and sub-layers where there is one."""
        if self._lacks_equilibrium() and not (self.fixed_iterations or 0) > 0:
            raise ValueError(
                f"{self.variant} with norm_placement={self.norm_placement!r} has no equilibrium; "
                f"set fixed_iterations to a positive number, got {self.fixed_iterations}."
            )
        if self.variant == "torchdeq-lm" and self.norm_placement != "pre":
            raise ValueError("torchdeq-lm is always pre-LN; set norm_placement='pre'.")
        if self.variant != "torchdeq-lm" and self.n_sublayers != 1:
            raise ValueError(
                f"{self.variant} has one sub-layer, got n_sublayers={self.n_sublayers}."
            )
        places = [f"{place}_dropout" for place in ("input", "position", "hidden", "final")]
        for name in ("dropout", "dropatt", "dropword", *places):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1), got {rate}.")
