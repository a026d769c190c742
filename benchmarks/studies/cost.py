"""Cost of a training step: implicit gradients against phantom ones, on the official models.

    python benchmarks/studies/cost.py [--models ...] [--threads 1]

Every cell (model × gradient) is a process of its own, so that its peak memory counts. Weights are
the official configurations' random ones: cost does not depend on what they have learned, except
through the number of solver steps, which is fixed here by a tolerance of 0: as many forward and
backward steps as the official configuration allows. Times are process CPU seconds (the smallest of
the repeats), because wall time says little on a shared machine; on a GPU they are wall time.

"backward" is recording the graph and running its backward pass; "step" is a whole training step
without the optimiser: forward solve, loss, backward.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from cells import Cells, markdown_table, write_text
from dots import dot_chart

MODELS = {
    "mdeq-cifar-large": ("MDEQ", 18, 20, 8),
    "mdeq-imagenet-small": ("MDEQ", 26, 27, 1),
    "deq-transformer-wikitext103-post": ("DEQTransformer", 30, 35, 32),
}
"""Preset: family, official forward and backward steps, pictures of a batch or tokens of a text."""


def _solver(name: str, steps: int, tol: float = 0.0) -> dict[str, Any]:
    return {"name": name, "max_steps": steps, "tol": tol}


def modes(backward_steps: int) -> dict[str, dict[str, Any]]:
    """Gradients by name: the official settings, the fastest of equal accuracy, and phantoms."""
    few = max(3, backward_steps // 3)
    return {
        "implicit broyden, all steps": {
            "name": "implicit", "solver": _solver("broyden", backward_steps),
        },
        "implicit anderson, all steps": {
            "name": "implicit", "solver": _solver("anderson", backward_steps),
        },
        "implicit anderson, a third": {"name": "implicit", "solver": _solver("anderson", few)},
        "upg k=5 λ=0.5": {"name": "upg", "steps": 5, "damping": 0.5},
        "npg k=5 λ=0.5": {"name": "npg", "steps": 5, "damping": 0.5},
        "npg k=5 λ=1": {"name": "npg", "steps": 5, "damping": 1.0},
        "jfb": {"name": "jfb"},
    }  # fmt: skip


def build(preset: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A fresh model in training mode without dropout, and a batch for it."""
    from deqzoo.models.auto import load_class

    torch.manual_seed(0)
    family, _, _, size = MODELS[preset]
    config = load_class(f"{family}Config").from_preset(preset, dropout=0.0)
    if family == "MDEQ":
        model = load_class("MDEQForImageClassification")(config)
        side = config.image_size
        pixels = torch.randn(size, 3, side, side)
        batch = {"pixel_values": pixels, "labels": torch.arange(size) % config.num_labels}
        return model.train(), batch
    model = load_class("DEQTransformerForCausalLM")(config)
    ids = torch.randint(1000, (1, size + 1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "shift": False}
    return model.train(), {**batch, "return_logits": False}


def cell(preset: str, mode: str, threads: int) -> dict[str, Any]:
    """Measure one cell in this process."""
    from deqzoo.equilibrium.diagnostics import SavedTensors
    from deqzoo.fidelity.adjoints import RecordedModel

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batch = build(preset)
    model = model.to(device)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    family, forward_steps, backward_steps, size = MODELS[preset]
    solver = "broyden" if "broyden" in mode else "anderson"
    gradient = modes(backward_steps)[mode]
    recorded = RecordedModel(model, batch, _solver(solver, forward_steps))
    recorded.loss = None  # only the solution is of use
    parameters = list(recorded.parameters.values())

    def backward() -> None:
        torch.autograd.grad(recorded.replayed(gradient), parameters, allow_unused=True)

    def step() -> None:
        settings = {"solver": _solver(solver, forward_steps), "gradient": gradient}
        loss = model(**batch, **settings).loss
        torch.autograd.grad(loss, parameters, allow_unused=True)

    with SavedTensors([*model.parameters(), *model.buffers()]) as saved:
        loss = recorded.replayed(gradient)
    del loss
    backward_seconds, backward_peak = clocked(backward, device)
    step_seconds, step_peak = clocked(step, device)
    return {
        "backward_seconds": backward_seconds,
        "step_seconds": step_seconds,
        "saved_mib": saved.bytes / 2**20,
        "backward_peak_mib": backward_peak,
        "step_peak_mib": step_peak,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(),
        "threads": threads,
        "batch": f"{size} pictures" if family == "MDEQ" else f"{size} tokens",
        "forward_steps": forward_steps,
    }


def clocked(
    work: Callable[[], None], device: torch.device, repeats: int = 2
) -> tuple[float, float]:
    """Smallest CPU (GPU: wall) seconds of a few repeats, and the growth of memory in MiB."""
    from deqzoo.fidelity.memory import peak_memory

    times, peaks = [], []
    for _ in range(repeats):
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        with peak_memory(device) as peak:
            started = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - started)
        peaks.append((peak.bytes or 0) / 2**20)
    return min(times), min(peaks)


