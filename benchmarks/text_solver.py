"""Solve passages of text beside TorchDEQ: `python benchmarks/text_solver.py --data FOLDER`.

For every stored text checkpoint the same eight passages of 70 tokens of its test split are solved
by deqzoo's causal Anderson and by TorchDEQ's, in turns in one process on one thread: alone and all
eight together, as the beginning of a text and behind a memory of earlier tokens. Like is compared
with like, by two criteria of stopping:

- `per token`: every token meets the tolerance. TorchDEQ does not offer it; its map looks at every
  token here and ends the solve.
- `per sequence`: the whole passage meets it in the root mean square. It is TorchDEQ's own.

FOLDER holds `wikitext` and `ptb_text_only`. Rows of checkpoints that are not named stay in the
results as they are. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import cpu_time, markdown_table, write_results
from torch import Tensor
from torchdeq.solver import anderson_solver
from transformers import PreTrainedModel
from transformers.utils import logging

from deqzoo import DEQModel, list_models
from deqzoo.data.text import PTB
from deqzoo.evaluation import text
from deqzoo.models.deq_transformer.outputs import token_residual

NAMES = list_models("deq-transformer-*")
TOLERANCES = (1e-2, 1e-3, 1e-4)
CRITERIA = ("per token", "per sequence")
LENGTH, BATCH, MAX_STEPS = 70, 8, 30
RESULTS = Path(__file__).resolve().parent / "results"

Map = Callable[[Tensor], Tensor]
Problem = tuple[Map, Tensor]


class _Done(Exception):
    """Every token meets the tolerance."""


class _Watched:
    """The map as TorchDEQ sees it: it counts, and may end the solve token by token."""

    def __init__(self, f: Map, tol: float | None) -> None:
        self.f, self.tol = f, tol
        self.evals = 0
        self.last = torch.empty(0)

    def __call__(self, z: Tensor) -> Tensor:
        fz = self.f(z)
        self.evals += 1
        self.last = z
        if self.tol is not None and bool((token_residual(z, fz) <= self.tol).all()):
            raise _Done
        return fz


def solve_ours(model: PreTrainedModel, problem: Problem, tol: float, criterion: str) -> dict:
    """What one solve of deqzoo's took, rows in units of all rows."""
    f, z0 = problem
    solver = {"tol": tol, "max_steps": MAX_STEPS, "criterion": criterion}
    solution = model.solve(f, z0, solver=solver)
    return {
        "evals": solution.n_evals,
        "rows": solution.row_evals / z0[..., 0].numel(),
        "steps": int(solution.n_steps.max()),
        "state": solution.state,
    }


def solve_peer(problem: Problem, tol: float, criterion: str) -> dict:
    """The same for TorchDEQ's Anderson, with the window that deqzoo has by default."""
    f, z0 = problem
    watched = _Watched(f, tol if criterion == "per token" else None)
    limit = 0.0 if criterion == "per token" else tol
    try:
        anderson_solver(watched, z0, max_iter=MAX_STEPS + 1, tol=limit, stop_mode="rel", m=6)
    except _Done:
        pass
    evals = watched.evals
    return {"evals": evals, "rows": evals, "steps": evals - 1, "state": watched.last}


def unmet(f: Map, state: Tensor, tol: float) -> int:
    """Tokens above the tolerance, or behind one that is."""
    # A hundredth for the rounding of a residual that is computed in other shapes.
    return int((token_residual(state, f(state)).cummax(1).values > 1.01 * tol).sum())


def measure(
    solves: dict[str, Callable[[Problem], dict]], problems: list[Problem], tol: float, turns: int
) -> dict[str, dict[str, float]]:
    """Means over the problems of each side, and its least CPU milliseconds per passage."""
    found: dict[str, list[dict]] = {}
    least = dict.fromkeys(solves, float("inf"))

    def run(side: str) -> None:
        found[side] = [solves[side](problem) for problem in problems]

    for _ in range(turns):
        for side in solves:
            least[side] = min(least[side], cpu_time(lambda side=side: run(side)))
    return {
        side: {
            "evals": sum(s["evals"] for s in parts) / len(parts),
            "rows": sum(s["rows"] for s in parts) / len(parts),
            "steps": max(s["steps"] for s in parts),
            "unmet": sum(
                unmet(f, s["state"], tol) for s, (f, _) in zip(parts, problems, strict=True)
            ),
            "ms": 1e3 * least[side] / BATCH,
        }
        for side, parts in found.items()
    }


