"""Pictures per second without gradients, and whether the fast path gives the same answers.

`python benchmarks/inference.py speed` takes the sides in turns, batch by batch, in process CPU time
on one thread, images prepared before. `python benchmarks/inference.py agreement` counts on how many
pictures of the test split the class is that of plain float32. Both add their rows, by model, to
`results/inference.json` and its table. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import markdown_table, write_results
from torch import Tensor
from torchdeq.solver import anderson_solver

from deqzoo import DEQModel
from deqzoo.equilibrium.state import StatePacker
from deqzoo.evaluation.images import pictures_of
from deqzoo.models.mdeq.native_norm import group_norm, native_norm_available
from deqzoo.models.readers import load_processor, to_batch

Answer = tuple[Tensor, Tensor, Tensor]
"""Logits (B, C), solver steps (B,), converged (B,)."""
Side = Callable[[Any, Tensor], Answer]


def _forward(**keywords: Any) -> Side:
    def run(model: Any, pixels: Tensor) -> Answer:
        output = model(pixels, **keywords)
        return output.logits, output.n_steps, output.converged

    return run


def _plain(model: Any, pixels: Tensor) -> Answer:
    model.use_inference_kernels(False)
    answer = _forward()(model, pixels)
    model.use_inference_kernels()
    return answer


def _own_norm(model: Any, pixels: Tensor) -> Answer:
    model.base_model.norm = lambda *a, **k: group_norm(*a, **k)  # not the one that is replaced
    answer = _forward(solver={})(model, pixels)
    model.base_model.norm = group_norm
    return answer


def _all_bfloat16(model: Any, pixels: Tensor) -> Answer:
    f, state = model.inference_map(pixels)
    solution = model.solve(f.in_precision(torch.bfloat16), state, solver={"tol": 1e-2})
    return _logits(model, solution.state), solution.n_steps, solution.converged


def _torchdeq(model: Any, pixels: Tensor) -> Answer:
    """Its Anderson solver, which stops the whole batch at once, on the fast path's float32 map."""
    f, state = model.inference_map(pixels)
    packer, own = StatePacker(state), model.config.solver
    found, _, report = anderson_solver(
        lambda z: packer.pack(f(packer.unpack(z))),
        packer.pack(state),
        max_iter=own["max_steps"] + 1,
        tol=own["tol"],
        stop_mode="rel",
        m=own["window"],
        lam=1e-10,
    )
    steps = report["nstep"].expand(len(pixels))
    fine = (report["rel_lowest"] <= own["tol"]).expand(len(pixels))
    return _logits(model, packer.unpack(found)), steps, fine


def _logits(model: Any, state: Any) -> Tensor:
    return model.classifier(model.head(tuple(state)))


SIDES: dict[str, Side] = {
    "plain float32": _plain,
    "channels last": _own_norm,
    "channels last, compiled norm": _forward(solver={}),
    "the fast path: begins in bfloat16": _forward(),
    "all in bfloat16, tolerance 1e-2": _all_bfloat16,
    "TorchDEQ Anderson, channels last, compiled norm": _torchdeq,
}


@torch.inference_mode()
def measure(name: str, data: Path, n: int, batch: int, sides: dict[str, Side]) -> dict[str, Any]:
    """Per side: pictures per CPU second, and its answers beside those of the first side."""
    model = DEQModel.from_pretrained(name).eval()
    processor = load_processor(model)
    source = "cifar10" if "cifar" in name else "imagenette"
    pictures = pictures_of(model, "test", data / source)
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:n].tolist()
    seconds = dict.fromkeys(sides, 0.0)
    answers: dict[str, list[Answer]] = {side: [] for side in sides}
    for start in range(0, n, batch):
        rows = chosen[start : start + batch]
        pixels = to_batch(processor, [pictures.picture(row) for row in rows], model)
        for side, run in sides.items():
            began = time.process_time()
            answers[side].append(run(model, pixels))
            seconds[side] += time.process_time() - began
    labels = pictures.labels[torch.tensor(chosen)]
    whole = {
        side: [torch.cat(part) for part in zip(*found, strict=True)]
        for side, found in answers.items()
    }
    reference = whole["plain float32"][0]
    return {
        side: {
            "pictures": n,
            "pictures/s": n / seconds[side],
            "same class, %": 100 * _share(logits.argmax(1) == reference.argmax(1)),
            "accuracy, %": 100 * _share(logits.argmax(1) == labels),
            "largest change of a probability": (logits.softmax(1) - reference.softmax(1))
            .abs()
            .max()
            .item(),
            "steps": steps.double().mean().item(),
            "converged, %": 100 * _share(converged),
        }
        for side, (logits, steps, converged) in whole.items()
    }


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "agreement"))
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10 and imagenette")
    parser.add_argument("--models", nargs="+", default=["mdeq-tiny-cifar-upg"])
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not native_norm_available():
        raise SystemExit("the norm cannot be compiled here")
    sides = dict(SIDES)
    if arguments.what == "agreement":
        sides = {k: v for k, v in sides.items() if k != "channels last" and v is not _torchdeq}
    file = arguments.output / "inference.json"
    for name in arguments.models:
        found = measure(name, arguments.data, arguments.pictures, arguments.batch, sides)
        known = json.loads(file.read_text()) if file.is_file() else {"speed": {}, "agreement": {}}
        known[arguments.what][name] = {"batch": arguments.batch, "sides": found}
        _write(arguments.output, {k: known[k] for k in ("speed", "agreement")})


def _write(folder: Path, known: dict[str, Any]) -> None:
    speed = [
        [name, entry["batch"], side, row["pictures/s"], row["steps"], row["converged, %"]]
        for name, entry in known["speed"].items()
        for side, row in entry["sides"].items()
    ]
    kept = ("same class, %", "accuracy, %", "largest change of a probability", "converged, %")
    agreement = [
        [name, row["pictures"], side, *(f"{row[column]:.4g}" for column in kept)]
        for name, entry in known["agreement"].items()
        for side, row in entry["sides"].items()
    ]
    first = ["model", "batch", "side", "pictures/s", "steps", "converged, %"]
    second = ["model", "pictures", "side", *kept]
    text = (
        "Sides in turns, batch by batch, one thread, process CPU time; the model's own tolerance\n"
        f"and most steps where nothing else is said.\n\n{markdown_table(first, speed)}\n\n"
        f"Answers beside those of plain float32.\n\n{markdown_table(second, agreement)}"
    )
    write_results(folder, "inference", known, text)


if __name__ == "__main__":
    main()
