"""Inputs that several tabs have: checkpoint, solver, budget and tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from deqzoo.errors import UserError
from deqzoo.hub.card_texts import data_title
from deqzoo.hub.catalogue import Entry, below_baseline, main_value

from .guard import MAX_STEPS, guarded
from .shelf import TOLERANCES, TRAINING, LoadedCheckpoint, Shelf, solver_settings

SOLVER_NAMES = [
    ("Anderson: mixes the last few steps", "anderson"),
    ("Broyden: quasi-Newton steps", "broyden"),
    ("Plain: applies the network again and again", "fixed_point"),
]
#: On a narrow page the answer lies below the fold: go there.
TO_THE_ANSWER = """
() => { if (innerWidth < 820) setTimeout(() =>
  document.querySelector('.tabitem:not([style*="none"]) .dz-layout > :nth-child(2)')
    ?.scrollIntoView({behavior: 'smooth'}), 150); }
"""


def in_place(
    function: Callable[..., Any], outputs: Sequence[Any], message: Any
) -> Callable[..., Any]:
    """A handler whose error messages appear in one of its outputs and empty the others.

    A message stays until the next try, without results of an earlier one beside it.

    Args:
        function: fills `outputs`; may be a generator.
        outputs: components.
        message: the one of `outputs`, a `gr.HTML`, that shows what went wrong.
    """

    def show_error(error: gr.Error) -> Any:
        notice = f'<div class="dz-error" role="alert"><b>{error.title}.</b> {error.message}</div>'
        values = [notice if output is message else None for output in outputs]
        return values[0] if len(values) == 1 else tuple(values)

    return guarded(function, show_error)


def menu_label(entry: Entry) -> str:
    """A checkpoint's name with its figure, its size, its data and how it was trained."""
    facts = []
    for evaluation in entry.tests()[:1]:
        title = data_title(evaluation.get("data", {}).get("name", ""))
        value = main_value(evaluation)
        facts.append(f"{value} on {title}" if value else title)
        if below_baseline(evaluation):
            facts.append("no better than always naming the most frequent class")
    count = entry.parameters
    facts.append(f"{count / 1e6:.1f}M weights" if count >= 1e6 else f"{count / 1e3:.0f}k weights")
    gradient = (entry.config.get("gradient") or {}).get("name")
    if gradient:
        penalty = " and Jacobian penalty" if "-jr-" in entry.name else ""
        facts.append(f"{gradient} gradient{penalty}")
    return f"{entry.name}: {', '.join(facts)}"


def checkpoint_menu(shelf: Shelf, task: str, prefix: str) -> gr.Dropdown:
    """The checkpoints of a task, the default one first, told apart by more than their names."""
    entries = shelf.entries(task)
    return gr.Dropdown(
        [(menu_label(entry), entry.name) for entry in entries], value=entries[0].name,
        label="Checkpoint", elem_id=f"{prefix}-checkpoint",
    )  # fmt: skip


def picture_input(elem_id: str) -> gr.Image:
    """A picture's component that hands over the uploaded file as it is.

    The demo's own code opens it then, and explains what is wrong with it. (A subclass would make
    Gradio write a stub file into this package.)
    """
    component = gr.Image(
        type="filepath", sources=["upload", "webcam", "clipboard"], label="Picture", height=260,
        elem_id=elem_id,
    )  # fmt: skip
    default_preprocess = component.preprocess

    def preprocess(payload: Any) -> Any:
        return payload.path if payload is not None and payload.path else default_preprocess(payload)

    component.preprocess = preprocess  # type: ignore[method-assign]
    return component


@dataclass
class SolverControls:
    """Components of one tab; `inputs` is their order in event functions."""

    shelf: Shelf
    task: str
    checkpoint: gr.Dropdown
    solver: gr.Radio
    budget: gr.Slider
    exponent: gr.Slider
    reset_event: Any = None  # fills in the settings of another checkpoint

    def __post_init__(self) -> None:
        self.reset_event = self.checkpoint.input(
            self.reset, [self.checkpoint], self.settings, api_visibility="private", queue=False
        )

    def reset(self, name: str) -> tuple[Any, Any, Any]:
        """A checkpoint's own settings."""
        own_settings = defaults(self.shelf, name, self.task)
        return own_settings.solver, own_settings.max_steps, own_settings.exponent

    def read(
        self, checkpoint: Any, solver: Any, budget: Any, exponent: Any
    ) -> tuple[LoadedCheckpoint, dict[str, Any]]:
        """The checkpoint and the per-call solver settings that the values of `inputs` mean.

        Raises:
            UserError: there is no such checkpoint, or a value is out of range.
        """
        try:
            tolerance = 10.0 ** float(exponent)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"the tolerance must be a power of ten, got {exponent!r}") from error
        settings = solver_settings(solver, budget, tolerance)
        return self.shelf.get(checkpoint, self.task), settings

    @property
    def inputs(self) -> list[Any]:
        return [self.checkpoint, *self.settings]

    @property
    def settings(self) -> list[Any]:
        """The components that a checkpoint's own settings fill."""
        return [self.solver, self.budget, self.exponent]


@dataclass(frozen=True)
class Defaults:
    """A checkpoint's own solver settings within the limits of the page."""

    solver: str
    max_steps: int
    tolerance: float

    @property
    def exponent(self) -> float:
        """The tolerance as a power of ten, rounded to half a unit of the exponent."""
        return round(2 * math.log10(self.tolerance)) / 2


def defaults(shelf: Shelf, name: str, task: str) -> Defaults:
    """Solver settings stored in a checkpoint's configuration."""
    settings: dict[str, Any] = {}
    for entry in shelf.entries(task):
        if entry.name == name:
            settings = entry.config.get("solver") or {}
    low, high = TOLERANCES
    return Defaults(
        settings.get("name", "anderson"),
        min(int(settings.get("max_steps", 30)), MAX_STEPS),
        min(max(float(settings.get("tol", 1e-3)), low), high),
    )


def solver_controls(shelf: Shelf, task: str, prefix: str) -> SolverControls:
    """Lay out the components; choosing a checkpoint resets the others to its own settings."""
    names = shelf.names(task)
    own_settings = defaults(shelf, names[0], task)
    checkpoint = checkpoint_menu(shelf, task, prefix)
    with gr.Accordion("Solver", open=task == "image classification"):
        budget = gr.Slider(
            1, MAX_STEPS, own_settings.max_steps, step=1, label="Budget: at most so many steps",
            elem_id=f"{prefix}-budget",
        )  # fmt: skip
        exponent = gr.Slider(
            math.log10(TOLERANCES[0]), math.log10(TOLERANCES[1]), own_settings.exponent, step=0.5,
            label="Tolerance, as a power of ten",
            info="−3: stop when another step changes the state by less than 0.1 %",
            elem_id=f"{prefix}-tolerance",
        )  # fmt: skip
        solver = gr.Radio(
            SOLVER_NAMES, value=own_settings.solver, label="Method", elem_id=f"{prefix}-solver"
        )
    return SolverControls(shelf, task, checkpoint, solver, budget, exponent)


def api_input(value: Any, label: str) -> Any:
    """An input of the API alone, a text or a number."""
    kind = gr.Textbox if isinstance(value, str) else gr.Number
    return kind(value, label=label, visible=False)


def missing_checkpoint(task: str) -> None:
    """What a tab shows where its family has no checkpoint."""
    gr.Markdown(
        f"### No checkpoint for {task} is here yet\n\nTrain one on your machine, store it "
        f"in the zoo, and start this page again:\n\n```\n{TRAINING[task]}\n```",
        elem_classes="dz-missing",
    )
