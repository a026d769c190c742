"""Time deqzoo's solvers beside TorchDEQ's: `python benchmarks/solvers.py`.

Both run in turns in one process, on one thread, to the same relative residual. "Ratio" is the CPU
time of a solve over that of its evaluations of the map alone. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from problems import Problem, conv, dense, mdeq_block
from timing import cpu_time, markdown_table, stable_minima, write_results
from torch import Tensor
from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter

from deqzoo.equilibrium import Solution, make_solver
from deqzoo.equilibrium.state import StatePacker

PEERS: dict[str, dict[str, tuple[Callable[..., Any], dict[str, Any]]]] = {
    "fixed_point": {"TorchDEQ": (fixed_point_iter, {})},
    "anderson": {
        "TorchDEQ": (anderson_solver, {"m": 6}),
        "TorchDEQ lam=1e-10": (anderson_solver, {"m": 6, "lam": 1e-10}),
    },
    "broyden": {
        "TorchDEQ": (broyden_solver, {}),
        "TorchDEQ LBFGS_thres=20": (broyden_solver, {"LBFGS_thres": 20}),
    },
}

TARGETS = {
    ("fixed_point", "A2"): 1.5,
    ("fixed_point", "B"): 1.15,
    ("anderson", "A2"): 2.5,
    ("anderson", "B"): 1.4,
    ("broyden", "A2"): 3.5,
    ("broyden", "B"): 2.0,
}
"""Ratios to stay below at a tolerance of 1e-6."""

ROWS: list[tuple[str, float]] = [
    ("A1", 1e-3),
    ("A1", 1e-6),
    ("A2", 1e-3),
    ("A2", 1e-6),
    ("A3", 1e-3),
    ("A3", 1e-6),
    ("A4", 1e-6),
    ("B", 1e-3),
    ("B", 1e-6),
    ("MDEQ", 1e-2),
]


class _Counter:
    """A map that counts its evaluations."""

    def __init__(self, f: Callable[[Any], Any]) -> None:
        self.f, self.count = f, 0

    def __call__(self, z: Any) -> Any:
        self.count += 1
        return self.f(z)


def worst_residual(f: Callable[[Tensor], Tensor], z: Tensor) -> float:
    """Largest relative residual over the batch; NaN if any sample's is."""
    fz = f(z).flatten(1)
    return ((fz - z.flatten(1)).norm(dim=1) / fz.norm(dim=1)).max().item()


def measure(problem: Problem, tol: float, name: str, seconds: float) -> list[dict[str, Any]]:
    """Rows of one solver on one problem: deqzoo's, then those of its peers."""
    packer = StatePacker(problem.z0)
    matrix = packer.pack(problem.z0)

    def on_matrix(z: Tensor) -> Tensor:
        return packer.pack(problem.f(packer.unpack(z)))

    solver = make_solver({"name": name, "max_steps": problem.cap - 1, "tol": tol})
    compact = problem.name == "A3"
    ours = solver.solve(problem.f, problem.z0, compact=compact)
    rows = [_row(problem, tol, name, "deqzoo", ours.n_evals)]
    rows[0]["residual"] = worst_residual(on_matrix, packer.pack(ours.state))
    rows[0]["row_evals"] = ours.row_evals / (ours.n_evals * matrix.shape[0])
    typical = ours.state
    runs: dict[str, Callable[[], Any]] = {
        "map": lambda: [problem.f(typical) for _ in range(3)],
        "deqzoo": lambda: solver.solve(problem.f, problem.z0, compact=compact),
    }
    for peer, (function, options) in PEERS[name].items():
        options = {"max_iter": problem.cap, "tol": tol, "stop_mode": "rel", **options}
        counter = _Counter(on_matrix)
        state, _, _ = function(counter, matrix, **options)
        rows.append(_row(problem, tol, name, peer, counter.count))
        rows[-1]["residual"] = worst_residual(on_matrix, state)

        def run(function: Callable[..., Any] = function, options: dict = options) -> Any:
            return function(on_matrix, matrix, **options)

        runs[peer] = run
    least = stable_minima(runs, seconds)
    map_time = least["map"] / 3
    for row in rows:
        row["ms"] = 1e3 * least[row["package"]]
        row["map_ms"] = 1e3 * map_time
        row["ratio"] = row["ms"] / (row["evals"] * row["map_ms"])
    _compare(rows)
    return rows


