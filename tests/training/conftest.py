"""What tests of training runs share."""

import pytest
import torch

from deqzoo.training import images


@pytest.fixture
def pictures(monkeypatch):
    """24 training and 8 validation pictures in place of CIFAR-10."""

    def load(split, data=None, **options):
        n = 24 if split == "train" else 8
        generator = torch.Generator().manual_seed(n)
        pixels = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.arange(n) % 10
        names = images.CIFAR10.classes
        return images.Pictures(pixels, labels, names, split, "made", False, "cifar10")

    monkeypatch.setitem(images.LOADERS, "cifar10", load)
    monkeypatch.setattr(images, "divide", lambda *_: (load("train"), load("validation")))
