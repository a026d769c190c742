"""Backward pass with three implementations of Broyden's method, beside phantom gradients.

    python benchmarks/studies/broyden.py [--official CLONE]

"12 times as fast" is said of a comparison with the authors' implicit gradient, whose linear system
Broyden's method solves. Here the same recorded forward pass is differentiated with this package's
Broyden, TorchDEQ's, and the authors' own (CLONE: a clone of https://github.com/locuslab/deq, whose
lib/solvers.py is imported), all with as many steps as the official configuration allows, and with
the phantom gradients of the paper; in turns in one process, CPU seconds, one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Cells, markdown_table, write_text
from cost import MODELS, build
from torch import Tensor

from deqzoo.fidelity.adjoints import (
    AdjointSystem,
    RecordedModel,
    Rule,
    neumann_rule,
    solver_rule,
)

PRESETS = ("mdeq-cifar-large", "deq-transformer-wikitext103-post")
REFERENCE = "NPG, k = 5, λ = 0.5"
TURNS = 3


def torchdeq_rule(steps: int) -> Rule:
    """w = Jᵀw + g by TorchDEQ's Broyden."""
    from torchdeq.solver import broyden_solver

    def solve(system: AdjointSystem) -> Tensor:
        cotangent = system.powers[0]
        found = broyden_solver(
            lambda w: system.product(w) + cotangent, cotangent, max_iter=steps, tol=0.0,
            stop_mode="rel",
        )  # fmt: skip
        return found[0]

    return solve


def official_rule(clone: Path, steps: int) -> Rule:
    """The same by the authors' Broyden, which takes states of three dimensions."""
    file = clone / "lib" / "solvers.py"
    spec = importlib.util.spec_from_file_location("official_solvers", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def solve(system: AdjointSystem) -> Tensor:
        cotangent = system.powers[0]
        shape = cotangent.shape
        found = module.broyden(
            lambda w: (system.product(w.view(shape)) + cotangent).view(*shape, 1),
            cotangent.reshape(*shape, 1), threshold=steps, eps=0.0, stop_mode="rel",
        )  # fmt: skip
        return found["result"].view(shape)

    return solve


def rules(steps: int, clone: Path | None) -> dict[str, Rule]:
    """What enters the backward pass of F, by name."""
    anderson = {"name": "anderson", "max_steps": max(3, steps // 3), "tol": 0.0}
    found = {
        REFERENCE: neumann_rule(5, 0.5),
        "JFB": neumann_rule(1, 1.0),
        "implicit, Anderson, a third of the steps": solver_rule(anderson),
        "implicit, Broyden of deqzoo": solver_rule(
            {"name": "broyden", "max_steps": steps, "tol": 0.0}
        ),
        "implicit, Broyden of TorchDEQ": torchdeq_rule(steps),
    }
    if clone is not None:
        found["implicit, Broyden of the authors"] = official_rule(clone, steps)
    return found


def measure(preset: str, clone: Path | None) -> dict[str, Any]:
    """Least CPU seconds of a backward pass with each rule, and its products with Jᵀ."""
    from timing import cpu_time, machine

    model, batch = build(preset)
    family, forward_steps, backward_steps, size = MODELS[preset]
    products = [0]

    def count() -> None:
        products[0] += 1

    solver = {"name": "anderson", "max_steps": forward_steps, "tol": 0.0}
    recorded = RecordedModel(model, batch, solver, count)
    turns: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for _ in range(TURNS):
        for name, rule in rules(backward_steps, clone).items():
            products[0] = 0
            turns.setdefault(name, []).append(cpu_time(_fresh(recorded, rule)))
            counts[name] = products[0]
    return {
        "batch": f"{size} {'pictures' if family == 'MDEQ' else 'tokens'}",
        "seconds": {name: min(taken) for name, taken in turns.items()},
        "products": counts,
        "turns": TURNS,
        "machine": machine(),
    }


def _fresh(recorded: RecordedModel, rule: Rule) -> Callable[[], None]:
    """A backward pass that keeps no product of an earlier one."""

    def fresh(system: AdjointSystem) -> Tensor:
        del system.powers[1:]
        return rule(system)

    return lambda: recorded.gradients(fresh) and None


def report(cells: dict[str, dict[str, Any]]) -> str:
    """Seconds, and how many times as long as NPG's."""
    rows = []
    for preset, cell in cells.items():
        reference = cell["seconds"][REFERENCE]
        for name, seconds in cell["seconds"].items():
            rows.append(
                [f"{preset}, {cell['batch']}", name, str(cell["products"][name]),
                 f"{seconds:.2f}", f"{seconds / reference:.1f}"]
            )  # fmt: skip
    head = ["model", "gradient", "products with Jᵀ", "backward, CPU s", "times as long as NPG"]
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, help="clone of locuslab/deq")
    clone = parser.parse_args().official
    torch.set_num_threads(1)
    cells = Cells("broyden")
    missing = cells.fill(PRESETS, lambda preset: measure(preset, clone))
    ordered = {preset: cells.done[preset] for preset in PRESETS if preset in cells.done}
    print(report(ordered))
    print("missing:", ", ".join(missing) or "nothing")
    write_text("broyden_table.md", report(ordered))


if __name__ == "__main__":
    main()
