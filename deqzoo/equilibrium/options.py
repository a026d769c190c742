"""Settings by name: one way from JSON to the dataclasses of solvers and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def build(kind: str, registry: Mapping[str, type], spec: str | Mapping[str, Any]) -> Any:
    """Build the registered class that a name, or a dict with "name" and settings, describes.

    Raises:
        ValueError: no or an unknown name, or an unknown option; the message lists the valid ones.
        TypeError: `spec` is neither a name nor a dict.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        found = f"the class {spec.__name__}" if isinstance(spec, type) else type(spec).__name__
        raise TypeError(f"a {kind} is a name, a dict or an object of its class, not {found}")
    settings = dict(spec)
    if "name" not in settings:
        raise ValueError(f'a {kind} needs a "name"; choose one of {", ".join(registry)}')
    name = settings.pop("name")
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(registry)}")
    cls = registry[name]
    valid = [field.name for field in fields(cls)]
    unknown = [key for key in settings if key not in valid]
    if unknown:
        raise ValueError(
            f"{kind} {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"its options are {', '.join(valid) or 'none'}"
        )
    return cls(**settings)
