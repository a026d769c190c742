"""DEQ-Transformer language models."""

from deqzoo.models.deq_transformer.cache_deq_transformer import DEQTransformerCache
from deqzoo.models.deq_transformer.configuration_deq_transformer import DEQTransformerConfig
from deqzoo.models.deq_transformer.modeling_deq_transformer import (
    DEQTransformerForCausalLM,
    DEQTransformerModel,
    DEQTransformerPreTrainedModel,
)

__all__ = [
    "DEQTransformerCache",
    "DEQTransformerConfig",
    "DEQTransformerForCausalLM",
    "DEQTransformerModel",
    "DEQTransformerPreTrainedModel",
]
