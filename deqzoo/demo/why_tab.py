"""The tab that shows what equilibrium models are good for, by measuring it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from . import why
from .controls import checkpoint_menu, in_place, missing_checkpoint
from .shelf import IMAGES, Shelf

WAITING = (
    '<div class="dz-waiting">Three measurements are made on this machine now: what a training '
    "step keeps in memory, how many steps easy and hard pictures take, and what happens to the "
    "answers when you stop early. They take a few seconds.</div>"
)


def why_tab(shelf: Shelf, pictures: list[Path], tab: Any) -> None:
    """Lay out the tab; the measurements start when it is first opened."""
    if not shelf.names(IMAGES):
        return missing_checkpoint(IMAGES)
    with gr.Row(elem_id="why-head"):
        checkpoint = checkpoint_menu(shelf, IMAGES, "why")
        button = gr.Button("Measure", variant="primary", elem_id="why-run", min_width=140, scale=0)
    with gr.Row():
        with gr.Column(min_width=300):
            memory = gr.HTML(WAITING, elem_id="why-memory")
        with gr.Column(min_width=300):
            effort = gr.HTML(elem_id="why-effort")
    with gr.Row():
        with gr.Column(min_width=300):
            curve = gr.HTML(elem_id="why-curve")
        with gr.Column(min_width=300):
            step = gr.Slider(
                1, 2, 1, step=1, label="Stop after so many steps", elem_id="why-step",
                visible=False,
            )  # fmt: skip
            dial = gr.HTML(elem_id="why-dial")
    state = gr.State(None)

    def run(name: Any) -> tuple[Any, ...]:
        measurement = why.measure(shelf.get(name, IMAGES), pictures)
        start = max(2, measurement.steps // 5)
        slider = gr.Slider(maximum=measurement.steps, value=start, visible=True)
        return (
            why.memory_html(measurement), why.effort_html(measurement),
            why.dial_chart(measurement), slider, why.dial_html(measurement, start), measurement,
        )  # fmt: skip

    def run_once(name: Any, measurement: Any) -> tuple[Any, ...]:
        return run(name) if measurement is None else (gr.skip(),) * 6

    outputs = [memory, effort, curve, step, dial, state]
    options: dict[str, Any] = {
        "api_visibility": "private", "concurrency_id": "images", "show_progress_on": [memory]
    }  # fmt: skip
    gr.on(
        [button.click, checkpoint.input], in_place(run, outputs, memory), [checkpoint], outputs,
        **options,
    )  # fmt: skip
    tab.select(in_place(run_once, outputs, memory), [checkpoint, state], outputs, **options)
    step.change(
        lambda results, k: why.dial_html(results, k) if results is not None else gr.skip(),
        [state, step], dial, api_visibility="private", queue=False, show_progress="hidden",
        trigger_mode="always_last",
    )  # fmt: skip
