"""DEQ-Transformer language model (Bai, Kolter & Koltun 2019; Bai, Koltun & Kolter 2021).

The hidden states of T tokens are the equilibrium z = F(z; u) of one weight-tied transformer block
with injected word embeddings u. F is causal, hence so is its equilibrium; the solver used here
keeps that property at every tolerance.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from deqzoo.equilibrium import Causal, Gradient, Layout, Solution, Solver, make_solver
from deqzoo.errors import UserError
from deqzoo.models.base import DEQPreTrainedModel, Settings, check_keywords, joined_settings
from deqzoo.models.deq_transformer.adaptive import (
    IGNORED,
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    SharedLinear,
)
from deqzoo.models.deq_transformer.block import (
    CompiledMap,
    EquilibriumMap,
    LayerTensors,
    SolvableMap,
    context_key_value,
    visibility,
)
from deqzoo.models.deq_transformer.cache_deq_transformer import DEQTransformerCache
from deqzoo.models.deq_transformer.configuration_deq_transformer import DEQTransformerConfig
from deqzoo.models.deq_transformer.inputs import (
    check_labels,
    check_past,
    check_positions,
    joined_validity,
    leading_padding_last,
    past_length,
    read_tokens,
    reordered,
    targets_of,
    valid_tokens,
)
from deqzoo.models.deq_transformer.layers import (
    DropoutMasks,
    Injection,
    LayerMasks,
    NormalizedLinear,
    RelativeAttention,
    SubLayer,
    draw_mask,
    draw_masks,
    sinusoids,
)
from deqzoo.models.deq_transformer.memory import SegmentMemory, updated_memory
from deqzoo.models.deq_transformer.outputs import (
    DEQTransformerCausalLMOutput,
    DEQTransformerModelOutput,
    SolveReport,
    token_residual,
)
from deqzoo.models.deq_transformer.stopping import StopWords
from deqzoo.models.weights import row_norms

FIRST_PARTS = (1,)
"""Where the solve of a text without past is cut: the first token, which all others read, is the
hardest one to solve and is solved before them."""


class DEQTransformerPreTrainedModel(DEQPreTrainedModel):
    """Loading, saving and initialisation common to the DEQ-Transformer classes."""

    config_class = DEQTransformerConfig
    config: DEQTransformerConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    _no_split_modules = ["SubLayer"]
    without_weight_norm = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Upstream's: N(0, 0.01), except weight-normalised maps, which keep PyTorch's default."""
        std = self.config.initializer_range
        affine = self.config.variant == "torchdeq-lm"
        if isinstance(module, NormalizedLinear):
            if affine:
                init.normal_(module.direction, mean=0.0, std=std)
            else:
                bound = module.in_features**-0.5
                init.uniform_(module.direction, -bound, bound)
            init.copy_(module.get_parameter("gain"), row_norms(module.direction))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RelativeAttention):
            for bias in (module.content_bias, module.position_bias):
                if self.config.variant == "locuslab-deq":
                    init.normal_(bias, mean=0.0, std=std)
                else:
                    init.uniform_(bias, -0.05, 0.05)
        elif isinstance(module, nn.LayerNorm):
            init.normal_(module.weight, mean=1.0, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding, SharedLinear)):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, Injection) and self.config.dropword > 0:
                # A dropped word must not inject zero: zero would be an equilibrium at which the
                # layer norms have an enormous slope.
                init.normal_(module.bias, mean=0.0, std=std)
            elif (shift := getattr(module, "bias", None)) is not None:
                init.zeros_(shift)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' own. What the configuration ties no longer is stored as its own."""
        if not self.config.tie_word_embeddings:
            self.config.tie_projections = [False] * len(self.config.tie_projections)
        super().save_pretrained(*args, **kwargs)

    def compile_map(self, enabled: bool = True) -> None:
        """Run the equilibrium map under torch.compile, or no longer."""
        self.base_model.map_compiled = enabled

    def use_training_kernels(
        self, compiled: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Prepare the map for training; see `DEQPreTrainedModel.use_training_kernels`.

        With fixed steps losses come from all scores, so that no word is selected on the host.
        """
        super().use_training_kernels(compiled, dtype)
        self.compile_map(compiled)
        self.base_model.map_precision = dtype

    def set_solver(self, name: Settings = None, **settings: Any) -> None:
        """Change the solver from now on; without an equilibrium, `max_steps` applications of F.

        Raises:
            UserError: no equilibrium, and another setting than name, max_steps and tol.
            ValueError: unknown name or option, or a value out of range.
        """
        if self.config.has_equilibrium:
            super().set_solver(name, **settings)
            return
        self.config.fixed_iterations, tol = self._iterations(joined_settings(name, settings))
        own: Any = self.config.solver
        self.config.solver = {**own, "tol": tol}

    def set_gradient(self, name: Settings = None, **settings: Any) -> None:
        """Change the gradient from now on (stored in the config).

        Raises:
            UserError: the model has no equilibrium.
            ValueError: unknown name or option, or a value out of range.
        """
        self._need_equilibrium()
        super().set_gradient(name, **settings)

    def equilibrium_map(
        self,
        input_ids: Tensor,
        memory: SegmentMemory | tuple[Tensor, Tensor] | None = None,
        dropout_masks: DropoutMasks | None = None,
    ) -> tuple[EquilibriumMap, Tensor]:
        """The map of a segment (B, T) and the state (B, T, d) from which its solve starts."""
        base = self.base_model
        masks = dropout_masks or base._masks(input_ids, past_length(None, memory))
        injection = base.inject(input_ids, masks)
        start = base._like(input_ids).new_zeros(*input_ids.shape, self.config.d_model)
        return base.bind(injection, masks, None, memory), start

    def solve(  # type: ignore[override]
        self,
        f: Callable[[Tensor], Tensor],
        z0: Tensor,
        layout: Layout | None = None,
        **options: Any,
    ) -> Solution:
        """As the base class's; by default every token of a causal model is a sample of its own."""
        if layout is None and self.config.causal:
            layout = self._causal(f, z0, None)
        if isinstance(f, SolvableMap) and not self.training:
            options.setdefault("compact", True)
        return super().solve(f, z0, layout, **options)

    def _causal(self, f: Callable[[Tensor], Tensor], z0: Tensor, valid: Tensor | None) -> Causal:
        """Order in which the tokens of a text are solved: in evaluation the first ones first.

        Nothing here may depend on the batch or on the length of the text: what a token gets would
        depend on its neighbours, or on words to come.
        """
        if self.training or not isinstance(f, SolvableMap):
            return Causal(valid)
        begins = f.bias.shape[-1] == z0.shape[1] > 1
        return Causal(valid, cuts=FIRST_PARTS if begins else ())

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """The embedding, where its size is to stay; arguments as in transformers.

        Raises:
            NotImplementedError: the size is to change.
        """
        size = self.config.vocab_size
        n_words = size if new_num_tokens is None else new_num_tokens
        n_words += -n_words % (pad_to_multiple_of or 1)
        if n_words != size:
            raise NotImplementedError(
                f"an adaptive embedding and softmax cannot be resized from {size} to {n_words} "
                "words, since clusters by frequency give new ones no place; leave new words to the "
                "tokenizer's <unk>, or train a new model with "
                f"DEQTransformerConfig(vocab_size={n_words}, ...)"
            )
        return self.get_input_embeddings()

    def _need_equilibrium(self) -> None:
        if not self.config.has_equilibrium:
            raise UserError(
                f"{self.config.variant} without an equilibrium is differentiated through its "
                "iterations; leave gradient out."
            )

    def _iterations(self, solver: Settings) -> tuple[int, float]:
        """Number of applications of F without an equilibrium, and the tolerance of the report."""
        if isinstance(solver, (Solver, Gradient)):
            raise UserError(
                f"{self.config.variant} has no equilibrium that {type(solver).__name__} could "
                "find; use a dict with max_steps and tol."
            )
        settings = {"name": solver} if isinstance(solver, str) else dict(solver or {})
        name = settings.get("name", "fixed_point")
        if name != "fixed_point" or settings.keys() - {"name", "max_steps", "tol"}:
            raise UserError(
                f"{self.config.variant} has no equilibrium that a solver ({name}, "
                f"{', '.join(sorted(settings.keys() - {'name'}))}) could find; use fixed_point "
                "with max_steps and tol."
            )
        own_solver: Any = self.config.solver
        defaults = {"max_steps": self.config.fixed_iterations, "tol": own_solver["tol"]}
        iteration = make_solver({"name": "fixed_point", **defaults, **settings})
        return iteration.max_steps, iteration.tol


class DEQTransformerModel(DEQTransformerPreTrainedModel):
    """Word indices to equilibrium states."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__(config)
        self.embedding = AdaptiveEmbedding(
            config.vocab_size, config.d_model, config.d_embed, list(config.cutoffs), config.div_val
        )
        self.injection = Injection(config.d_model, 3 * config.d_model)
        self.layers = nn.ModuleList(
            SubLayer(
                config.d_model,
                config.n_head,
                config.d_inner,
                weight_norm=config.weight_norm,
                affine=config.variant == "torchdeq-lm",
            )
            for _ in range(config.n_sublayers)
        )
        self.gradient_checkpointing = False
        self.map_compiled = False
        self.map_precision: torch.dtype | None = None  # in training; None: what autocast says
        self.post_init()

    def get_input_embeddings(self) -> AdaptiveEmbedding:
        """The clustered embedding."""
        return self.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the clustered embedding.

        Raises:
            UserError: by something else than an `AdaptiveEmbedding`.
        """
        if not isinstance(value, AdaptiveEmbedding):
            raise UserError(
                f"the words of this model are embedded by an AdaptiveEmbedding, not by "
                f"{type(value).__name__}; vectors of your own go in as inputs_embeds"
            )
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: DEQTransformerCache | None = None,
        memory: SegmentMemory | tuple[Tensor, Tensor] | None = None,
        memory_mask: Tensor | None = None,
        use_cache: bool | None = None,
        solver: Settings = None,
        gradient: Settings = None,
        shallow: bool = False,
        warm_start: bool = False,
        dropout_masks: DropoutMasks | None = None,
        output_hidden_states: bool | None = None,
        output_state: bool = False,
        past_key_values: DEQTransformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        **keywords: Any,
    ) -> DEQTransformerModelOutput:
        """Solve for the states of T new tokens.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) or longer, 0 at left padding; its last T columns are used.
                Padding behind a cache or memory counts in the distances to what they hold.
            cache: cache of earlier tokens; it is extended in place.
            memory: states and injections of the previous segment, as returned by its forward.
            memory_mask: (B, M) bool, False where a memory of fixed length holds nothing yet.
            use_cache: return a cache; excludes ``memory``. Without it the memory of the segment is
                returned: ``config.use_cache`` is what ``generate`` goes by.
            solver, gradient: settings that replace the configured ones for this call.
            shallow: apply F ``config.unroll_layers`` times from zero, differentiably, instead of
                solving (the first phase of training).
            warm_start: start from the newest cached state instead of zero.
            dropout_masks: these instead of random ones.
            output_hidden_states: also return the word vectors and the states; by default as
                the configuration says.
            output_state: also return the map and the state, for ``jacobian_loss``.
            past_key_values: what ``cache`` is called before transformers 5.24.
            inputs_embeds: (B, T, d_model) word vectors, as ``get_input_embeddings()`` makes them,
                instead of input_ids.
            position_ids, cache_position: consecutive, as generation passes them; attention goes by
                distances.

        Raises:
            UserError: no tokens, indices of no word, a past that this model cannot read, or a
                keyword that asks for what it does not have.
        """
        check_keywords(self, keywords)
        tokens = read_tokens(self.config, input_ids, inputs_embeds, self.training)
        cache = past_key_values if cache is None else cache
        check_past(self.config, tokens, cache, memory, use_cache, memory_mask)
        if use_cache and cache is None:
            cache = DEQTransformerCache(self.config.window)
        if cache is not None:
            cache.belong_to(self)
        valid = valid_tokens(attention_mask, tokens)
        check_positions(position_ids, valid)
        n_past = past_length(cache, memory)
        masks = dropout_masks or self._masks(tokens, n_past)
        word_vectors = self.embed(input_ids, masks, inputs_embeds)
        injection = self.injection(word_vectors)
        f = self.bind(injection, masks, cache, memory, valid, memory_mask)
        if self.map_precision is not None and self.training:
            f = f.in_precision(self.map_precision)
        g = CompiledMap(f) if self.map_compiled else f
        # Under autocast the injection is narrower than the state should be.
        start = self._like(tokens).new_zeros(*tokens.shape, self.config.d_model)
        if warm_start and cache is not None and cache.last_state is not None:
            start = start + cache.last_state
        report = self._solve(g, start, valid, solver, gradient, shallow)
        if cache is not None:
            cache.remember(f, report.state, valid)
            memory = None
        elif valid is None:
            memory = updated_memory(memory, report.state, injection, self.config.mem_len)
        else:
            memory = None  # padding cannot be told from tokens in a memory
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return DEQTransformerModelOutput(
            last_hidden_state=report.state,
            cache=cache,
            memory=None if memory is None else (memory[0], memory[1]),
            hidden_states=(word_vectors, report.state) if output_hidden_states else None,
            state=report.state.detach() if output_state else None,
            equilibrium_map=(g if self.fixed_steps else f) if output_state else None,
            **report.per_sample(valid),
        )

    def _masks(self, input_ids: Tensor, n_past: int) -> DropoutMasks:
        if not self.training:
            return DropoutMasks(layers=(LayerMasks(),) * self.config.n_sublayers)
        batch, n_tokens = input_ids.shape
        return draw_masks(self.config, batch, n_tokens, n_past, self._like(input_ids))

    def _like(self, tensor: Tensor) -> Tensor:
        """An empty tensor in the dtype of the states, on the device of another tensor."""
        return torch.empty(0, dtype=self.dtype, device=tensor.device)

    def embed(
        self, input_ids: Tensor | None, masks: DropoutMasks, vectors: Tensor | None = None
    ) -> Tensor:
        """Scaled vectors (B, T, d) of words (B, T), or of given vectors, with dropout. Dropout of
        whole words leaves out given vectors."""
        x = self.embedding(input_ids, masks.words) if vectors is None else vectors
        x = x * self.embedding.scale
        return x if masks.input is None else x * masks.input

    def inject(self, input_ids: Tensor, masks: DropoutMasks) -> Tensor:
        """Injections (B, T, 3d) of words (B, T)."""
        return self.injection(self.embed(input_ids, masks))

    def bind(
        self,
        injection: Tensor,
        masks: DropoutMasks,
        cache: DEQTransformerCache | None = None,
        memory: SegmentMemory | tuple[Tensor, Tensor] | None = None,
        valid: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> EquilibriumMap:
        """F for these tokens: effective weights, masks, frozen past and visibility put in place."""
        n_new, n_past = injection.shape[1], past_length(cache, memory)
        n_keys = n_past + n_new
        layers = self._bound_layers(n_keys, masks, cache, self._like(injection))
        if memory is not None:
            layers = tuple(
                layer._replace(past_key=key, past_value=value)
                for layer in layers
                for key, value in [context_key_value(*memory, layer, self.config.kind)]
            )
        past_valid = memory_mask
        if cache is not None and n_past:
            past = cache.layer
            layers = tuple(
                layer._replace(past_key=past.keys, past_value=past.values) for layer in layers
            )
            past_valid = past.valid
        key_valid = joined_validity(past_valid, valid, injection.shape[0], n_past, n_new)
        bias = visibility(
            n_new,
            n_keys,
            self.config.window,
            key_valid,
            dtype=injection.dtype,
            device=injection.device,
        )
        kind = SolvableMap if self.config.has_equilibrium else EquilibriumMap
        return kind(layers, injection, bias, self.config.kind, self.config.window)

    def _bound_layers(
        self, n_keys: int, masks: DropoutMasks, cache: DEQTransformerCache | None, like: Tensor
    ) -> tuple[LayerTensors, ...]:
        """Effective weights with position keys for K keys; a cache keeps them between its calls."""
        if cache is None or torch.is_grad_enabled() or self.training:
            return self._fresh_layers(n_keys, masks, like)
        versions = self._block_versions()
        is_stale = cache.bound is None or cache.bound_versions != versions
        if is_stale or cache.bound[0].relative.shape[1] < n_keys:
            room = max(64, min(2 * n_keys, n_keys + self.config.window))
            cache.bound, cache.bound_versions = self._fresh_layers(room, masks, like), versions
        return tuple(
            layer._replace(relative=layer.relative[:, layer.relative.shape[1] - n_keys :])
            for layer in cache.bound
        )

    def _block_versions(self) -> tuple[tuple[int, int], ...]:
        """What differs once a weight of the block is another, or was written to."""
        weights = self.layers.parameters()
        return tuple((id(w), 0 if w.is_inference() else w._version) for w in weights)

    def _fresh_layers(
        self, n_keys: int, masks: DropoutMasks, like: Tensor
    ) -> tuple[LayerTensors, ...]:
        table = sinusoids(n_keys, self.config.d_model, dtype=like.dtype, device=like.device)
        if masks.positions is not None:
            table = table * masks.positions[0]
        layers: Any = self.layers
        return tuple(
            layer.bind(layer.position_keys(table), layer_masks)
            for layer, layer_masks in zip(layers, masks.layers, strict=True)
        )

    def _solve(
        self,
        f: Any,
        start: Tensor,
        valid: Tensor | None,
        solver: Settings,
        gradient: Settings,
        shallow: bool,
    ) -> SolveReport:
        if shallow:
            own: Any = self.config.solver
            return self._iterate(f, start, self.config.unroll_layers, own["tol"])
        if not self.config.has_equilibrium:
            if gradient is not None:
                self._need_equilibrium()
            return self._iterate(f, start, *self._iterations(solver))
        order = None
        alone = isinstance(f, SolvableMap) and f.bias.shape[-1] == start.shape[1]
        if valid is not None and alone and not self.training:
            order, valid = leading_padding_last(valid)
            f, start = f.reordered(order, valid, self.config.window), reordered(start, order)
        layout = self._causal(f, start, valid) if self.config.causal else None
        solution = self.solve(f, start, layout=layout, solver=solver, gradient=gradient)
        steps, residual, converged = solution.n_steps, solution.residual, solution.converged
        if steps.ndim == 1:  # one report per sequence
            steps, residual, converged = (
                t.unsqueeze(1).expand(start.shape[:2]) for t in (steps, residual, converged)
            )
        report = SolveReport(solution.state, steps, residual, converged)
        return report if order is None else report.reordered(order.argsort(1))

    def _iterate(self, f: EquilibriumMap, z: Tensor, n: int, tol: float) -> SolveReport:
        """Apply F exactly n >= 1 times; every step is differentiable."""
        if n < 1:
            raise UserError(f"The number of applications must be at least 1, got {n}.")
        previous, z = self.iterate(f, z, n)
        residual = token_residual(previous.detach(), z.detach())
        steps = torch.full(residual.shape, n, dtype=torch.int64, device=z.device)
        return SolveReport(z, steps, residual, residual <= tol)


class DEQTransformerForCausalLM(DEQTransformerPreTrainedModel, GenerationMixin):
    """DEQ-Transformer with an adaptive softmax over the next word.

    Train with label smoothing under `DEQTrainer` only: transformers' own `Trainer` shifts the
    labels for the classes it knows by name, and would score this model against unshifted ones.
    """

    accepts_loss_kwargs = True  # Trainer counts the scored words of all batches of a step

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__(config)
        self.transformer = DEQTransformerModel(config)
        self.lm_head = AdaptiveSoftmax(
            config.vocab_size, config.d_model, config.d_embed, list(config.cutoffs), config.div_val
        )
        self._tied_weights_keys = self._tied_keys()
        self.post_init()

    def _tied_keys(self) -> dict[str, str]:
        """Shared parameters: every table, and the flagged projections."""
        source = "transformer.embedding"
        keys = {
            f"lm_head.tables.{i}.weight": f"{source}.tables.{i}.weight"
            for i in range(len(self.lm_head.tables))
        }
        n_sources = len(self.transformer.embedding.projections)
        for i, is_tied in enumerate(self.config.tie_projections):
            if is_tied and n_sources and i < len(self.lm_head.projections):
                origin = i if n_sources > 1 else 0
                keys[f"lm_head.projections.{i}.weight"] = f"{source}.projections.{origin}.weight"
        return keys

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' own. Tables that the configuration ties no longer become their own."""
        if not self.config.tie_word_embeddings:
            for target, source in self._tied_weights_keys.items():
                if self.get_parameter(target) is self.get_parameter(source):
                    owner = self.get_submodule(target.rpartition(".")[0])
                    owner.weight = nn.Parameter(self.get_parameter(source).detach().clone())
        super().save_pretrained(*args, **kwargs)

    def get_output_embeddings(self) -> None:
        """None: the softmax has several tables, see ``lm_head``."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: forward makes its own cache, which holds solved tokens."""
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Assisted decoding asks for the cache before the first forward could make it."""
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        name = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"
        if generation_config.use_cache is not False and self.config.has_equilibrium:
            if model_kwargs.get(name) is None:
                model_kwargs[name] = DEQTransformerCache(self.config.window)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers' own, without the tokenizers of `generate`, which it hands on.

        `inputs_embeds` has a name, since `generate` takes word vectors of such models only.

        The cache is there by its older name, too: PEFT looks there whether a soft prompt is due.
        """
        parent: Any = super()
        inputs: dict[str, Any] = parent.prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("cache") is not None:
            inputs["past_key_values"] = inputs["cache"]
        return {k: v for k, v in inputs.items() if not k.endswith("tokenizer")}

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None, **kwargs: Any
    ) -> Any:
        """transformers' own `stop_strings` want a tokenizer of pieces; the zoo's are of words."""
        strings = generation_config.stop_strings
        own = strings is not None and tokenizer is not None  # without one, transformers asks for it
        if own:
            generation_config.stop_strings = None
        try:
            parent: Any = super()
            criteria = parent._get_stopping_criteria(
                generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs
            )
        finally:
            generation_config.stop_strings = strings
        if own:
            criteria.append(StopWords(strings, tokenizer))
        return criteria

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: DEQTransformerCache | None = None,
        memory: SegmentMemory | tuple[Tensor, Tensor] | None = None,
        memory_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shift: bool = True,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        solver: Settings = None,
        gradient: Settings = None,
        shallow: bool = False,
        warm_start: bool = False,
        dropout_masks: DropoutMasks | None = None,
        output_hidden_states: bool | None = None,
        output_state: bool = False,
        past_key_values: DEQTransformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **keywords: Any,
    ) -> DEQTransformerCausalLMOutput:
        """Score the next words.

        Args:
            labels: (B, T) int64, the tokens themselves; -100 is not scored.
            shift: False where the labels are the next tokens already.
            logits_to_keep: compute logits for that many last positions (0: all), or for these.
            return_logits: False leaves logits out; with labels the loss then touches only the
                clusters that occur, and no (B, T, vocab_size) tensor is made.

            shift_labels: (B, T) the words after each token, as labels with shift=False.
            num_items_in_batch: divide the summed loss by this number instead of that of the
                scored words; Trainer counts them over all batches of a step. Labels at padding
                are meant to be counted, too: the scored words of the batch stand for them.

        The other arguments are those of :meth:`DEQTransformerModel.forward`.

        Raises:
            UserError: labels of another shape or of no word, and what the base model refuses.
        """
        targets = None
        # Not in the signature: Trainer takes every argument named like that for required labels.
        shift_labels = keywords.pop("shift_labels", None)
        if shift_labels is not None:
            labels, shift = shift_labels, False
        if labels is not None:
            tokens = read_tokens(self.config, input_ids, inputs_embeds, self.training)
            targets = self.next_words(tokens, labels, shift, attention_mask)
        base = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            cache=past_key_values if cache is None else cache,
            memory=memory,
            memory_mask=memory_mask,
            use_cache=use_cache,
            solver=solver,
            gradient=gradient,
            shallow=shallow,
            warm_start=warm_start,
            dropout_masks=dropout_masks,
            output_hidden_states=output_hidden_states,
            output_state=output_state,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **keywords,
        )
        hidden = self._output_dropout(base.last_hidden_state, dropout_masks)
        if not self.training:
            # Where no state was ever finite the scores would be those of the start: NaN instead.
            is_unknown = ~base.token_residual.isfinite().unsqueeze(-1)
            hidden = hidden.masked_fill(is_unknown, float("nan"))
        loss = nll = logits = None
        if targets is not None:
            waits = not (self.transformer.fixed_steps and self.training)
            score = self.lm_head.nll if waits else self.lm_head.dense_nll
            nll = score(hidden, targets)
            n_scored = (targets != IGNORED).sum()
            loss = nll.sum() / n_scored
            if num_items_in_batch is not None and labels is not None:
                # Trainer knows no padding: it counts labels that are not scored, e.g. the first
                # word behind padding on the left, or padding that is left in the labels.
                n_counted = (targets_of(labels, shift, None) != IGNORED).sum()
                loss = nll.sum() * (n_counted / n_scored.clamp(min=1)) / num_items_in_batch
        if return_logits:
            positions = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden[:, positions])
        report = {k: v for k, v in base.items() if k != "last_hidden_state"}
        return DEQTransformerCausalLMOutput(loss=loss, logits=logits, nll=nll, **report)

    def next_words(
        self,
        input_ids: Tensor,
        labels: Tensor,
        shift: bool = True,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What a forward with these arguments scores: the words after each token, (B, T) int64,
        -100 where nothing is scored.

        Raises:
            UserError: labels of another shape than input_ids, or of no word.
        """
        check_labels(self.config, labels, input_ids, self.training)
        return targets_of(labels, shift, attention_mask)

    def _output_dropout(self, hidden: Tensor, masks: DropoutMasks | None) -> Tensor:
        """Equilibrium (B, T, d) behind the output dropout of training."""
        if masks is not None:
            return hidden if masks.hidden is None else hidden * masks.hidden
        rate = self.config.dropout_rate("final")
        if not self.training or rate == 0:
            return hidden
        batch, n_tokens, width = hidden.shape
        whole_tokens = self.config.output_dropout == "token"
        shape = (batch, n_tokens, 1) if whole_tokens else (batch, 1, width)
        mask = draw_mask(shape, rate, hidden)
        return hidden if mask is None else hidden * mask
