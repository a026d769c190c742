"""Solve one graph beside the official code's loop: `python benchmarks/graph_alone.py --data ROOT`.

Every layer of `ignn-proteins-upg` on graphs of PROTEINS one by one, by plain iteration. The
official loop (Gu et al. 2020) has nodes in columns, a sparse product in COO and stops by the
largest change of any number; its tolerance is made relative to the largest number of the
equilibrium. Both run in turns in one process on one thread, from zero to a relative 1e-5. ROOT
holds the folder PROTEINS.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from graph_batches import MODELS, recorded
from timing import markdown_table, stable_minima, write_results
from torch import Tensor

from deqzoo import DEQModel
from deqzoo.data.graphs import load_graph_set
from deqzoo.equilibrium import FixedPointIteration
from deqzoo.models.ignn.inputs import GraphBatch, graph_fields
from deqzoo.models.ignn.layer import GraphMap

RESULTS = Path(__file__).resolve().parent / "results"
TOL, MOST = 1e-5, 300


class OfficialLoop:
    """X = relu(W X A + B) for X of shape (m, n), as the official code iterates it."""

    def __init__(self, f: GraphMap, largest: float) -> None:
        self.weight = f.weight
        self.injection = f.injection.t().contiguous()
        index, n = f.adjacency.index.flip(0), f.adjacency.shape[0]
        values = f.adjacency.values
        self.transposed = torch.sparse_coo_tensor(
            index, values, (n, n), check_invariants=False
        ).coalesce()
        self.limit = TOL * largest
        self.evals = 0

    def __call__(self) -> Tensor:
        x = torch.zeros_like(self.injection)
        for self.evals in range(1, MOST + 1):
            product = torch.sparse.mm(self.transposed, (self.weight @ x).t()).t()
            new = torch.relu(product + self.injection)
            error = torch.norm(new - x, float("inf"))
            x = new
            if error < self.limit:
                break
        return x


@torch.inference_mode()
def rows(root: Path, count: int, seconds: float) -> list[list[Any]]:
    """One row per layer, means over graphs."""
    model = DEQModel.from_pretrained(MODELS["PROTEINS"]).eval()
    graphs = load_graph_set("PROTEINS", root)
    solver = FixedPointIteration(tol=TOL, max_steps=MOST)
    found: dict[int, list[tuple[float, ...]]] = {}
    for number in range(count):
        one = GraphBatch.build(model.config, **graph_fields(graphs.batch([number])))
        with recorded() as calls:
            model(one)
        for layer, (_, f, z0, layout) in enumerate(calls):
            solution = solver.solve(f, z0, layout, True)
            official = OfficialLoop(f, solution.state.abs().max().item())
            torch.testing.assert_close(official().t(), solution.state, rtol=1e-3, atol=1e-4)
            least = stable_minima(
                {
                    "deqzoo": lambda: [solver.solve(f, z0, layout, True) for _ in range(20)],  # noqa: B023
                    "official": lambda: [official() for _ in range(20)],  # noqa: B023
                    "map": lambda: [f(z0) for _ in range(20)],  # noqa: B023
                },
                seconds,
            )
            mine, theirs, one_map = (50 * least[key] for key in ("deqzoo", "official", "map"))
            row = (z0.shape[0], solution.n_evals, mine, one_map, official.evals, theirs)
            found.setdefault(layer, []).append(row)
    table = []
    for layer, parts in found.items():
        means = [sum(column) / len(parts) for column in zip(*parts, strict=True)]
        table.append([layer, *means, means[2] / means[5]])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the graph data sets")
    parser.add_argument("--graphs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="longest for each solve")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["layer", "nodes", "evaluations", "ms", "map, ms", "official: evaluations", "ms"]
    columns.append("our ms / its")
    table = rows(options.data, options.graphs, options.seconds)
    keys = ["layer", "nodes", "evals", "ms", "map_ms", "official_evals", "official_ms", "ratio"]
    results = {"graphs": options.graphs, "rows": [dict(zip(keys, r, strict=True)) for r in table]}
    text = (
        f"Means over {options.graphs} graphs of PROTEINS, one at a time, plain iteration to a "
        f"relative {TOL:g}. Process CPU time, one thread, sides in turns, the least of several "
        "turns.\n\n"
    )
    write_results(RESULTS, "graph_alone", results, text + markdown_table(columns, table))


if __name__ == "__main__":
    main()
