"""The tab for small graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gradio as gr

from . import graphs
from .controls import missing_checkpoint, settings_from, solver_controls
from .guard import guarded
from .shelf import GRAPHS, Shelf


def graphs_tab(shelf: Shelf, root: Path | None) -> None:
    """Lay out the tab; `root` is a local folder of TUDataset's sets, or None."""
    if not shelf.names(GRAPHS):
        return missing_checkpoint(GRAPHS)
    sources = graphs.available_sets(root)
    with gr.Row(elem_classes="dz-layout"):
        with gr.Column(min_width=280):
            with gr.Row():
                source = gr.Dropdown(
                    sources, value=_first_source(shelf, sources), label="Graphs", min_width=150,
                    elem_id="graph-source",
                )  # fmt: skip
                number = gr.Number(
                    0, label="Number", precision=0, min_width=100, elem_id="graph-number"
                )
            button = gr.Button("Find the equilibrium", variant="primary", elem_id="graph-run")
            with gr.Accordion("Use graphs of your own", open=False):
                files = gr.File(
                    label="Files in TUDataset's format (NAME_A.txt, NAME_graph_indicator.txt, …)",
                    file_count="multiple", file_types=[".txt"], height=140, elem_id="graph-files",
                    interactive=importlib.util.find_spec("torch_geometric") is not None,
                )  # fmt: skip
        with gr.Column(min_width=280):
            label = gr.Label(label="Class", elem_id="graph-answer")
            verdict = gr.HTML(
                '<div class="dz-waiting">Nodes exchange messages until nothing changes any more: '
                "that equilibrium is the answer. Bright nodes have a large state.</div>",
                elem_id="graph-verdict",
            )
            drawing = gr.HTML(elem_id="graph-drawing")
        with gr.Column(min_width=280):
            controls = solver_controls(shelf, GRAPHS, "graph")
    inputs = [source, number, files, *controls.inputs]

    @guarded
    def run(
        chosen: Any, index: Any, uploads: Any, checkpoint: Any, solver: Any, budget: Any,
        exponent: Any,
    ) -> tuple[dict[str, float], str, str]:  # fmt: skip
        loaded = shelf.get(checkpoint, GRAPHS)
        graph = graphs.pick(loaded, chosen, index, root, uploads)
        reading = graphs.read_graph(loaded, graph, settings_from(solver, budget, exponent))
        stored = None if graph.label is None else graphs.class_name(loaded, graph.label)
        return (
            reading.probabilities,
            graphs.verdict_html(graph, reading, stored),
            graphs.graph_html(graph, reading),
        )

    gr.on(
        [button.click, number.submit], run, inputs, [label, verdict, drawing],
        api_visibility="private", concurrency_id="graphs",
    )  # fmt: skip


def _first_source(shelf: Shelf, sources: list[str]) -> str:
    """The data set of the first checkpoint where it is at hand."""
    name = shelf.names(GRAPHS)[0].lower()
    return next((s for s in sources if s.lower() in name), sources[-1])


def endpoint(shelf: Shelf, root: Path | None) -> None:
    """The API's /graph."""
    names = shelf.names(GRAPHS)

    @guarded
    def graph(number: Any, graphs_of: Any, checkpoint: Any) -> dict[str, Any]:
        """Classify a graph.

        Args:
            number: of the graph among its set.
            graphs_of: COX2 or PROTEINS where the server has them, or "made-up examples".
            checkpoint: name of a graph model.

        Returns:
            A dictionary with probabilities, n_steps, residual, converged and the norm per node.
        """
        loaded = shelf.get(checkpoint, GRAPHS)
        reading = graphs.read_graph(loaded, graphs.pick(loaded, graphs_of, number, root, None))
        return {
            "probabilities": reading.probabilities,
            "n_steps": reading.n_steps,
            "residual": reading.residual,
            "converged": reading.converged,
            "norms": reading.norms.tolist(),
        }

    gr.Button(visible=False).click(
        graph,
        [
            gr.Number(0, label="number", visible=False),
            gr.Textbox(graphs.MADE_UP, label="graphs_of", visible=False),
            gr.Textbox(names[0] if names else "", label="checkpoint", visible=False),
        ],
        gr.JSON(visible=False),
        api_name="graph",
        concurrency_id="graphs",
    )
