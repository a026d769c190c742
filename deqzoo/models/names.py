"""Names of the public classes and where they live; standard library only."""

from __future__ import annotations

import importlib
from typing import Any

#: Family -> public class -> module in the family's folder.
FAMILY_CLASSES = {
    "mdeq": {
        "MDEQBackbone": "modeling_mdeq",
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
FAMILIES = FAMILY_CLASSES.keys()
"""Model types that the zoo knows; `deqzoo.models.auto.add_family` adds one."""


def load_class(name: str) -> Any:
    """A public class of a model family by its name."""
    return getattr(importlib.import_module(CLASSES[name]), name)


def family_class(family: str, suffix: str) -> Any:
    """The class of a family whose name ends so; None where it has none."""
    names = FAMILY_CLASSES.get(family, {})
    name = next((name for name in names if name.endswith(suffix)), None)
    return None if name is None else load_class(name)
