"""Deep equilibrium models for images, text and graphs, as Hugging Face classes.

Importing the package makes its model types and the names of its checkpoints known to the Auto
classes and pipelines of transformers. It imports neither torch nor transformers itself: public
names are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from deqzoo.models.names import CLASSES
from deqzoo.models.registration import install

__version__ = "0.1.0"

_TOKENIZATION = "deqzoo.models.deq_transformer.tokenization_deq_transformer"
_NAMES = {
    **CLASSES,
    "DEQModel": "deqzoo.models.auto",
    "DEQTrainer": "deqzoo.training.trainer",
    "DEQTrainingArguments": "deqzoo.training.arguments",
    "Equilibrium": "deqzoo.equilibrium",
    "Solution": "deqzoo.equilibrium",
    "Status": "deqzoo.equilibrium",
    "UserError": "deqzoo.errors",
    "detokenize": _TOKENIZATION,
    "fixed_point": "deqzoo.equilibrium",
    "gradient_fidelity": "deqzoo.equilibrium",
    "list_models": "deqzoo.zoo",
    "make_gradient": "deqzoo.equilibrium",
    "make_solver": "deqzoo.equilibrium",
    "prepare_text": _TOKENIZATION,
    "text_style": _TOKENIZATION,
}

__all__ = ["__version__", *sorted(_NAMES)]

install()


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'deqzoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
