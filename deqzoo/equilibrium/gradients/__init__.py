"""Gradients by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deqzoo.equilibrium.gradients.base import Gradient
from deqzoo.equilibrium.gradients.implicit import Implicit
from deqzoo.equilibrium.gradients.phantom import JFB, NPG, UPG
from deqzoo.equilibrium.gradients.unrolled import Unrolled
from deqzoo.equilibrium.options import build

GRADIENTS: dict[str, type[Gradient]] = {
    cls.name: cls for cls in (Implicit, UPG, NPG, JFB, Unrolled)
}


def make_gradient(spec: Gradient | str | Mapping[str, Any]) -> Gradient:
    """Return the gradient that a name or a dict ("name" and its settings) describes.

    Raises:
        ValueError: unknown name, unknown option, or a value out of range.
    """
    return spec if isinstance(spec, Gradient) else build("gradient", GRADIENTS, spec)


__all__ = ["GRADIENTS", "JFB", "NPG", "UPG", "Gradient", "Implicit", "Unrolled", "make_gradient"]
