"""What the tests of training steps share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deqzoo.tasks import images

READS = {"tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"}


class Reads(TorchFunctionMode):
    """Notes what would read a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS and args and isinstance(args[0], torch.Tensor):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Elsewhere(TorchDispatchMode):
    """Notes operations with tensors on another device: a copy from the host is no captured one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.found.append(str(function))
        return out


@pytest.fixture
def never_waits() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context that fails where something on meta tensors would wait for a device.

    Meta tensors have no values: a boolean index or another shape that depends on them raises.
    """

    @contextlib.contextmanager
    def watch() -> Iterator[None]:
        with Reads() as reads, Elsewhere() as elsewhere:
            yield
        assert reads.found == []
        assert elsewhere.found == []

    return watch


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
