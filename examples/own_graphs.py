"""Tutorial: from a list of PyG graphs to a published graph classifier, trained from nothing.

    python examples/own_graphs.py                     # makes rings, paths and stars first
    python examples/own_graphs.py graphs.pt --publish ORG/NAME

`graphs.pt` is a list of torch_geometric `Data` with node features x, edge_index and y, saved by
`torch.save`; a folder in TUDataset's format will do, too. Every step is a command that you can type
yourself; the script prints it and runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch_geometric.data import Data
from torch_geometric.utils import degree

from deqzoo.cli import run

RECIPE = """\
name: my-graphs
task: graph-classification
data: {{name: graphs, path: {path}}}
model:
  family: ignn
  overrides:
    hidden_sizes: [32, 32]
    gradient: {{name: upg, steps: 5, damping: 0.5}}
optimizer: {{name: adam, lr: 0.005}}
schedule: {{name: constant, warmup: 0}}
stages: [{{epochs: {epochs}}}]
batch_size: 32
precision: float32
evaluation: {{per_epoch: 0.1}}
"""


def step(title: str, *arguments: object) -> None:
    """Print a command and run it."""
    command = [str(argument) for argument in arguments]
    print(f"\n# {title}\n$ deqzoo {' '.join(command)}", flush=True)
    if code := run(command):
        sys.exit(code)


def make_graphs(path: Path, count: int) -> None:
    """Rings, paths and stars of 5 to 12 nodes; the one node feature is the degree, with noise."""
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for number in range(3 * count):
        n = int(torch.randint(5, 13, (1,), generator=generator))
        kind = number % 3
        pairs = [(0 if kind == 2 else i, i + 1) for i in range(n - 1)]
        pairs += [(n - 1, 0)] if kind == 0 else []
        edges = torch.tensor(pairs + [(b, a) for a, b in pairs]).T
        x = degree(edges[1], n)[:, None] + 0.1 * torch.rand(n, 1, generator=generator)
        graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([kind])))
    torch.save(graphs, path)


def main(argv: list[str] | None = None) -> None:
    """Run the tutorial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graphs", nargs="?", type=Path, help="list of Data, or folder")
    parser.add_argument("--output", type=Path, default=Path("my-graphs"))
    parser.add_argument("--count", type=int, default=60, help="graphs to make of each class")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--publish", help="repository on the Hub, ORG/NAME")
    settings = parser.parse_args(argv)
    graphs = settings.graphs or Path("graphs.pt")
    if settings.graphs is None and not graphs.exists():
        make_graphs(graphs, settings.count)
    recipe, path = Path("my-graphs.yaml"), json.dumps(str(graphs))  # quoted, whatever is in it
    recipe.write_text(RECIPE.format(path=path, epochs=settings.epochs), encoding="utf-8")
    print(f"\n# The recipe, {recipe}\n{recipe.read_text()}")
    model = settings.output / "model"
    step("Train from nothing.", "train", recipe, "--output", settings.output)
    step("Measure the graphs held out.", "evaluate", model, "--data", graphs)
    step("Name the classes of graphs.", "predict-graphs", model, graphs)
    step("Record checksums and a golden prediction.", "seal", model)
    where = ["--dry-run"] if settings.publish is None else []
    step(
        "Publish it with its card (only listed here unless --publish names a repository).",
        "publish", model, "--repo-id", settings.publish or "ORG/NAME", *where,
    )  # fmt: skip


if __name__ == "__main__":
    main()
