"""Solves of one cell, whose books are Python's numbers, against those that keep tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deqzoo.equilibrium import Anderson, Causal, Layout, Rows, Segments, Solution, make_solver
from deqzoo.equilibrium.solvers import loop as loop_module
from deqzoo.equilibrium.solvers import single

from .cases import mixed_batch

SOLVERS = [
    {"name": "fixed_point", "damping": 0.7},
    {"name": "anderson"},
    {"name": "anderson", "window": 1},
    {"name": "anderson", "window": 12, "damping": 0.7, "patience": 3},
    {"name": "broyden", "patience": 3},
]
LAYOUTS = {
    "rows": Rows,
    "segments": lambda: Segments(torch.zeros(1, dtype=torch.int64), 1),
    "causal": Causal,
}


def same(a: Solution, b: Solution) -> None:
    assert a.n_evals == b.n_evals and a.row_evals == b.row_evals
    for name in ("status", "n_steps"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("state", "residual", "abs_residual", "rel_residual"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize("kind", list(LAYOUTS))
@pytest.mark.parametrize("settings", SOLVERS, ids=lambda s: f"{s['name']}{len(s)}")
def test_as_with_tensors(
    settings: dict, kind: str, stop_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sort of row: easy, hard, stalled, diverging, NaN and infinite."""
    f = mixed_batch(torch.float64)
    solver = make_solver({"max_steps": 40, "tol": 1e-4, "stop_mode": stop_mode, **settings})
    statuses = set()
    for i in (0, 3, 12, 20, 30, 40, 44, 63):
        row = f.row(i)

        def g(z: Tensor, row: Any = row) -> Tensor:
            return row(z.reshape(1, 24)).reshape(z.shape)

        start = torch.zeros((1, 1, 24) if kind == "causal" else (1, 24), dtype=torch.float64)
        mine = solver.solve(g, start, LAYOUTS[kind]())
        watched = solver.solve(g, start, LAYOUTS[kind](), trace=True)  # by `Loop`
        watched.trace = None
        same(mine, watched)
        statuses.add(int(mine.status))
    assert len(statuses) > 1


def test_who_is_solved_by_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[type] = []
    for module, name in ((single, "SingleLoop"), (loop_module, "Loop")):
        kind = getattr(module, name)
        run = kind.run
        monkeypatch.setattr(
            kind,
            "run",
            lambda self, *a, run=run, **k: taken.append(type(self)) or run(self, *a, **k),
        )

    def solve(start: Tensor, layout: Layout | None = None, **options: Any) -> type:
        taken.clear()
        Anderson(check_every=options.pop("check_every", None)).solve(
            lambda z: 0.5 * z.cos(), start, layout, **options
        )
        return taken[-1]

    one, many = torch.zeros(1, 5), torch.zeros(2, 5)
    index = torch.zeros(2, dtype=torch.int64)
    assert solve(one) is solve(many, Segments(index, 1)) is single.SingleLoop
    assert solve(one.unsqueeze(0), Causal()) is single.SingleLoop
    assert solve(many) is solve(one, check_every=3) is solve(one, trace=True) is loop_module.Loop
    assert solve(one.bfloat16()) is loop_module.Loop
    padding = torch.zeros(1, 1, dtype=torch.bool)
    assert solve(one.unsqueeze(0), Causal(padding)) is loop_module.Loop
    assert solve(one * 0, None) is single.SingleLoop
    taken.clear()
    huge = Anderson(tol=1e-6).solve(lambda z: 0.5 * z + 1e30, torch.zeros(1, 5))
    assert taken == [single.SingleLoop, loop_module.Loop] and huge.converged.all()
    torch.testing.assert_close(huge.state, torch.full((1, 5), 2e30))


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "most"), [("fixed_point", 6), ("anderson", 22)], ids=["plain", "anderson"]
)
def test_operators_of_a_step(name: str, most: int) -> None:
    """A step of one graph costs few operators beside the map, which is one operator here."""
    layout = Segments(torch.zeros(39, dtype=torch.int64), 1)
    start = torch.linspace(1, 2, 39 * 8).reshape(39, 8)
    counts = []
    for steps in (10, 30):
        solver = make_solver({"name": name, "max_steps": steps, "tol": 0.0})
        with _Counted() as counted:
            solver.solve(torch.cos, start, layout)
        counts.append(counted.count)
    assert (counts[1] - counts[0]) / 20 <= 1 + most
