"""The tab for small graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gradio as gr

from . import graphs, nodes
from .controls import (
    TO_THE_ANSWER,
    api_input,
    checkpoint_menu,
    in_place,
    missing_checkpoint,
    solver_controls,
)
from .guard import guarded
from .molecules import MOLECULES
from .shelf import GRAPHS, NODES, Shelf


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
            examples = gr.Column(elem_id="graph-examples")
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
                "that equilibrium is the answer, and it reaches across the whole graph. Pick an "
                "example, or press the button.</div>",
                elem_id="graph-verdict",
            )
            drawing = gr.HTML(elem_id="graph-drawing")
            path = gr.HTML(elem_id="graph-residuals")
        with gr.Column(min_width=280):
            controls = solver_controls(shelf, GRAPHS, "graph")
    inputs = [source, number, files, *controls.inputs]

    outputs = [label, verdict, drawing, path]

    def run(
        graphs_of: Any, index: Any, uploads: Any, *solver_inputs: Any
    ) -> tuple[dict[str, float], str, str, str]:
        loaded_checkpoint, settings = controls.read(*solver_inputs)
        graph = graphs.pick(loaded_checkpoint, graphs_of, index, root, uploads)
        reading = graphs.read_graph(loaded_checkpoint, graph, settings)
        stored_class = (
            None if graph.label is None else graphs.class_name(loaded_checkpoint, graph.label)
        )
        return (
            reading.probabilities,
            graphs.verdict_html(graph, reading, stored_class),
            graphs.graph_html(graph, reading, graphs.node_kinds(loaded_checkpoint)),
            graphs.residuals_html(reading),
        )

    safe_run = in_place(run, outputs, verdict)
    options: dict[str, Any] = {
        "api_visibility": "private", "concurrency_id": "graphs", "show_progress_on": [verdict]
    }  # fmt: skip
    gr.on([button.click, number.submit], safe_run, inputs, outputs, **options)
    gr.on([button.click], None, None, None, js=TO_THE_ANSWER)
    rows, titles = _examples(shelf)
    with examples:
        gallery = gr.Examples(
            rows, [controls.checkpoint, source, number], example_labels=titles, label="Examples",
            examples_per_page=24,
        )  # fmt: skip
    # An example may be of another checkpoint, whose own solver settings it is to be read with.
    reset_event = gallery.load_input_event.then(
        controls.reset, [controls.checkpoint], controls.settings, api_visibility="private"
    )
    reset_event.then(safe_run, inputs, outputs, **options)
    reset_event.then(None, None, None, js=TO_THE_ANSWER)
    if shelf.names(NODES):
        _nodes(shelf, root)


def _nodes(shelf: Shelf, root: Path | None) -> None:
    """Lay out the part for models of nodes, below the graphs."""
    with gr.Column(elem_classes="dz-writing"):
        gr.Markdown(
            "### Nodes of a network\n\nThese models name every node of one large network, which "
            "cannot be shipped with this page (`--graph-data` names a folder that has it). On a "
            "small network, too, you see what an equilibrium is good for: what a node says "
            "travels far beyond the two or three edges of a layered network, and fades on the way."
        )
    with gr.Row(elem_classes="dz-layout"):
        with gr.Column(min_width=280):
            checkpoint = checkpoint_menu(shelf, NODES, "node")
            source = gr.Dropdown(
                nodes.available_networks(root), value=nodes.CHAIN, label="Network",
                elem_id="node-source",
            )  # fmt: skip
            node = gr.Number(20, label="Node that is changed", precision=0, elem_id="node-number")
            button = gr.Button("Change this node", variant="primary", elem_id="node-run")
        with gr.Column(min_width=280):
            verdict = gr.HTML(
                '<div class="dz-waiting">Take the features of one node away, and see where in the '
                "network the equilibrium moves.</div>",
                elem_id="node-verdict",
            )
            drawing = gr.HTML(elem_id="node-drawing")
            path = gr.HTML(elem_id="node-distance")

    def run(name: Any, network_name: Any, number: Any) -> tuple[str, str, str]:
        loaded_checkpoint = shelf.get(name, NODES)
        network = nodes.pick(loaded_checkpoint, network_name, root)
        reach = nodes.reach(loaded_checkpoint, network, number)
        at = int(number)
        return (
            nodes.verdict_html(network, reach, at),
            nodes.network_html(network, reach, at),
            nodes.distance_html(reach),
        )

    outputs = [verdict, drawing, path]
    gr.on(
        [button.click, node.submit], in_place(run, outputs, verdict), [checkpoint, source, node],
        outputs, api_visibility="private", concurrency_id="graphs", show_progress_on=[verdict],
    )  # fmt: skip


def _examples(shelf: Shelf) -> tuple[list[list[Any]], list[str]]:
    """Examples as rows of checkpoint, source and number, and what they are called."""
    rows, titles = [], []
    for name in shelf.names(GRAPHS):
        if "cox2" in name:
            rows += [[name, graphs.MADE_UP, i] for i in range(len(MOLECULES))]
            titles += list(MOLECULES)
        else:
            kind = "made-up protein" if "proteins" in name else f"{name}: made-up graph"
            rows += [[name, graphs.MADE_UP, i] for i in (0, 5)]
            titles += [f"{kind} {i}" for i in (1, 2)]
    return rows, titles


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
            graphs_of: COX2 or PROTEINS where the server has them, or "examples".
            checkpoint: name of a graph model.

        Returns:
            A dictionary with probabilities, n_steps, residual, converged and the norm per node.
        """
        loaded_checkpoint = shelf.get(checkpoint, GRAPHS)
        reading = graphs.read_graph(
            loaded_checkpoint, graphs.pick(loaded_checkpoint, graphs_of, number, root, None)
        )
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
            api_input(0, "number"),
            api_input(graphs.MADE_UP, "graphs_of"),
            api_input(names[0] if names else "", "checkpoint"),
        ],
        gr.JSON(visible=False),
        api_name="graph",
        concurrency_id="graphs",
    )
