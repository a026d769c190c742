"""The tabs for one picture and for several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from . import examples, images
from .controls import (
    TO_THE_ANSWER,
    api_input,
    defaults,
    in_place,
    missing_checkpoint,
    picture_input,
    solver_controls,
)
from .guard import MAX_PICTURES, MAX_STEPS, guarded
from .shelf import IMAGES, Shelf, solver_settings

WAITING = (
    '<div class="dz-waiting">Pick an example or bring your own picture. You will see the network '
    "<em>solve</em> for its answer: how close it is to the equilibrium after each step, and how "
    "its opinion changes on the way.</div>"
)


def single_tab(shelf: Shelf, pictures: list[Path], page: gr.Blocks) -> None:
    """Lay out the tab for one picture; the page opens with the first example solved."""
    if not shelf.names(IMAGES):
        return missing_checkpoint(IMAGES)
    first = shelf.names(IMAGES)[0]
    classes = {name: shelf.labels(name, IMAGES) for name in shelf.names(IMAGES)}
    # Pictures of things that the first model does not know bring a model that does.
    known_pictures = examples.known_pictures(pictures, classes[first]) or pictures
    galleries = {first: known_pictures} if known_pictures else {}
    if known_pictures != pictures:
        galleries |= examples.pictures_of_others(pictures, classes, first)
    example_sets: dict[str, Any] = {}
    with gr.Row(elem_classes="dz-layout"):
        with gr.Column(min_width=280):
            picture = picture_input("image-picture")
            if galleries:
                for model, paths in galleries.items():
                    title = "Examples" if model == first else f"Examples for {model}"
                    example_sets[model] = gr.Examples(
                        [[str(p)] for p in paths], [picture], label=title, examples_per_page=24,
                        elem_id="image-examples" if model == first else f"image-{model}-examples",
                    )  # fmt: skip
                gr.HTML(
                    '<p class="dz-note">One is a photograph, the others are drawn, which is hard '
                    "for networks that have seen photographs only. “Several images” counts how "
                    "many a model names right.</p>"
                )
            button = gr.Button("Find the equilibrium", variant="primary", elem_id="image-run")
        with gr.Column(min_width=280):
            label = gr.Label(label="Answer", num_top_classes=5, elem_id="image-answer")
            details = gr.HTML(WAITING, elem_id="image-details")
        with gr.Column(min_width=280):
            controls = solver_controls(shelf, IMAGES, "image")
    inputs, outputs = [picture, *controls.inputs], [label, details]

    def run(path: Any, *solver_inputs: Any) -> tuple[dict[str, float], str]:
        opened_picture = images.open_picture(path)
        loaded_checkpoint, settings = controls.read(*solver_inputs)
        solve = images.solve_picture(loaded_checkpoint, opened_picture, settings)
        return dict(solve.labels), images.solve_html(solve)

    def run_if_ready(path: Any, *rest: Any) -> Any:
        return run(path, *rest) if path else (gr.skip(), gr.skip())

    def check(path: Any) -> tuple[Any, Any]:
        images.open_picture(path)
        return gr.skip(), gr.skip()

    safe_run_if_ready = in_place(run_if_ready, outputs, details)
    options: dict[str, Any] = {
        "api_visibility": "private", "concurrency_id": "images", "show_progress_on": [details]
    }  # fmt: skip
    button.click(in_place(run, outputs, details), inputs, outputs, **options)
    gr.on(
        [controls.budget.release, controls.exponent.release, controls.solver.input],
        safe_run_if_ready, inputs, outputs, trigger_mode="always_last", **options,
    )  # fmt: skip
    # What cannot be read leaves the input, where a browser would show a broken picture.
    safe_check = in_place(check, [details, picture], details)
    upload_event = picture.upload(
        safe_check, [picture], [details, picture], api_visibility="private", queue=False
    )
    upload_event.then(safe_run_if_ready, inputs, outputs, **options)
    controls.reset_event.then(safe_run_if_ready, inputs, outputs, **options)
    gr.on([button.click, picture.upload], None, None, None, js=TO_THE_ANSWER)
    for model, gallery in example_sets.items():
        example_event = gallery.load_input_event
        if model != first:
            example_event = example_event.then(
                lambda name=model: (name, *controls.reset(name)), None,
                [controls.checkpoint, *controls.settings], api_visibility="private", queue=False,
            )  # fmt: skip
        example_event.then(safe_run_if_ready, inputs, outputs, **options)
        example_event.then(None, None, None, js=TO_THE_ANSWER)
    if known_pictures:
        open_event = page.load(
            lambda: str(known_pictures[0]), None, picture, api_visibility="private", queue=False
        )
        open_event.then(safe_run_if_ready, inputs, outputs, **options)
    picture.clear(lambda: (None, WAITING), None, outputs, api_visibility="private", queue=False)


def batch_tab(shelf: Shelf, pictures: list[Path]) -> None:
    """Lay out the tab for several pictures."""
    if not shelf.names(IMAGES):
        return missing_checkpoint(IMAGES)
    with gr.Row(elem_classes="dz-layout"):
        with gr.Column(min_width=280):
            files = gr.File(
                label=f"Pictures, up to {MAX_PICTURES}", file_count="multiple",
                file_types=["image"], height=180, elem_id="batch-files",
            )  # fmt: skip
            if pictures:
                fill = gr.Button("Use the examples", elem_id="batch-examples")
            with gr.Row():
                button = gr.Button("Find the equilibria", variant="primary", elem_id="batch-run")
                stop = gr.Button("Stop", elem_id="batch-stop", min_width=80, scale=0)
        with gr.Column(min_width=280):
            answers = gr.HTML(
                '<div class="dz-waiting">Several pictures are solved together, yet each one takes '
                "its own number of steps.</div>",
                elem_id="batch-answers",
            )
        with gr.Column(min_width=280):
            controls = solver_controls(shelf, IMAGES, "batch")

    def run(paths: Any, *solver_inputs: Any) -> str:
        paths = images.check_count(paths)
        loaded_checkpoint, settings = controls.read(*solver_inputs)
        small, batch = images.open_pictures(paths, loaded_checkpoint)
        results = images.solve_batch(loaded_checkpoint, batch, settings)
        labels = list(loaded_checkpoint.model.config.label2id)
        return images.batch_html(small, [Path(p).name for p in paths], results, labels)

    options: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "images"}
    inputs = [files, *controls.inputs]
    safe_run = in_place(run, [answers], answers)
    run_events = [button.click(safe_run, inputs, answers, **options)]
    gr.on([button.click], None, None, None, js=TO_THE_ANSWER)
    if pictures:

        def known_paths(name: str) -> list[str]:
            paths = examples.known_pictures(pictures, shelf.labels(name, IMAGES)) or pictures
            return [str(path) for path in paths]

        fill_event = fill.click(
            known_paths, [controls.checkpoint], files, api_visibility="private", queue=False
        )
        run_events.append(fill_event.then(safe_run, inputs, answers, **options))
        fill_event.then(None, None, None, js=TO_THE_ANSWER)
    cancels: Any = run_events
    stop.click(None, None, None, cancels=cancels, api_visibility="private")


def endpoint(shelf: Shelf) -> None:
    """The API's /classify."""
    names = shelf.names(IMAGES)
    own_settings = defaults(shelf, names[0] if names else "", IMAGES)

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
        opened_picture = images.open_picture(picture)
        settings = solver_settings(solver, max_steps, tolerance)
        solve = images.solve_picture(shelf.get(checkpoint, IMAGES), opened_picture, settings)
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
            api_input(names[0] if names else "", "checkpoint"),
            api_input(own_settings.solver, "solver"),
            api_input(own_settings.max_steps, f"max_steps, 1 to {MAX_STEPS}"),
            api_input(own_settings.tolerance, "tolerance"),
        ],
        [gr.Label(visible=False), gr.JSON(visible=False)],
        api_name="classify",
        concurrency_id="images",
    )
