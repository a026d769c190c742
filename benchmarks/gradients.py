"""Time the gradients beside TorchDEQ's: `python benchmarks/gradients.py`.

Only the backward stage: attach the gradient to a state solved beforehand and differentiate one
seeded cotangent. The reference is a Neumann series in float64. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from problems import Convolutions, Dense, Problem, conv, dense
from timing import markdown_table, stable_minima, write_results
from torch import Tensor
from torchdeq import get_deq

from deqzoo.equilibrium import Anderson, make_gradient
from deqzoo.equilibrium.diagnostics import SavedTensors
from deqzoo.equilibrium.gradients.base import Problem as Solved
from deqzoo.equilibrium.layout import Rows
from deqzoo.equilibrium.maps import Matrices
from deqzoo.equilibrium.solvers import BackwardReport

OURS: dict[str, Any] = {
    "jfb": "jfb",
    "upg k=5 λ=1": {"name": "upg", "steps": 5, "damping": 1.0},
    "upg k=5 λ=.5": {"name": "upg", "steps": 5, "damping": 0.5},
    "npg k=5 λ=1": {"name": "npg", "steps": 5, "damping": 1.0},
    "npg k=10 λ=1": {"name": "npg", "steps": 10, "damping": 1.0},
    "npg k=5 λ=.5": {"name": "npg", "steps": 5, "damping": 0.5},
    "implicit plain 20": {
        "name": "implicit",
        "solver": {"name": "fixed_point", "max_steps": 20, "tol": 0},
    },
    "implicit anderson 20": {
        "name": "implicit",
        "solver": {"name": "anderson", "max_steps": 20, "tol": 0},
    },
    "implicit broyden 20": {
        "name": "implicit",
        "solver": {"name": "broyden", "max_steps": 20, "tol": 0},
    },
}

PEERS: dict[str, dict[str, Any]] = {
    "TorchDEQ jfb": {"grad": 1},
    "TorchDEQ upg k=5 λ=1": {"grad": 5},
    "TorchDEQ upg k=5 λ=.5": {"grad": 5, "tau": 0.5},
    "TorchDEQ ift plain 20": {"ift": True, "b_solver": "fixed_point_iter", "b_max_iter": 20},
    "TorchDEQ ift anderson 20": {"ift": True, "b_solver": "anderson", "b_max_iter": 20},
}


def weights_of(f: Dense | Convolutions) -> list[Tensor]:
    """The leaves that are differentiated."""
    return [f.weight] if isinstance(f, Dense) else [f.w1, f.w2]


def solved(problem: Problem) -> Tensor:
    """The equilibrium to float32 rounding."""
    with torch.no_grad():
        return Anderson(max_steps=150, tol=3e-7).solve(problem.f, problem.z0).state


def backward(f: Any, cotangent: Tensor, attach: Callable[[], Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(attach(), weights_of(f), cotangent))


def exact(problem: Problem, state: Tensor, cotangent: Tensor) -> Tensor:
    """Gradient in float64 at the equilibrium, refined from the float32 one."""
    f = problem.f
    with torch.no_grad():
        state = Anderson(max_steps=200, tol=1e-12).solve(f, state.double()).state
    point = state.requires_grad_()
    out = f(point)
    total = term = cotangent.double()
    for _ in range(400):
        (term,) = torch.autograd.grad(out, point, term, retain_graph=True)
        total = total + term
        if term.norm() < 1e-10 * total.norm():
            break
    return torch.cat([g.flatten() for g in torch.autograd.grad(out, weights_of(f), total)])


def attachments(problem: Problem, state: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The recorded state of every mode, by name."""
    layout = Rows()
    matrix = layout.to_matrix(state)
    on_matrices = Matrices(problem.f, layout)
    runs: dict[str, Callable[[], Tensor]] = {}
    for name, spec in OURS.items():
        gradient = make_gradient(spec)

        def attach(gradient: Any = gradient) -> Tensor:
            stage = Solved(on_matrices, on_matrices, layout, False, BackwardReport())
            return layout.to_state(gradient.attach(stage, matrix))

        runs[name] = attach
    for name, settings in PEERS.items():
        settings = {"f_solver": "fixed_point_iter", "f_max_iter": 0, "b_tol": 0.0, **settings}
        deq = get_deq(**settings)
        runs[name] = lambda deq=deq: deq(problem.f, state)[0][-1]
    return runs


def measure(name: str, seconds: float) -> list[dict[str, Any]]:
    """One row per mode."""
    problem = conv() if name == "B" else dense(name)
    twin = conv(torch.float64) if name == "B" else dense(name, torch.float64)
    for p in (problem, twin):
        for weight in weights_of(p.f):
            weight.requires_grad_()
    state = solved(problem)
    generator = torch.Generator().manual_seed(7)
    cotangent = torch.randn(state.shape, generator=generator) / state.numel() ** 0.5
    reference = exact(twin, state, cotangent)
    runs = attachments(problem, state)
    rows = []
    for key, attach in runs.items():
        gc.collect()
        with SavedTensors(beside=weights_of(problem.f)) as saved:
            recorded = attach()
        found = torch.autograd.grad(recorded, weights_of(problem.f), cotangent)
        g = torch.cat([t.flatten() for t in found]).double()
        row = {"problem": name, "gradient": key, "saved_MiB": saved.bytes / 2**20}
        row["error"] = ((g - reference).norm() / reference.norm()).item()
        row["cosine"] = (g @ reference / g.norm() / reference.norm()).item()
        rows.append(row)
        del recorded
    jobs: dict[str, Callable[[], Any]] = {
        key: (lambda attach=attach: backward(problem.f, cotangent, attach))
        for key, attach in runs.items()
    }

    def evaluate() -> None:
        with torch.no_grad():
            problem.f(state)

    least = stable_minima({"map": evaluate, **jobs}, seconds)
    for row in rows:
        row["ms"] = 1e3 * least[row["gradient"]]
        row["maps"] = least[row["gradient"]] / least["map"]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", default=["A2", "B"])
    parser.add_argument("--seconds", type=float, default=60.0, help="longest time per problem")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for name in options.problems for row in measure(name, options.seconds)]
    columns = ["problem", "gradient", "ms", "maps", "saved_MiB", "error", "cosine"]
    table = markdown_table(columns, [[row[c] for c in columns] for row in rows])
    text = (
        "Backward stage only, CPU time, one thread. `maps` is the time in evaluations of the map; "
        "`saved_MiB` what the graph keeps besides the weights; `error` and `cosine` are against a "
        "float64 reference."
    )
    write_results(options.output, "gradients", {"rows": rows}, f"{text}\n\n{table}")


if __name__ == "__main__":
    main()
