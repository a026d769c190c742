"""Speed of the training path on the CPU: `python benchmarks/training.py`.

For MDEQ's CIFAR sizes and the resolutions of the recipes: the map forward, forward and backward,
and a whole training step (solver, gradient, loss, Muon), in floating-point operations per second of
process CPU time on one thread. The variants add up: memory layout, precision, compiled norm.
`--books` compares, in turns, whole steps by `fixed_point`, which measures every evaluation, with
those of recipes (`fixed_point_of_steps`, no books). `--convolutions` compares, in turns, steps with
coarse convolutions as matrix products and steps by oneDNN's convolutions alone, and each with
its convolutions by themselves; ResNet-18 for scale.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import markdown_table, stable_minima, write_results
from transformers import ResNetConfig, ResNetForImageClassification

from deqzoo.equilibrium import make_gradient
from deqzoo.models.mdeq import convolution, map_mdeq
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification
from deqzoo.recipe import Optimizer
from deqzoo.training.cost import count_flops
from deqzoo.training.optimizers import build_optimizer

SIZES = {"TINY": "mdeq-phantom-cifar-small", "LARGE": "mdeq-phantom-cifar-large"}
SOLVER = {"name": "anderson", "max_steps": 5, "tol": 0.0}
GRADIENTS = {
    "UPG(3)": {"name": "upg", "steps": 3, "damping": 0.8},
    "NPG(3)": {"name": "npg", "steps": 3, "damping": 0.8},
}
VARIANTS: dict[str, dict[str, bool]] = {
    "float32": {},
    "float32, channels-last": {"channels_last": True},
    "float32, channels-last, compiled norm": {"channels_last": True, "norm": True},
    "bf16, channels-last": {"channels_last": True, "bf16": True},
    "bf16, channels-last, compiled norm": {"channels_last": True, "bf16": True, "norm": True},
}


def measure(size: str, side: int, batch: int, variant: dict[str, bool], seconds: float) -> dict:
    """GFLOP/s of the map and of whole steps, and pictures per second."""
    torch.manual_seed(0)
    model = MDEQForImageClassification(MDEQConfig.from_preset(SIZES[size])).train()
    if variant.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)
    if variant.get("norm") and not model.use_native_norm():
        return {}
    optimizer = build_optimizer(model, Optimizer(name="muon", lr=1e-4))
    pixels = torch.randn(batch, 3, side, side)
    labels = torch.randint(10, (batch,))
    per_picture = _map_flops(model, side)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=variant.get("bf16", False))

    def forward() -> Any:
        with autocast(), torch.no_grad():
            f, state = model.equilibrium_map(pixels)
            return f(state)

    def forward_backward() -> None:
        with autocast():
            f, state = model.equilibrium_map(pixels)
            out = f(tuple(z.requires_grad_() for z in state))
        sum(z.float().sum() for z in out).backward()
        model.zero_grad()

    def step(gradient: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            with autocast():
                loss = model(pixels, labels=labels, solver=SOLVER, gradient=gradient).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    runs = {"forward": forward, "forward + backward": forward_backward}
    runs |= {name: step(gradient) for name, gradient in GRADIENTS.items()}
    for run in runs.values():
        run()
    least = stable_minima(runs, seconds)
    evaluations = {"forward": 1.0, "forward + backward": 3.0}
    evaluations |= {
        name: SOLVER["max_steps"]
        + 1
        + make_gradient(gradient).cost(SOLVER["max_steps"]).evaluations
        for name, gradient in GRADIENTS.items()
    }
    row = {
        f"{name}, GFLOP/s": evaluations[name] * per_picture * batch / least[name] / 1e9
        for name in runs
    }
    return row | {f"{name}, pictures/s": batch / least[name] for name in GRADIENTS}


def without_books(size: str, side: int, batch: int, seconds: float) -> dict[str, float]:
    """Pictures per second of whole steps with the solver's books and without, taken in turns."""
    torch.manual_seed(0)
    model = MDEQForImageClassification(MDEQConfig.from_preset(SIZES[size])).train()
    model = model.to(memory_format=torch.channels_last)
    model.use_native_norm()
    optimizer = build_optimizer(model, Optimizer(name="muon", lr=1e-4))
    pixels, labels = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))

    def step(books: bool) -> Callable[[], None]:
        def run() -> None:
            model.use_fixed_steps(not books)
            with torch.autocast("cpu", torch.bfloat16):
                gradient = GRADIENTS["UPG(3)"]
                loss = model(pixels, labels=labels, solver=SOLVER, gradient=gradient).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    runs = {"with books": step(True), "without": step(False)}
    for run in runs.values():
        run()
    least = stable_minima(runs, seconds)
    row = {f"{name}, pictures/s": batch / least[name] for name in runs}
    return row | {"ratio": least["with books"] / least["without"]}


@contextlib.contextmanager
def by_products(enabled: bool) -> Iterator[None]:
    """Let coarse convolutions be matrix products, where the processor gains by it, or never."""
    known = convolution.has_amx
    convolution.has_amx = known if enabled else lambda: False
    try:
        yield
    finally:
        convolution.has_amx = known


