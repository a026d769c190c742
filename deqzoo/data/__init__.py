"""Data sets as tensors."""

from __future__ import annotations

from deqzoo.data.cifar import CIFAR10, load_cifar10
from deqzoo.data.imagenette import IMAGENETTE, load_imagenette

__all__ = ["CIFAR10", "IMAGENETTE", "load_cifar10", "load_imagenette"]