def _row(problem: Problem, tol: float, solver: str, package: str, evals: int) -> dict[str, Any]:
    return {
        "problem": problem.name,
        "tol": tol,
        "solver": solver,
        "package": package,
        "evals": evals,
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Enter how many times longer the fastest peer that reaches the tolerance takes."""
    tol = rows[0]["tol"]
    done = [row["ms"] for row in rows[1:] if row["residual"] <= tol * 1.01]
    rows[0]["speedup"] = min(done) / rows[0]["ms"] if done else None
    rows[0]["target"] = None
    if tol == 1e-6:
        rows[0]["target"] = TARGETS.get((rows[0]["solver"], rows[0]["problem"]))


def alone_and_together(problem: Problem, tol: float, name: str) -> dict[str, Any]:
    """Solve every fourth sample alone and within its batch, with samples leaving."""

    def solve(f: Any, z0: Tensor) -> Solution:
        solver = make_solver({"name": name, "max_steps": 3 * problem.cap, "tol": tol})
        return solver.solve(f, z0, compact=True)

    together = solve(problem.f, problem.z0)
    full = make_solver({"name": name, "max_steps": 3 * problem.cap, "tol": tol})
    times = stable_minima(
        {
            "leaving": lambda: solve(problem.f, problem.z0),
            "staying": lambda: full.solve(problem.f, problem.z0),
        },
        seconds=5,
    )
    staying = full.solve(problem.f, problem.z0)
    all_rows = staying.n_evals * problem.z0.shape[0]
    differences, same_steps = [], 0
    for i in range(0, problem.z0.shape[0], 4):
        f = type(problem.f)(problem.f.weight, problem.f.injection[i : i + 1])
        alone = solve(f, problem.z0[i : i + 1])
        gap = (alone.state[0] - together.state[i]).norm() / alone.state[0].norm()
        differences.append(gap.item())
        same_steps += int(alone.n_steps[0] == together.n_steps[i])
    return {
        "problem": problem.name,
        "tol": tol,
        "solver": name,
        "evals": together.n_evals,
        "row_evals": together.row_evals / all_rows,
        "row_floor": float((together.n_steps + 1).sum()) / all_rows,
        "speedup": times["staying"] / times["leaving"],
        "max_difference": max(differences),
        "same_steps": f"{same_steps} of {len(differences)}",
    }


def build(name: str) -> Problem:
    """The problem of a name."""
    if name == "B":
        return conv()
    return mdeq_block() if name == "MDEQ" else dense(name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", help="only these (A1 A2 A3 A4 B MDEQ)")
    parser.add_argument("--solvers", nargs="+", default=list(PEERS), help="only these")
    parser.add_argument("--seconds", type=float, default=10.0, help="longest time per row")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="solvers", help="of the files written there")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, heterogeneous = [], []
    with torch.no_grad():
        cpu_time(lambda: build("A1").f(build("A1").z0))
        for name in options.solvers:
            for key, tol in ROWS:
                if options.problems and key not in options.problems:
                    continue
                rows += measure(build(key), tol, name, options.seconds)
                if key == "A3":
                    heterogeneous.append(alone_and_together(build(key), tol, name))
                print(name, key, tol, f"{rows[-1]['ms']:.1f} ms", flush=True)
    results = {"rows": rows, "heterogeneous": heterogeneous}
    write_results(options.output, options.name, results, render(results))


def render(results: dict[str, Any]) -> str:
    """The tables of a run as markdown."""
    columns = ["problem", "tol", "solver", "package", "evals", "residual", "ms"]
    columns += ["map_ms", "ratio", "target", "speedup"]
    table = markdown_table(columns, [[row.get(c) for c in columns] for row in results["rows"]])
    text = (
        "CPU time of whole solves, one thread, least of several turns. `ratio` is that time over "
        "evals × map_ms; `target` is what the ratio should stay below; `speedup` is how many "
        "times longer the fastest TorchDEQ setting takes that reaches the tolerance; `residual` "
        "is measured again at the state returned. On A3 converged samples leave the batch."
    )
    if results["heterogeneous"]:
        columns = list(results["heterogeneous"][0])
        other = markdown_table(columns, [list(row.values()) for row in results["heterogeneous"]])
        table += (
            "\n\nConverged samples leave the batch: rows evaluated against evals × batch when they "
            "stay, as little as that can be (`row_floor`: every sample leaves right after the "
            "evaluation at which it has converged), the speedup that follows, and every fourth "
            "sample alone against in its batch (largest relative difference, equal step counts)."
            f"\n\n{other}"
        )
    return f"{text}\n\n{table}"


if __name__ == "__main__":
    main()
