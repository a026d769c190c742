"""Data sets as tensors."""

from __future__ import annotations

from deqzoo.data.cifar import CIFAR10, load_cifar10
from deqzoo.data.imagenette import IMAGENETTE, load_imagenette
from deqzoo.data.tiny_imagenet import TINY_IMAGENET, load_tiny_imagenet

__all__ = [
    "CIFAR10",
    "IMAGENETTE",
    "TINY_IMAGENET",
    "load_cifar10",
    "load_imagenette",
    "load_tiny_imagenet",
]
