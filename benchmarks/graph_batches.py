"""Whether graphs that have converged should leave their batch: each layer of the graph checkpoints.

    python benchmarks/graph_batches.py --data ROOT

A batch of 128 graphs is solved twice, in turns in one process: with graphs leaving as they
converge, and whole to the end. ROOT holds the folders PROTEINS and COX2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timing import markdown_table, stable_minima, write_results

from deqzoo import DEQModel
from deqzoo.data.graphs import load_graph_set
from deqzoo.equilibrium import Solver
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"PROTEINS": "ignn-proteins-upg", "COX2": "ignn-cox2-upg"}
GRAPHS = 128


@contextmanager
def recorded() -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of every solve."""
    calls: list[tuple[Any, ...]] = []
    solve = Solver.solve

    def remember(self: Solver, f: Any, z0: Any, layout: Any, *rest: Any, **more: Any) -> Any:
        calls.append((self, f, z0, layout))
        return solve(self, f, z0, layout, *rest, **more)

    Solver.solve = remember
    try:
        yield calls
    finally:
        Solver.solve = solve


@torch.inference_mode()
def rows(name: str, root: Path, seconds: float) -> Iterator[list[Any]]:
    """One row per layer."""
    model = DEQModel.from_pretrained(MODELS[name]).eval()
    batch = load_graph_set(name, root).batch(range(GRAPHS))
    graphs = GraphBatch.build(model.config, **graph_fields(batch))
    with recorded() as calls:
        model(graphs)
    for layer, (solver, f, z0, layout) in enumerate(calls):
        solution = solver.solve(f, z0, layout, True)
        least = stable_minima(
            {
                "leaving": lambda: solver.solve(f, z0, layout, True),  # noqa: B023
                "whole": lambda: solver.solve(f, z0, layout, False),  # noqa: B023
            },
            seconds,
        )
        steps = solution.n_steps.float()
        yield [
            f"{name}, {GRAPHS} graphs", layer, steps.mean().item(), int(steps.max()),
            1e3 * least["leaving"], 1e3 * least["whole"], least["leaving"] / least["whole"],
        ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the graph data sets")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["batch", "layer", "steps, mean", "steps, most", "leaving, ms", "whole, ms", "ratio"]
    found = [row for name in MODELS for row in rows(name, options.data, options.seconds)]
    results = {"rows": [dict(zip(columns, row, strict=True)) for row in found]}
    text = "Process CPU time, one thread, sides in turns.\n\n" + markdown_table(columns, found)
    write_results(RESULTS, "graph_batches", results, text)


if __name__ == "__main__":
    main()
