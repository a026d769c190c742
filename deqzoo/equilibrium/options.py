"""Settings of solvers and gradients: built by name, checked by rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from math import isfinite
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
        type_name = f"the class {spec.__name__}" if isinstance(spec, type) else type(spec).__name__
        raise TypeError(f"a {kind} is a name, a dict or an object of its class, not {type_name}")
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


def require(ok: bool, owner: Any, field: str, requirement: str) -> None:
    """Refuse a setting that does not meet its requirement.

    Raises:
        ValueError: the owner's name, the field and its value.
    """
    if not ok:
        raise ValueError(
            f"{owner.name}: {field} must be {requirement}, got {getattr(owner, field)!r}"
        )


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True, which is 1 to Python, is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def is_damping(value: Any) -> bool:
    """Whether a value is a number in (0, 1]."""
    return is_number(value) and 0 < value <= 1
