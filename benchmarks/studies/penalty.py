"""How large the finite difference of a Jacobian penalty may be.

    python benchmarks/studies/penalty.py --data ROOT

Compiled maps have no double backward: recipes with `jacobian: {difference: ε}` estimate ‖J‖²_F / d
by ‖F(h + εv) − F(h)‖² / ε². Here that is held against the exact estimate on trained checkpoints, at
their equilibria, in float32 and with the map under bfloat16 autocast: the ratio of the two, over 8
probes each, and the cosine of their parameter gradients for the same probes in float32. ROOT holds
the data sets in folders of their own (cifar10, ptb_text_only, ...).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anytime import folder_of
from cells import Cells, markdown_table, write_text
from torch import Tensor

import deqzoo
from deqzoo.equilibrium.fixed import difference_penalty
from deqzoo.equilibrium.regularization import jacobian_penalty
from deqzoo.evaluation.files import weights_digest
from deqzoo.fidelity.adjoints import RecordedModel
from deqzoo.fidelity.batches import make_batch
from deqzoo.zoo import resolve_bundled

MODELS = {"mdeq-tiny-cifar-upg": 8, "mdeq-cifar-upg": 2, "deq-transformer-ptb-upg": 4}
"""Checkpoint: pictures or segments of its batch."""
SIZES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
PROBES = 8


def in_bfloat16(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The map under autocast."""

    def call(state: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return f(state)

    return call


def averaged(estimate: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[float, Tensor]:
    """Mean over seeded probes, and the mean gradient of the parameters as one vector."""
    value, gradient = 0.0, torch.zeros(sum(p.numel() for p in parameters))
    for seed in range(PROBES):
        torch.manual_seed(seed)
        penalty = estimate()
        found = torch.autograd.grad(penalty, parameters, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        gradient += torch.cat([g.flatten().float() for g in flat]) / PROBES
        value += float(penalty.detach()) / PROBES
    return value, gradient


def measure(name: str, root: Path) -> dict[str, Any]:
    """Ratios and cosines of a checkpoint, by size."""
    model = deqzoo.DEQModel.from_pretrained(name).eval()
    batch, described = make_batch(model, folder_of(model, root), size=MODELS[name])
    recorded = RecordedModel(model, batch)
    f, state = recorded.maps[0], recorded.solutions[0].state
    parameters = list(recorded.parameters.values())
    with torch.enable_grad():
        exact, truth = averaged(lambda: jacobian_penalty(f, state), parameters)
        rows = {}
        for size in SIZES:
            row = {}
            for dtype, g in (("float32", f), ("bfloat16", in_bfloat16(f))):
                value, gradient = averaged(
                    lambda g=g, size=size: difference_penalty(g, state, size), parameters
                )
                cosine = torch.cosine_similarity(gradient, truth, dim=0)
                row[dtype] = {"ratio": value / exact, "cosine": float(cosine)}
            rows[f"{size:g}"] = row
    return {"batch": described, "exact": exact, "sizes": rows}


def report(cells: dict[str, dict[str, Any]]) -> str:
    """One row per checkpoint and size."""
    rows = [
        [name, f"{cell['exact']:.3g}", size,
         *(f"{row[d][k]:.3f}" for d in ("float32", "bfloat16") for k in ("ratio", "cosine"))]
        for name in MODELS
        if (cell := cells.get(name)) is not None
        for size, row in cell["sizes"].items()
    ]  # fmt: skip
    head = ["checkpoint", "exact penalty", "ε", "ratio, float32", "cosine, float32",
            "ratio, bfloat16", "cosine, bfloat16"]  # fmt: skip
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    root = parser.parse_args().data
    torch.set_num_threads(1)
    cells = Cells("penalty")
    missing = cells.fill(
        MODELS, lambda name: measure(name, root), lambda name: weights_digest(resolve_bundled(name))
    )
    print(report(cells.done))
    print("missing:", ", ".join(missing) or "nothing")
    write_text("penalty_table.md", report(cells.done))


if __name__ == "__main__":
    main()