def passages(model: PreTrainedModel, data: Path) -> Tensor:
    """Token ids (BATCH, memory + LENGTH) at random positions of the test split."""
    tokenizer = text.load_tokenizer(model)
    corpus = text.corpus_of(tokenizer)
    folder = data / ("ptb_text_only" if corpus is PTB else "wikitext")
    stream = text.corpus_stream(corpus, "test", folder, tokenizer)
    length = model.config.mem_len + LENGTH
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(stream) - length, (BATCH,), generator=generator)
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


def problems_of(model: PreTrainedModel, ids: Tensor, with_memory: bool) -> dict[int, list[Problem]]:
    """The map and start of every passage alone, and of all together, by size of the batch."""
    memory = None
    if with_memory:
        tight = {"tol": 1e-5, "max_steps": 300}
        memory = model(ids[:, :-LENGTH], return_logits=False, solver=tight).memory

    def bound(rows: slice) -> Problem:
        past = None if memory is None else tuple(t[rows] for t in memory)
        return model.equilibrium_map(ids[rows, -LENGTH:], past)

    alone = [bound(slice(row, row + 1)) for row in range(BATCH)]
    return {1: alone, BATCH: [bound(slice(None))]}


@torch.no_grad()
def rows_of(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one checkpoint."""
    model = DEQModel.from_pretrained(name).eval()
    ids = passages(model, options.data)
    rows = []
    for with_memory in (True, False):
        problems = problems_of(model, ids, with_memory)
        for criterion in CRITERIA:
            for tol in options.tolerances:
                for batch, parts in problems.items():
                    solves = {
                        "deqzoo": lambda p, tol=tol, by=criterion: solve_ours(model, p, tol, by),
                        "TorchDEQ": lambda p, tol=tol, by=criterion: solve_peer(p, tol, by),
                    }
                    row = {"checkpoint": name, "memory": with_memory, "criterion": criterion}
                    row |= {"tol": tol, "batch": batch}
                    rows.append(row | measure(solves, parts, tol, options.turns))
                    print(rows[-1], flush=True)
    return rows


def render(results: dict[str, Any]) -> str:
    """The tables of a run as markdown."""
    parts = [
        f"Eight passages of {LENGTH} tokens, at most {MAX_STEPS} steps, one thread. `evaluations` "
        "are calls of the map, `rows` are evaluations of all tokens that the evaluated rows amount "
        "to, `unmet` are tokens (of 560) above the tolerance or behind one that is, `ms` is CPU "
        "time per passage, the least of the turns."
    ]
    columns = ["checkpoint", "memory", "tol", "batch", "evaluations", "rows", "unmet", "ms"]
    columns += ["TorchDEQ: evaluations", "unmet", "ms", "our ms / its"]
    for criterion in CRITERIA:
        lines = []
        for row in results["rows"]:
            if row["criterion"] == criterion:
                ours, peer = row["deqzoo"], row["TorchDEQ"]
                memory = "yes" if row["memory"] else "no"
                name = row["checkpoint"].removeprefix("deq-transformer-")
                line = [name, memory, f"{row['tol']:g}", row["batch"]]
                line += [ours[key] for key in ("evals", "rows", "unmet", "ms")]
                line += [peer[key] for key in ("evals", "unmet", "ms")]
                lines.append([*line, ours["ms"] / peer["ms"]])
        parts.append(f"Both stop {criterion}:\n\n{markdown_table(columns, lines)}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with both corpora")
    parser.add_argument("--names", nargs="+", default=NAMES, help="checkpoints to measure")
    parser.add_argument("--tolerances", nargs="+", type=float, default=TOLERANCES)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    stored = options.output / "text_solver.json"
    rows = json.loads(stored.read_text())["rows"] if stored.is_file() else []
    for name in options.names:
        rows = [row for row in rows if row["checkpoint"] != name] + rows_of(name, options)
        results = {"rows": rows}
        write_results(options.output, "text_solver", results, render(results))


if __name__ == "__main__":
    main()
