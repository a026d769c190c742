"""The tabs for one picture and for several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from deqzoo.evaluation.classify import classify_pixels

from . import images
from .controls import (
    defaults,
    missing_checkpoint,
    picture_input,
    settings_from,
    solver_controls,
)
from .guard import MAX_PICTURES, MAX_STEPS, guarded
from .shelf import IMAGES, Shelf, solver_settings

WAITING = (
    '<div class="dz-waiting">Pick an example or bring your own picture. You will see the network '
    "<em>solve</em> for its answer: how close it is to the equilibrium after each step, and how "
    "its opinion changes on the way.</div>"
)


def single_tab(shelf: Shelf, examples: list[Path]) -> None:
    """Lay out the tab for one picture."""
    if not shelf.names(IMAGES):
        return missing_checkpoint(IMAGES)
    with gr.Row(elem_classes="dz-layout"):
        with gr.Column(min_width=280):
            picture = picture_input("image-picture")
            if examples:
                shown = gr.Examples(
                    [[str(p)] for p in examples], [picture], label="Examples",
                    elem_id="image-examples",
                )  # fmt: skip
            button = gr.Button("Find the equilibrium", variant="primary", elem_id="image-run")
        with gr.Column(min_width=280):
            label = gr.Label(label="Answer", num_top_classes=5, elem_id="image-answer")
            details = gr.HTML(WAITING, elem_id="image-details")
        with gr.Column(min_width=280):
            controls = solver_controls(shelf, IMAGES, "image")
    inputs, outputs = [picture, *controls.inputs], [label, details]

    @guarded
    def run(
        path: Any, checkpoint: Any, solver: Any, budget: Any, exponent: Any
    ) -> tuple[dict[str, float], str]:
        opened = images.open_picture(path)
        settings = settings_from(solver, budget, exponent)
        solve = images.solve_picture(shelf.get(checkpoint, IMAGES), opened, settings)
        return dict(solve.labels), images.solve_html(solve)

    def run_if_ready(path: Any, *rest: Any) -> Any:
        return run(path, *rest) if path else (gr.skip(), gr.skip())

    options: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "images"}
    button.click(run, inputs, outputs, **options)
    gr.on(
        [picture.upload, controls.budget.release, controls.exponent.release, controls.solver.input],
        run_if_ready, inputs, outputs, trigger_mode="always_last", show_progress="minimal",
        **options,
    )  # fmt: skip
    controls.chosen.then(run_if_ready, inputs, outputs, **options)
    if examples:
        shown.load_input_event.then(run_if_ready, inputs, outputs, **options)
    picture.clear(lambda: (None, WAITING), None, outputs, api_visibility="private", queue=False)


def batch_tab(shelf: Shelf, examples: list[Path]) -> None:
    """Lay out the tab for several pictures."""
    if not shelf.names(IMAGES):
        return missing_checkpoint(IMAGES)
    with gr.Row(elem_classes="dz-layout"):
        with gr.Column(min_width=280):
            files = gr.File(
                label=f"Pictures, up to {MAX_PICTURES}", file_count="multiple",
                file_types=["image"], height=180, elem_id="batch-files",
            )  # fmt: skip
            if examples:
                fill = gr.Button("Use the examples", elem_id="batch-examples")
            button = gr.Button("Find the equilibria", variant="primary", elem_id="batch-run")
        with gr.Column(min_width=280):
            answers = gr.HTML(
                '<div class="dz-waiting">Several pictures are solved together, yet each one takes '
                "its own number of steps.</div>",
                elem_id="batch-answers",
            )
        with gr.Column(min_width=280):
            controls = solver_controls(shelf, IMAGES, "batch")

    @guarded
    def run(paths: Any, checkpoint: Any, solver: Any, budget: Any, exponent: Any) -> str:
        paths = images.check_count(paths)
        settings = settings_from(solver, budget, exponent)
        loaded = shelf.get(checkpoint, IMAGES)
        small, batch = images.open_pictures(paths, loaded)
        found = classify_pixels(loaded.model, batch, top_k=1, solver=settings)
        return images.batch_html(small, [Path(p).name for p in paths], found)

    options: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "images"}
    inputs = [files, *controls.inputs]
    button.click(run, inputs, answers, **options)
    if examples:
        paths = [str(p) for p in examples]
        filled = fill.click(lambda: paths, None, files, api_visibility="private", queue=False)
        filled.then(run, inputs, answers, **options)


def endpoint(shelf: Shelf) -> None:
    """The API's /classify."""
    names = shelf.names(IMAGES)
    own = defaults(shelf, names[0] if names else "", IMAGES)

    @guarded
    def classify(
        picture: Any, checkpoint: Any, solver: Any, max_steps: Any, tolerance: Any
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Name what a picture shows.

        Args:
            picture: a picture file.
            checkpoint: name of an image model.
            solver: anderson, broyden or fixed_point.
            max_steps: budget, 1 to 100.
            tolerance: residual at which the solve ends.

        Returns:
            The label with confidences; then the solver's report with one residual per step.
        """
        opened = images.open_picture(picture)
        settings = solver_settings(solver, max_steps, tolerance)
        solve = images.solve_picture(shelf.get(checkpoint, IMAGES), opened, settings)
        report = {
            "n_steps": solve.n_steps,
            "residual": solve.residual,
            "converged": solve.converged,
            "residuals": solve.residuals,
        }
        return dict(solve.labels), report

    gr.Button(visible=False).click(
        classify,
        [
            gr.File(label="picture", visible=False),
            gr.Textbox(names[0] if names else "", label="checkpoint", visible=False),
            gr.Textbox(own.solver, label="solver", visible=False),
            gr.Number(own.max_steps, label=f"max_steps, 1 to {MAX_STEPS}", visible=False),
            gr.Number(own.tolerance, label="tolerance", visible=False),
        ],
        [gr.Label(visible=False), gr.JSON(visible=False)],
        api_name="classify",
        concurrency_id="images",
    )
