"""How the time of a solve grows with its input: `python benchmarks/scaling.py`.

Twenty steps of plain iteration on one IGNN layer of 64 numbers a node, over random graphs of degree
10 whose nodes have no order; the sparse products of these solves alone; and ten Anderson steps of
`deq-transformer-wikitext2-jr-upg` on random words without a memory. An exponent is the slope of log
time over log size from the row before; a linear algorithm has 1.

From some hundred thousand nodes on, the rows that a product gathers lie in more pages of memory
than the processor remembers the places of. `THP_MEM_ALLOC_ENABLE=1`, a setting of PyTorch that has
to be in the environment before Python starts, asks Linux for pages of 2 MiB; the rows with it are
of processes of their own, in turns with those without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graph_batches import recorded
from timing import markdown_table, stable_minima, write_results

from deqzoo import DEQModel, IGNNConfig, IGNNForNodeClassification

RESULTS = Path(__file__).resolve().parent / "results"
TEXT = "deq-transformer-wikitext2-jr-upg"
SIZES = {
    "nodes": (1_000, 3_000, 10_000, 30_000, 100_000, 300_000),
    "words": (32, 64, 128, 256, 512, 1_024, 2_048),
}
SIZES["products"] = SIZES["nodes"]
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
SERIES = {
    "nodes": "nodes",
    "nodes, huge pages": "nodes",
    "products": "products",
    "products, huge pages": "products",
    "words": "words",
}
STEPS = 20


def graph(n: int) -> tuple[Any, ...]:
    """Solver, map, start and layout of a random graph of n nodes."""
    torch.manual_seed(0)
    config = IGNNConfig(
        num_features=16, hidden_sizes=[64], num_labels=2,
        solver={"name": "fixed_point", "max_steps": STEPS, "tol": 0.0},
    )  # fmt: skip
    model = IGNNForNodeClassification(config).eval()
    with recorded() as calls:
        edges = torch.randint(n, (2, 5 * n))
        model(x=torch.randn(n, 16), edge_index=torch.cat([edges, edges.flip(0)], dim=1))
    (call,) = calls
    return call


def nodes(n: int) -> Callable[[], Any]:
    """The solve of a random graph of n nodes."""
    solver, f, z0, layout = graph(n)
    return lambda: solver.solve(f, z0, layout, True)


def products(n: int) -> Callable[[], Any]:
    """The products of that solve alone."""
    _, f, z0, _ = graph(n)
    state, spread = torch.randn_like(z0), f.adjacency.transposed
    return lambda: [spread.product(state) for _ in range(STEPS + 1)]


def words(n: int) -> Callable[[], Any]:
    """The solve of a text of n words."""
    torch.manual_seed(0)
    model = DEQModel.from_pretrained(TEXT).eval()
    f, z0 = model.equilibrium_map(torch.randint(model.config.vocab_size, (1, n)))
    return lambda: model.solve(f, z0, solver={"max_steps": 10, "tol": 0.0, "patience": None})


@torch.inference_mode()
def measure(kind: str, seconds: float) -> dict[int, float]:
    """Least CPU seconds of every size, in this process."""
    torch.set_num_threads(1)
    build = {"nodes": nodes, "products": products, "words": words}[kind]
    return stable_minima({n: build(n) for n in SIZES[kind]}, seconds)


def rows_of(series: str, least: dict[int, float]) -> list[list[Any]]:
    """The table's rows of one series: size, milliseconds, exponent since the row before and the
    first."""
    (first, *_), rows = least, []
    before = None
    for n, taken in least.items():
        slopes = [None, None]
        if before is not None:
            slopes = [math.log(taken / least[m]) / math.log(n / m) for m in (before, first)]
        rows.append([series, n, 1e3 * taken, *slopes])
        before = n
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each series and turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--kind", choices=SIZES, help="measure one, in this process")
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.seconds)))
        return
    least: dict[str, dict[int, float]] = {}
    for _ in range(options.turns):
        for series, kind in SERIES.items():
            command = [sys.executable, __file__, "--kind", kind, "--seconds", str(options.seconds)]
            pages = {HUGE_PAGES: "1" if "huge" in series else "0"}
            found = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | pages
            )
            taken = {int(n): t for n, t in json.loads(found.stdout.splitlines()[-1]).items()}
            old = least.get(series, taken)
            least[series] = {n: min(taken[n], old[n]) for n in taken}
    table = [row for series, taken in least.items() for row in rows_of(series, taken)]
    columns = ["series", "size", "ms", "exponent", "exponent from the first"]
    results = {"rows": [dict(zip(columns, row, strict=True)) for row in table]}
    text = (
        "Process CPU time of one solve, one thread, least of several. `nodes`: one IGNN layer on a "
        "random graph of degree 10, twenty steps; `huge pages`: with "
        f"{HUGE_PAGES}=1; `products`: its sparse products alone; `words`: one text, ten steps.\n\n"
    )
    write_results(options.output, "scaling", results, text + markdown_table(columns, table))


if __name__ == "__main__":
    main()
