"""Theorem 1 on every checkpoint of the zoo, for both phantom gradients.

    python benchmarks/studies/theorem1.py --data ROOT

Geng et al. (2021), Theorem 1: with X = ∂F/∂θ and J = ∂F/∂h at the equilibrium, a phantom gradient
whose matrix is A has a non-negative inner product with the exact gradient if ‖A (I − J) − X‖ is at
most σ_min(X)² / σ_max(X). Both sides are given here in units of σ_max: the left one for the
Neumann gradient at the equilibrium and for the unrolled one from where the model's own solver
stops, the right one as (σ_min / σ_max)². Iteration bounds the first from below and the second from
above, which suffices to refute the condition and not to prove it.

Beside the condition stands what it is meant to ensure: cosine and norm ratio of the same gradients
with the exact one, over the parameters behind the equilibrium, and the spectral radius of J from
300 products. ROOT holds the data sets in folders of their own (cifar10, imagenette, wikitext,
ptb_text_only, graphs).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from anytime import folder_of
from cells import Cells, markdown_table, write_text
from theorem import Bounds, Linearization, first_sample
from torch import Tensor

import deqzoo
from deqzoo.equilibrium import fixed_point, spectral_radius
from deqzoo.equilibrium.diagnostics import gradients_by_name
from deqzoo.equilibrium.state import StatePacker
from deqzoo.evaluation.files import weights_digest
from deqzoo.fidelity.adjoints import (
    Held,
    RecordedModel,
    neumann_rule,
    no_rule,
    solver_rule,
)
from deqzoo.fidelity.batches import make_batch
from deqzoo.fidelity.study import EXACT_ADJOINT, EXACT_FORWARD
from deqzoo.hub.catalogue import entries
from deqzoo.zoo import resolve_bundled

SETTINGS = ((1, 1.0), (5, 1.0), (5, 0.5), (20, 0.5))
BATCH = {"mdeq": 4, "deq_transformer": 2, "ignn": 16}
RADIUS_PRODUCTS = 300


class Sides(Bounds):
    """The condition's sides, for unrolled steps too."""

    def unrolled(self, f: Any, held: Held, layout: Any, steps: int, damping: float) -> float:
        """The same of ‖A (I − J) − X‖ for k damped steps from a solution of the solver's."""
        state = held.solution.state
        gradient = {"name": "upg", "steps": steps, "damping": damping}
        with torch.enable_grad():
            end = fixed_point(f, state, solver=held, gradient=gradient, layout=layout).state
            end = StatePacker(end).pack(end)
        worst = 0.0
        for u in self.directions:
            # Transposed as in `Linearization`: A (I − J) makes of u what the graph makes of
            # (I − Jᵀ) u.
            back = torch.autograd.grad(
                end, self.linear.parameters, u - self.linear.to_state(u), retain_graph=True,
                allow_unused=True,
            )  # fmt: skip
            exact = torch.autograd.grad(
                self.linear.value, self.linear.parameters, u, retain_graph=True, allow_unused=True
            )
            worst = max(worst, sum(_distance(a, b) for a, b in zip(back, exact, strict=True)))
        return (worst / self.largest) ** 0.5


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float((b if a is None else a).double().square().sum())
    return float((a.double() - b.double()).square().sum())


def conditions(model: Any, data: Path) -> dict[str, Any]:
    """Both sides on one sample; graph models of several layers by their first one."""
    kind = model.config.model_type
    batch, _ = make_batch(model, data, size=1)
    if kind == "deq_transformer":
        batch = first_sample(batch) or batch
    exact = RecordedModel(model, batch, EXACT_FORWARD)
    own = RecordedModel(model, batch)
    f, layout = exact.maps[0], exact.layouts[0]
    sides = Sides(Linearization(f, exact.solutions[0].state, list(exact.parameters.values())))
    rows = {}
    for steps, damping in SETTINGS:
        held = Held(solution=own.solutions[0])
        rows[label(steps, damping)] = {
            "npg": sides.neumann(steps, damping),
            "upg": sides.unrolled(f, held, layout, steps, damping),
        }
    radius = spectral_radius(f, exact.solutions[0].state, RADIUS_PRODUCTS, layout=layout)
    return {
        "allowed": sides.allowed,
        "distance": rows,
        "radius": float(radius.max()),
        "own_residual": own.residuals()[0],
    }


def agreements(model: Any, data: Path) -> dict[str, Any]:
    """Cosine and norm ratio with the exact gradient on a batch, behind the equilibrium."""
    batch, described = make_batch(model, data, size=BATCH[model.config.model_type])
    exact = RecordedModel(model, batch, EXACT_FORWARD)
    own = RecordedModel(model, batch)
    head = exact.gradients(no_rule)
    behind = [name for name, g in head.items() if not bool(g.any())]
    truth = joined(exact.gradients(solver_rule(EXACT_ADJOINT)), behind)
    parameters = list(own.parameters.values())
    rows = {}
    for steps, damping in SETTINGS:
        neumann = joined(own.gradients(neumann_rule(steps, damping)), behind)
        loss = own.replayed({"name": "upg", "steps": steps, "damping": damping})
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        unrolled = joined(gradients_by_name(own.parameters, found), behind)
        rows[label(steps, damping)] = {
            name: {
                "cosine": float(torch.cosine_similarity(g, truth, dim=0)),
                "ratio": float(g.norm() / truth.norm()),
            }
            for name, g in (("npg", neumann), ("upg", unrolled))
        }
    return {"batch": described, "agreement": rows, "residuals": exact.residuals()}


def label(steps: int, damping: float) -> str:
    """Name of a setting."""
    return f"k={steps} λ={damping:g}"


def joined(gradients: dict[str, Tensor], names: list[str]) -> Tensor:
    """The gradients of some parameters as one vector, float64."""
    return torch.cat([gradients[name].flatten().double() for name in names])


def report(cells: dict[str, dict[str, Any]]) -> str:
    """One row for each checkpoint, in the order of their names, and setting."""
    rows = []
    for name, cell in sorted(cells.items()):
        for setting, sides in cell["distance"].items():
            agreement = cell["agreement"][setting]
            fails = all(side > cell["allowed"] for side in sides.values())
            rows.append(
                [name, f"{cell['radius']:.2f}", setting, f"{cell['allowed']:.0e}",
                 f"{sides['npg']:.2f}", f"{sides['upg']:.2f}", "fails" if fails else "undecided",
                 f"{agreement['npg']['cosine']:.3f}", f"{agreement['upg']['cosine']:.3f}"]
            )  # fmt: skip
    head = ["checkpoint", "ρ(J)", "setting", "(σ_min/σ_max)², at most", "NPG's distance, at least",
            "UPG's, at least", "condition", "cosine, NPG", "cosine, UPG"]  # fmt: skip
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="zoo names; all of them by default")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.models or [e.name for e in entries()]

    def measure(name: str) -> dict[str, Any]:
        model = deqzoo.DEQModel.from_pretrained(name).eval()
        data = folder_of(model, arguments.data)
        return {**conditions(model, data), **agreements(model, data)}

    cells = Cells("theorem1")
    missing = cells.fill(names, measure, lambda name: weights_digest(resolve_bundled(name)))
    print(report(cells.done))
    print("missing:", ", ".join(missing) or "nothing")
    write_text("theorem1_table.md", report(cells.done))


if __name__ == "__main__":
    main()
