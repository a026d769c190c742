"""Models as programs of torch.export and ONNX: a solve with a fixed number of steps.

A program cannot look at residuals, so each solve does all its steps, and the residual that is left
is an output beside the scores. Checks of the inputs stay behind.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deqzoo.equilibrium.solvers.traced import can_be_traced
from deqzoo.errors import UserError
from deqzoo.files import replacing, require_writable
from deqzoo.models.ignn.inputs import GraphBatch
from deqzoo.models.ignn.sparse import normalized_entries

TOKENS = 64  # of a text, by default
_FREE = {"batch": 2, "nodes": 5, "edges": 8}  # open dimensions, and their sizes in the example


def export_model(
    model: Any,
    path: str | os.PathLike[str],
    steps: int,
    *,
    solver: str | None = None,
    batch: int | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """Write a model with `steps` solver steps to a file that runs without deqzoo.

    Inputs of the program, by name: `pixel_values` (batch, 3, size, size) float32, normalised as the
    image processor does it; `input_ids` (batch, size) int64, shorter texts padded on the right with
    any word; or one graph as `x` (nodes, features), `edge_index` (2, edges) int64, undirected edges
    in both directions, and `edge_weight` (edges,). Outputs: `logits` as the model has them
    (`last_hidden_state` without a head) and `residual`, ‖F(h) − h‖ / ‖F(h)‖ of each sample, token
    or graph after the last step.

    Args:
        model: of any family; exported as in evaluation mode, in float32.
        path: .pt2 for `torch.export.load`, or .onnx (needs `deqzoo[export]`).
        steps: updates of the state, at least 1; one more evaluation measures the residual.
        solver: "anderson" or "fixed_point"; None takes the model's own.
        batch: samples per call; None leaves it open. One graph is read at a time.
        size: side of the pictures in pixels (else the one that the model was made for), or tokens
            of a text (else 64). Nodes and edges of a graph are open.

    Returns:
        The metadata in the file: model, solver, steps, shapes of the inputs, outputs.

    Raises:
        UserError: another suffix, missing packages, another solver, a batch or size that means
            nothing to the model, or a graph model that measures each graph before it solves.
    """
    path = Path(path)
    check_target(path)
    model = copy.deepcopy(model).eval().float()
    model.fold_weight_norm()
    settings = {"max_steps": steps, "tol": 0.0, **({} if solver is None else {"name": solver})}
    chosen_solver = model.resolve_solver(settings)
    if not can_be_traced(chosen_solver):
        raise UserError(
            f"solver {chosen_solver.name!r} cannot be exported; "
            "choose solver anderson or fixed_point"
        )
    shapes = _input_shapes(model, batch, size)
    inputs = tuple(_example(model, name, shape) for name, shape in shapes.items())
    if hasattr(model, "use_native_norm"):
        model.use_native_norm(False)
    program = Program(model, settings)
    dims = {name: torch.export.Dim(name) for name in _FREE}
    open_dims = tuple(
        {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for shape in shapes.values()
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program(*inputs)  # what the model refuses, it refuses in its own words
        exported_program = torch.export.export(
            program, inputs, dynamic_shapes=(open_dims,), strict=False
        )
    facts = {
        "model": Path(model.config._name_or_path).name or type(model).__name__,
        "solver": chosen_solver.name,
        "steps": steps,
        "inputs": {name: list(shape) for name, shape in shapes.items()},
        "outputs": [program.scores, "residual"],
    }
    content = (_as_pt2 if path.suffix == ".pt2" else _as_onnx)(exported_program, facts)
    with replacing(path) as fresh:
        fresh.write_bytes(content)
    return facts


class Program(nn.Module):
    """A model as a function of tensors: (scores, residual left by the solve)."""

    def __init__(self, model: PreTrainedModel, settings: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.scores = ""  # what the model calls them

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        arguments: tuple[Any, ...] = inputs
        if self.model.main_input_name == "x":
            arguments = (_graph(self.model.config, *inputs),)
        output = self.model(*arguments, solver=self.settings)
        self.scores = "logits" if "logits" in output else "last_hidden_state"
        return output[self.scores], output.residual


class Edges:
    """An adjacency that a program can hold: products gather rows and add them up.

    Args:
        index: (2, e) int64, row and column of each entry; duplicates add up.
        values: (e,).
    """

    def __init__(self, index: Tensor, values: Tensor) -> None:
        self.index, self.values = index, values

    @property
    def transposed(self) -> Edges:
        return Edges(self.index.flip(0), self.values)

    def product(self, dense: Tensor) -> Tensor:
        """The product with (n, d)."""
        messages = dense.index_select(0, self.index[1]) * self.values.unsqueeze(1)
        return torch.zeros_like(dense).index_add(0, self.index[0], messages)

    def propagate(self, nodes: Tensor) -> Tensor:
        """Send node data (n, d) along the edges."""
        return self.transposed.product(nodes)

    def to(self, like: Tensor) -> Edges:
        return self


def _graph(config: Any, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> GraphBatch:
    n = x.shape[0]
    adjacency: Any = Edges(*normalized_entries(edge_index, edge_weight, n, config.normalization))
    return GraphBatch(x, adjacency, torch.zeros_like(x[:, 0], dtype=torch.int64), 1)


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is loaded.

    Raises:
        UserError: another suffix than .pt2 and .onnx, no such folder, a folder in the file's place,
            or packages that ONNX needs are missing.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(
            f"{path.name} has an unknown suffix; a file for torch.export ends in .pt2, one for "
            "ONNX in .onnx"
        )
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist; make it first")
    require_writable(path)
    packages = ("onnx", "onnxscript") if path.suffix == ".onnx" else ()
    missing_packages = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing_packages:
        raise UserError(
            f"ONNX files need {' and '.join(missing_packages)}; "
            "install with: pip install 'deqzoo[export]'"
        )


def _input_shapes(
    model: Any, batch: int | None, size: int | None
) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the program's inputs by name; an open dimension has a name."""
    config, first = model.config, "batch" if batch is None else batch
    if model.main_input_name == "pixel_values":
        side = config.image_size if size is None else size
        return {"pixel_values": (first, config.num_channels, side, side)}
    if model.main_input_name == "input_ids":
        return {"input_ids": (first, TOKENS if size is None else size)}
    if model.main_input_name != "x":
        raise UserError(f"{type(model).__name__} reads {model.main_input_name}, of which no "
                        "program can be made")  # fmt: skip
    if batch is not None or size is not None:
        raise UserError("a graph model reads one graph of any size; leave batch and size out")
    if config.known_radius is None or config.official:
        raise UserError(
            "this model fits its weights to each graph's spectral radius, which a program cannot "
            "measure; only models with spectral_radius in their config, or of normalised "
            "undirected graphs, can be exported"
        )
    model.enforce_constraint()
    return {
        "x": ("nodes", config.num_features),
        "edge_index": (2, "edges"),
        "edge_weight": ("edges",),
    }