def in_process(key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one cell in a fresh process."""
    command = [sys.executable, __file__, "--cell", key, "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1:])
    return json.loads(done.stdout.splitlines()[-1])


CLAIMS = "the paper claims: backward 12 times as fast, step 1.4 to 2.2 times, memory 0.5 times"


def report(cells: dict[str, dict[str, Any]]) -> str:
    """Costs, and speed-ups against both implicit settings beside the paper's claims."""
    rows = []
    for key, cell_ in cells.items():
        preset, mode = key.split(": ")
        row = [preset, mode, f"{cell_['backward_seconds']:.2f}", f"{cell_['step_seconds']:.2f}"]
        row += [f"{cell_['saved_mib']:.0f}", f"{cell_['step_peak_mib']:.0f}"]
        for base in ("implicit broyden, all steps", "implicit anderson, a third"):
            reference = cells.get(f"{preset}: {base}")
            row.append(_ratios(cell_, reference))
        rows.append(row)
    head = ["model", "gradient", "backward s", "step s", "saved MiB", "peak MiB"]
    head += ["against Broyden (backward, step, peak)", "against Anderson, a third"]
    return markdown_table(head, rows)


def plot(cells: dict[str, dict[str, Any]]) -> str:
    """Time of a whole step by gradient and model, with Broyden's method as 1, as SVG."""
    rows: dict[str, dict[str, list[float]]] = {}
    for key, cell_ in cells.items():
        preset, mode = key.split(": ")
        reference = cells.get(f"{preset}: implicit broyden, all steps")
        if reference is not None:
            share = cell_["step_seconds"] / reference["step_seconds"]
            rows.setdefault(mode, {})[preset] = [share]
    return dot_chart(rows, title="Cost of a training step", x_label="time of a step, Broyden = 1")


def _ratios(cell_: dict[str, Any], reference: dict[str, Any] | None) -> str:
    if reference is None:
        return "missing"
    backward = reference["backward_seconds"] / cell_["backward_seconds"]
    step = reference["step_seconds"] / cell_["step_seconds"]
    memory = cell_["step_peak_mib"] / max(reference["step_peak_mib"], 1)
    return f"{backward:.1f}×, {step:.1f}×, {memory:.2f}×"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        preset, mode = arguments.cell.split(": ")
        print(json.dumps(cell(preset, mode, arguments.threads)))
        return
    cells = Cells("cost")
    wanted = [f"{p}: {m}" for p in arguments.models for m in modes(MODELS[p][2])]
    missing = cells.fill(wanted, lambda key: in_process(key, arguments))
    print(report(cells.done))
    print(CLAIMS)
    print("missing:", ", ".join(missing) or "nothing")
    write_text("cost_table.md", report(cells.done))
    write_text("cost.svg", plot(cells.done))


if __name__ == "__main__":
    main()
