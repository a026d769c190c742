"""Data sets as tensors."""

from __future__ import annotations

from deqzoo.data.image_sets import (
    CIFAR10,
    IMAGENETTE,
    TINY_IMAGENET,
    load_cifar10,
    load_imagenette,
    load_tiny_imagenet,
)

__all__ = [
    "CIFAR10",
    "IMAGENETTE",
    "TINY_IMAGENET",
    "load_cifar10",
    "load_imagenette",
    "load_tiny_imagenet",
]
