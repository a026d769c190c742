"""The official MDEQ configurations, as data.

Sources: locuslab/deq (`mdeq-...`), Gsunshine/phantom_grad (`mdeq-phantom-...`) and the model zoo
of locuslab/torchdeq (`mdeq-torchdeq-...`). The solvers' limits are the official ones; tolerances
are per sample here, where the first two sources measure one norm over the whole batch.
"""

from __future__ import annotations

from typing import Any

CIFAR10_LABELS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def _broyden(max_steps: int, stop_mode: str) -> dict[str, Any]:
    return {"name": "broyden", "max_steps": max_steps, "tol": 1e-3, "stop_mode": stop_mode}


def _implicit(max_steps: int, stop_mode: str) -> dict[str, Any]:
    return {"name": "implicit", "solver": _broyden(max_steps, stop_mode)}


def _upg(damping: float) -> dict[str, Any]:
    return {"name": "upg", "steps": 5, "damping": damping}


def _cifar_architecture(channels: list[int], head: list[int], final: int) -> dict[str, Any]:
    return {
        "channels": channels,
        "head_channels": head,
        "final_channels": final,
        "expansion": 5,
        "stem_downsamples": 0,
        "image_size": 32,
        "id2label": dict(enumerate(CIFAR10_LABELS)),
        "label2id": {label: index for index, label in enumerate(CIFAR10_LABELS)},
    }


def _imagenet_architecture(width: int, head: int, expansion: int = 5) -> dict[str, Any]:
    return {
        "channels": [width, 2 * width, 4 * width, 8 * width],
        "head_channels": [head, 2 * head, 4 * head, 8 * head],
        "final_channels": 2048,
        "expansion": expansion,
        "stem_downsamples": 2,
        "image_size": 224,
        "num_labels": 1000,
    }


_TINY = _cifar_architecture([24, 24], [8, 16], 200)
_LARGE = _cifar_architecture([32, 64, 128, 256], [14, 28, 56, 112], 1680)
_IMAGENET_SMALL = _imagenet_architecture(32, 24)


def _locuslab(
    architecture: dict[str, Any],
    *,
    affine_post: bool,
    dropout: float,
    unroll_layers: int,
    forward_steps: int,
    backward_steps: int,
    stop_mode: str,
) -> dict[str, Any]:
    return architecture | {
        "affine_post": affine_post,
        "dropout": dropout,
        "unroll_layers": unroll_layers,
        "solver": _broyden(forward_steps, stop_mode),
        "gradient": _implicit(backward_steps, stop_mode),
    }


def _imagenet(architecture: dict[str, Any], unroll_layers: int, **overrides: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "affine_post": True,
        "dropout": 0.0,
        "forward_steps": 26,
        "backward_steps": 27,
        "stop_mode": "abs",
    }
    return _locuslab(architecture, unroll_layers=unroll_layers, **(settings | overrides))


def _cifar(architecture: dict[str, Any], dropout: float, **overrides: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "affine_post": False,
        "unroll_layers": 10,
        "forward_steps": 18,
        "backward_steps": 20,
        "stop_mode": "rel",
    }
    return _locuslab(architecture, dropout=dropout, **(settings | overrides))


def _phantom(architecture: dict[str, Any], steps: int, damping: float) -> dict[str, Any]:
    return architecture | {"solver": _broyden(steps, "rel"), "gradient": _upg(damping)}


_IMAGENET_REG = {"affine_post": False, "forward_steps": 14, "backward_steps": 14}

PRESETS: dict[str, dict[str, Any]] = {
    "mdeq-cifar-tiny": _cifar(_TINY, 0.25),
    "mdeq-cifar-large": _cifar(_LARGE, 0.3),
    "mdeq-cifar-large-reg": _cifar(
        _LARGE, 0.22, unroll_layers=8, forward_steps=8, backward_steps=7
    ),
    "mdeq-imagenet-small": _imagenet(_IMAGENET_SMALL, 5),
    "mdeq-imagenet-small-reg": _imagenet(
        _imagenet_architecture(32, 28), 5, dropout=0.02, **_IMAGENET_REG
    ),
    "mdeq-imagenet-large": _imagenet(_imagenet_architecture(80, 32), 4),
    "mdeq-imagenet-large-reg": _imagenet(_imagenet_architecture(80, 32), 4, **_IMAGENET_REG),
    "mdeq-imagenet-xl": _imagenet(_imagenet_architecture(88, 32, expansion=6), 4),
    "mdeq-phantom-cifar-small": _phantom(_TINY, 22, 0.5),
    "mdeq-phantom-cifar-large": _phantom(_LARGE, 18, 0.5),
    # The ImageNet recipes of these two sources never call the initialisation of the reference.
    "mdeq-phantom-imagenet-small": _phantom(_IMAGENET_SMALL, 26, 0.6)
    | {"unroll_layers": 5, "initializer_range": None},
    "mdeq-torchdeq-cifar-small": _TINY
    | {"weight_norm": "all", "solver": _broyden(22, "abs"), "gradient": _upg(0.5)},
    "mdeq-torchdeq-cifar-large": _LARGE
    | {"weight_norm": "all", "solver": _broyden(18, "abs"), "gradient": _upg(0.7)},
    "mdeq-torchdeq-imagenet-small": _IMAGENET_SMALL
    | {
        "weight_norm": "block",
        "unroll_layers": 5,
        "initializer_range": None,
        "solver": {"name": "fixed_point", "max_steps": 26, "tol": 1e-3, "stop_mode": "abs"},
        "gradient": _upg(1.0),
    },
}