def _example(model: PreTrainedModel, name: str, shape: tuple[int | str, ...]) -> Tensor:
    sizes = [_FREE[size] if isinstance(size, str) else size for size in shape]
    if name == "edge_index":  # both directions of some edges among the nodes
        ends = torch.arange(sizes[1] // 2) % (_FREE["nodes"] - 1)
        edges = torch.stack((ends, ends + 1))
        return torch.cat((edges, edges.flip(0)), 1)
    if name == "input_ids":
        return torch.arange(sizes[0] * sizes[1]).reshape(sizes) % model.config.vocab_size
    return torch.ones(sizes) if name == "edge_weight" else torch.rand(sizes)


def _as_pt2(program: Any, facts: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"deqzoo.json": json.dumps(facts)})
    return content.getvalue()


def _as_onnx(program: Any, facts: dict[str, Any]) -> bytes:
    with _silent("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(
            program, dynamo=True, verbose=False,
            input_names=list(facts["inputs"]), output_names=facts["outputs"],
        )  # fmt: skip
    assert onnx_program is not None
    onnx_program.model.metadata_props["deqzoo"] = json.dumps(facts)
    return onnx_program.model_proto.SerializeToString()


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Silence these loggers below the level of errors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


__all__ = ["Edges", "Program", "check_target", "export_model"]