def convolutions(size: str, side: int, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Whole steps with and without matrix products, and the convolutions in them, in turns."""
    torch.manual_seed(0)
    model = MDEQForImageClassification(MDEQConfig.from_preset(SIZES[size])).train()
    model = model.to(memory_format=torch.channels_last)
    model.use_native_norm()
    model.use_fixed_steps()
    resnet = _resnet18().train().to(memory_format=torch.channels_last)
    pixels, labels = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    optimizers = [build_optimizer(m, Optimizer(name="muon", lr=1e-4)) for m in (model, resnet)]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixels, labels=labels, solver=SOLVER, gradient=GRADIENTS["UPG(3)"]).loss
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def scale() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(resnet(pixels), labels)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    shapes = _convolutions_of(model, pixels)
    # Five steps and their last evaluation, then three that are recorded.
    plain, recorded = SOLVER["max_steps"] + 1, GRADIENTS["UPG(3)"]["steps"]

    def bare() -> None:
        for x, weight, stride, dy in shapes:
            with torch.no_grad():
                for _ in range(plain):
                    convolution.same_conv2d(x, weight, stride)
            for _ in range(recorded):
                y = convolution.same_conv2d(x, weight, stride, once=True)
                torch.autograd.grad(y, (x, weight), dy)

    def under(enabled: bool, run: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            with by_products(enabled):
                run()

        return call

    runs: dict[str, Callable[[], None]] = {"ResNet-18": scale}
    for enabled, name in ((False, "oneDNN"), (True, "products")):
        runs |= {f"{name}, step": under(enabled, step), f"{name}, bare": under(enabled, bare)}
    for run in runs.values():
        run()
    least = stable_minima(runs, seconds)
    flops = (plain + 3 * recorded) * sum(
        2.0 * dy.numel() * weight[0].numel() for _, weight, _, dy in shapes
    )
    rows = [
        {
            "size": size,
            "side": side,
            "coarse convolutions": name,
            "step, s": least[f"{name}, step"],
            "pictures/s": batch / least[f"{name}, step"],
            "convolutions alone, s": least[f"{name}, bare"],
            "their GFLOP/s": flops / least[f"{name}, bare"] / 1e9,
            "their share of the step": least[f"{name}, bare"] / least[f"{name}, step"],
        }
        for name in ("oneDNN", "products")
    ]
    taken = least["ResNet-18"]
    scale_row = {"size": "ResNet-18", "side": side, "step, s": taken, "pictures/s": batch / taken}
    return [*rows, {column: scale_row.get(column) for column in rows[0]}]


def _convolutions_of(model: MDEQForImageClassification, pixels: torch.Tensor) -> list[tuple]:
    """Input, weight, stride and cotangent, in bfloat16, of every convolution of the map."""
    found = []
    original = map_mdeq.same_conv2d

    def keep(x: torch.Tensor, weight: torch.Tensor, stride: int = 1, once: bool = False) -> Any:
        y = original(x, weight, stride, once)
        tensors = (x, weight, y)
        x, weight, dy = (
            torch.randn_like(t, dtype=torch.bfloat16, memory_format=torch.channels_last)
            for t in tensors
        )
        weight *= (2 / weight[0].numel()) ** 0.5
        found.append((x.requires_grad_(), weight.requires_grad_(), stride, dy))
        return y

    map_mdeq.same_conv2d = keep
    try:
        with torch.no_grad():
            f, state = model.equilibrium_map(pixels)
            f(state)
    finally:
        map_mdeq.same_conv2d = original
    return found


def _resnet18() -> torch.nn.Module:
    """ResNet-18 for pictures of 32 pixels: a stem of one 3x3 convolution."""
    config = ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=10,
    )
    model = ResNetForImageClassification(config)
    model.resnet.embedder.pooler = torch.nn.Identity()
    model.resnet.embedder.embedder.convolution = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixels).logits

    return Logits()


def _map_flops(model: MDEQForImageClassification, side: int) -> float:
    f, state = model.eval().equilibrium_map(torch.zeros(1, 3, side, side))
    model.train()
    return count_flops(lambda: f(state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sides", nargs="+", type=int, default=[16, 24, 32])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="per variant")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="training", help="of the files with all variants")
    parser.add_argument("--books", action="store_true", help="steps with and without books only")
    parser.add_argument("--convolutions", action="store_true", help="coarse convolutions only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows: list[dict[str, Any]] = []
    if arguments.books:
        for size in arguments.sizes:
            for side in arguments.sides:
                found = without_books(size, side, arguments.batch, arguments.seconds)
                rows.append({"size": size, "side": side, **found})
                print(rows[-1], flush=True)
        what = "bf16, UPG(3) after five Anderson steps, one thread, process CPU time"
        _write(arguments, "training_books", rows, what)
        return
    if arguments.convolutions:
        for size in arguments.sizes:
            for side in arguments.sides:
                rows += convolutions(size, side, arguments.batch, arguments.seconds)
        what = "bf16, UPG(3) after five Anderson steps, Muon, one thread, process CPU time"
        _write(arguments, "training_convolutions", rows, what)
        return
    for size in arguments.sizes:
        for side in arguments.sides:
            for name, variant in VARIANTS.items():
                found = measure(size, side, arguments.batch, variant, arguments.seconds)
                if found:
                    rows.append({"size": size, "side": side, "variant": name, **found})
                    print(size, side, name, flush=True)
    _write(arguments, arguments.name, rows, "one thread, process CPU time")


def _write(arguments: argparse.Namespace, name: str, rows: list[dict[str, Any]], what: str) -> None:
    columns = list(rows[0])
    table = markdown_table(columns, [[row[c] for c in columns] for row in rows])
    text = f"Batch {arguments.batch}, {what}.\n\n{table}"
    write_results(arguments.output, name, {"batch": arguments.batch, "rows": rows}, text)


if __name__ == "__main__":
    main()
