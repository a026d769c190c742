"""Names of the public classes and where they live; standard library only."""

from __future__ import annotations

import importlib
from typing import Any

#: Family -> public class -> module in the family's folder.
FAMILY_CLASSES = {
    "mdeq": {
        "MDEQConfig": "configuration_mdeq",
        "MDEQForImageClassification": "modeling_mdeq",
        "MDEQImageProcessor": "image_processing_mdeq",
        "MDEQModel": "modeling_mdeq",
    },
    "deq_transformer": {
        "DEQTransformerConfig": "configuration_deq_transformer",
        "DEQTransformerForCausalLM": "modeling_deq_transformer",
        "DEQTransformerModel": "modeling_deq_transformer",
    },
    "ignn": {
        "IGNNConfig": "configuration_ignn",
        "IGNNForGraphClassification": "modeling_ignn",
        "IGNNForNodeClassification": "modeling_ignn",
        "IGNNModel": "modeling_ignn",
    },
}

#: Public class -> module.
CLASSES = {
    name: f"deqzoo.models.{family}.{module}"
    for family, classes in FAMILY_CLASSES.items()
    for name, module in classes.items()
}
FAMILIES = tuple(FAMILY_CLASSES)


def load_class(name: str) -> Any:
    """A public class of a model family by its name."""
    return getattr(importlib.import_module(CLASSES[name]), name)
