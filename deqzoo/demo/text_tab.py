"""The text tab: how well a text is predicted, and how it would go on."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from deqzoo.evaluation.files import finite

from . import text as texts
from .controls import (
    TO_THE_ANSWER,
    api_input,
    in_place,
    missing_checkpoint,
    solver_controls,
)
from .guard import MAX_NEW_WORDS, MAX_TEXT_CHARACTERS, guarded
from .shelf import TEXT, Shelf

#: Written for this page, in the manner of the encyclopaedia that the models have read.
EXAMPLES = [
    "The river rises in the hills north of the city and flows south for about 40 miles before it "
    "reaches the sea. In the nineteenth century a canal was built along its western bank, and the "
    "town became an important port for the trade in coal and wool.",
    "The album was released in October and received mixed reviews from critics. The second single "
    "reached number four on the chart, but the band refused to perform it on television because a "
    "hippopotamus had eaten the drummer's sandwiches.",
]


def text_tab(shelf: Shelf) -> None:
    """Lay out the tab."""
    if not shelf.names(TEXT):
        return missing_checkpoint(TEXT)
    with gr.Row(elem_classes="dz-layout"):
        with gr.Column(min_width=280):
            text = gr.Textbox(
                label="Text", lines=8, max_lines=16, elem_id="text-input",
                placeholder=f"English text, up to {MAX_TEXT_CHARACTERS:,} characters",
            )  # fmt: skip
            button = gr.Button("Measure", variant="primary", elem_id="text-run")
            examples = gr.Examples(
                [[t] for t in EXAMPLES], [text], label="Examples", elem_id="text-examples",
                example_labels=["A river", "An album"],
            )  # fmt: skip
            upload = gr.UploadButton(
                "Upload a text file", file_types=[".txt", ".md", ".text"], elem_id="text-upload"
            )
        with gr.Column(min_width=280):
            figures = gr.HTML(
                '<div class="dz-waiting">Write, paste or upload a text. Every word is an '
                "equilibrium of its own: you will see which words surprise the model, and how many "
                "steps each one took.</div>",
                elem_id="text-figures",
            )
            tokens = gr.HTML(elem_id="text-tokens")
            suggestions = gr.HTML(elem_id="text-next")
        with gr.Column(min_width=280):
            controls = solver_controls(shelf, TEXT, "text")
    writing = _writing()
    inputs, outputs = [text, *controls.inputs], [figures, tokens, suggestions]
    options: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "text"}

    def measure(raw_text: Any, *solver_inputs: Any) -> tuple[str, str, str]:
        checked_text, (loaded_checkpoint, settings) = (
            texts.check_text(raw_text),
            controls.read(*solver_inputs),
        )
        scored_text = texts.score(loaded_checkpoint, checked_text, settings)
        continuations = texts.next_words(loaded_checkpoint, checked_text, solver=settings)
        return (
            texts.figures_html(scored_text, loaded_checkpoint.entry),
            texts.tokens_html(scored_text),
            texts.next_words_html(continuations),
        )

    def read(path: Any, *solver_inputs: Any) -> tuple[Any, ...]:
        raw_text = texts.read_text_file(path)
        return raw_text, *measure(raw_text, *solver_inputs)

    def go_on(
        raw_text: Any, length: Any, temperature: Any, *solver_inputs: Any
    ) -> Iterator[tuple[str, str]]:
        checked_text, (loaded_checkpoint, settings) = (
            texts.check_text(raw_text),
            controls.read(*solver_inputs),
        )
        words, heat = texts.check_writing(length, temperature)
        for state in texts.write(loaded_checkpoint, checked_text, words, heat, solver=settings):
            yield _continuation_html(checked_text, state.text), _effort_html(state)

    measure_options: dict[str, Any] = {**options, "show_progress_on": [figures]}
    safe_measure = in_place(measure, outputs, figures)
    button.click(safe_measure, inputs, outputs, **measure_options)
    example_event = examples.load_input_event
    example_event.then(safe_measure, inputs, outputs, **measure_options)
    example_event.then(None, None, None, js=TO_THE_ANSWER)
    all_outputs = [text, *outputs]
    upload.upload(
        in_place(read, all_outputs, figures),
        [upload, *controls.inputs],
        all_outputs,
        **measure_options,
    )
    gr.on([button.click], None, None, None, js=TO_THE_ANSWER)
    writing_outputs = [writing["output"], writing["effort"]]
    run_event = writing["run"].click(
        in_place(go_on, writing_outputs, writing["output"]),
        [text, writing["length"], writing["temperature"], *controls.inputs],
        writing_outputs,
        show_progress="minimal",
        **options,
    )
    writing["stop"].click(None, None, None, cancels=[run_event], api_visibility="private")


def _writing() -> dict[str, Any]:
    """Components for continuing the text."""
    with gr.Column(elem_classes="dz-writing"):
        gr.Markdown("### Let it write on")
        with gr.Row():
            length = gr.Slider(1, MAX_NEW_WORDS, 40, step=1, label="Words", elem_id="write-length")
            temperature = gr.Slider(
                0, 1.5, 0.8, step=0.1, label="Temperature",
                info="0 always takes the likeliest word", elem_id="write-temperature",
            )  # fmt: skip
        with gr.Row():
            run = gr.Button("Continue the text", variant="primary", elem_id="write-run")
            stop = gr.Button("Stop", elem_id="write-stop")
        output = gr.HTML(elem_id="write-output")
        effort = gr.HTML(elem_id="write-effort")
    return {"length": length, "temperature": temperature, "run": run, "stop": stop,
            "output": output, "effort": effort}  # fmt: skip


def _continuation_html(prompt: str, continuation: str) -> str:
    tail = prompt.strip()[-200:]
    start = "…" if len(prompt.strip()) > len(tail) else ""
    return (
        f'<p class="dz-written" aria-live="polite"><span class="dz-note">{start}{escape(tail)}'
        f"</span> {escape(texts.readable(continuation))}</p>"
    )


def _effort_html(state: texts.WrittenText) -> str:
    mean = sum(state.steps) / len(state.steps)
    unconverged = f", {state.unconverged} not converged" if state.unconverged else ""
    return (
        f'<p class="dz-note">{len(state.steps)} words, {mean:.1f} solver steps each on average '
        f"(the last one {state.steps[-1]}){unconverged}</p>"
    )


def endpoints(shelf: Shelf) -> None:
    """The API's /perplexity and /generate."""
    names = shelf.names(TEXT)
    first = names[0] if names else ""

    @guarded
    def perplexity(text: Any, checkpoint: Any) -> dict[str, Any]:
        """Say how well a text is predicted.

        Args:
            text: up to 20,000 characters.
            checkpoint: name of a language model.

        Returns:
            A dictionary with perplexity, tokens, unknown_share and more; `surprisal` lists every
            token with its negative log-likelihood in nats.
        """
        scored_text = texts.score(shelf.get(checkpoint, TEXT), texts.check_text(text))
        return finite(scored_text.report.to_dict())

    @guarded
    def generate(
        text: Any, length: Any, temperature: Any, checkpoint: Any, seed: Any
    ) -> tuple[str, dict[str, Any]]:
        """Continue a text.

        Args:
            text: the beginning.
            length: words to add, 1 to 200.
            temperature: 0 takes the likeliest word each time.
            checkpoint: name of a language model.
            seed: of the drawing, up to 2**53; -1 for a new one each time.

        Returns:
            What comes after the text; then the solver steps of each added word.
        """
        checked_text = texts.check_text(text)
        words, heat = texts.check_writing(length, temperature)
        number = texts.check_seed(seed)
        loaded_checkpoint = shelf.get(checkpoint, TEXT)
        *_, state = texts.write(loaded_checkpoint, checked_text, words, heat, number)
        return state.text, {"n_steps": state.steps, "unconverged": state.unconverged}

    options: dict[str, Any] = {"concurrency_id": "text"}
    gr.Button(visible=False).click(
        perplexity, [gr.Textbox(label="text", visible=False), api_input(first, "checkpoint")],
        gr.JSON(visible=False), api_name="perplexity", **options,
    )  # fmt: skip
    gr.Button(visible=False).click(
        generate,
        [gr.Textbox(label="text", visible=False), api_input(40, "length"),
         api_input(0.8, "temperature"), api_input(first, "checkpoint"), api_input(-1, "seed")],
        [gr.Textbox(visible=False), gr.JSON(visible=False)],
        api_name="generate", **options,
    )  # fmt: skip
