"""How right each gradient mode is for one model, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from deqzoo.equilibrium import Segments, make_gradient, spectral_radius
from deqzoo.equilibrium.diagnostics import SavedTensors, compare_gradients, gradients_by_name
from deqzoo.errors import UserError
from deqzoo.fidelity.adjoints import (
    RecordedModel,
    neumann_rule,
    no_rule,
    seeded,
    solver_rule,
)
from deqzoo.fidelity.memory import peak_memory

STEPS = tuple(range(1, 21))
DAMPINGS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
_MAIN_STEPS = (1, 2, 3, 5, 7, 10, 15, 20)
_MAIN_DAMPINGS = (0.5, 0.8, 1.0)
EXACT_FORWARD = {"name": "anderson", "max_steps": 150, "tol": 1e-6}
EXACT_ADJOINT = {"name": "anderson", "max_steps": 200, "tol": 1e-7, "window": 8}
EQUILIBRIUM = "equilibrium"
"""Group of all parameters that the loss sees through the equilibrium only: the head's gradient is
the same in every mode and would flatter the figures."""


@dataclass
class Row:
    """One gradient setting held against the exact gradient.

    Attributes:
        gradient: its settings.
        cosine, relative_error: by parameter group; "equilibrium" holds all parameters behind it.
        seconds: recording the graph and the backward pass, head included, solve not; None where
            another row with the same work was timed.
        saved_bytes: what the recorded graph keeps for backward, weights not counted.
        peak_bytes: growth of the memory over both; None where it cannot be measured.
    """

    gradient: dict[str, Any]
    cosine: dict[str, float]
    relative_error: dict[str, float]
    seconds: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def agreement(self) -> float:
        """Cosine over the parameters behind the equilibrium."""
        return self.cosine.get(EQUILIBRIUM, self.cosine["all"])


@dataclass
class Study:
    """All rows of one model on one batch.

    Attributes:
        rows: in the order of the table.
        spectral_radius: ρ(∂F/∂h) at h*, per sample (of a graph batch: the largest, one entry);
            empty where the time did not suffice.
        solve: seconds and steps of the model's own forward solve.
        own: the model's configured gradient.
        exact_residuals: how far the forward and the adjoint solve behind the exact gradient came.
        missing: how many settings the time limit left out.
    """

    rows: list[Row] = field(default_factory=list)
    spectral_radius: list[float] = field(default_factory=list)
    solve: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    exact_residuals: tuple[float, float] = (0.0, 0.0)
    missing: int = 0

    def recommendation(self, threshold: float) -> Row | None:
        """The cheapest timed setting whose cosine reaches the threshold.

        Times within a tenth of the cheapest count as equal; of those the most accurate is taken.
        """
        candidates = [(r.seconds, r) for r in self.rows if r.seconds is not None]
        good = [(seconds, r) for seconds, r in candidates if r.agreement >= threshold]
        limit = 1.1 * min((seconds for seconds, _ in good), default=0.0)
        near = (r for seconds, r in good if seconds <= limit)
        return max(near, key=lambda row: row.agreement, default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Comparison:
    """Measures settings on one model and batch.

    The exact gradient is taken at a tightly solved equilibrium with a tightly solved adjoint; the
    settings under test start from the model's own forward solution. All Neumann settings share one
    recorded graph and one sequence of Jacobian products.

    Args:
        model: a model of the zoo whose output has a loss.
        batch: its keyword arguments, labels among them.
        on_evaluation: called before every evaluation and product; what it raises ends the work.
    """

    def __init__(
        self,
        model: Any,
        batch: Mapping[str, Any],
        on_evaluation: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.batch = model, dict(batch)
        self.weights = list(model.parameters()) + list(model.buffers())
        tight = RecordedModel(model, batch, EXACT_FORWARD, on_evaluation)
        self.exact = tight.gradients(solver_rule(EXACT_ADJOINT))
        self.exact_residuals = tight.residuals()
        head = tight.gradients(no_rule)
        self.behind = {
            name for name, g in self.exact.items() if not bool(head[name].any()) and bool(g.any())
        }
        del tight
        self.recorded = RecordedModel(model, batch, on_evaluation=on_evaluation)
        self.prefix = f"{model.base_model_prefix}."

    def groups_of(self, name: str) -> tuple[str, ...]:
        """ "all", the first component of the name, and "equilibrium" where it belongs there."""
        group = name.removeprefix(self.prefix).split(".", 1)[0]
        return ("all", group, EQUILIBRIUM) if name in self.behind else ("all", group)

    def compare(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Cosine and relative error by group."""
        cosine, error, _ = compare_gradients(gradients, self.exact, self.groups_of)
        return cosine, error

    def neumann(self, steps: int, damping: float) -> Row:
        """An NPG setting, without its cost."""
        gradient = {"name": "npg", "steps": steps, "damping": damping}
        gradients = self.recorded.gradients(neumann_rule(steps, damping))
        return Row(gradient, *self.compare(gradients))

    def measure(self, gradient: Mapping[str, Any]) -> Row:
        """Any setting by running it, with its cost."""
        settings = make_gradient(gradient).to_dict()
        device = next(self.model.parameters()).device
        with seeded(), peak_memory(device) as peak:
            start_time = time.perf_counter()
            with SavedTensors(self.weights) as saved_tensors:
                loss = self.recorded.replayed(settings)
            parameters = self.recorded.parameters
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start_time
        del loss
        row = Row(settings, *self.compare(gradients_by_name(parameters, gradients)))
        row.seconds, row.saved_bytes, row.peak_bytes = seconds, saved_tensors.bytes, peak.bytes
        return row

    def radius(self, n_iter: int = 40) -> list[float]:
        """Spectral radius of every sample at the exact equilibrium."""
        f, layout = self.recorded.maps[0], self.recorded.layouts[0]
        state = self.recorded.solutions[0].state
        if isinstance(layout, Segments):  # the rows of a graph belong together
            whole = spectral_radius(lambda z: f(z[0])[None], state[None], n_iter)
            return [float(whole)]
        return spectral_radius(f, state, n_iter).tolist()


def plan(steps: Sequence[int], dampings: Sequence[float], unrolled: int) -> list[dict[str, Any]]:
    """Settings in the order in which they are worth their time; implicit and main ones first."""
    implicit = [
        {"name": "implicit", "solver": {"name": name, "max_steps": 60, "tol": tol}}
        for name, tolerances in (("anderson", TOLERANCES), ("broyden", (1e-3,)))
        for tol in tolerances
    ]
    cheap: list[dict[str, Any]] = [{"name": "jfb"}]
    main_steps = [k for k in _MAIN_STEPS if k in steps]
    main_dampings = [x for x in _MAIN_DAMPINGS if x in dampings] or list(dampings)
    cheap += [
        {"name": "npg", "steps": k, "damping": main_dampings[-1], "timed": True} for k in main_steps
    ]
    phantom = [
        {"name": name, "steps": k, "damping": x}
        for name, ks, xs in (
            ("upg", main_steps, main_dampings),
            ("npg", steps, dampings),
            ("upg", steps, dampings),
        )
        for k in ks
        for x in reversed(xs)
    ]
    rest = [{"name": "unrolled", "steps": unrolled}]
    queue = cheap + implicit + phantom[: len(main_steps) * len(main_dampings)] + rest + phantom
    return list({_key(settings): settings for settings in reversed(queue)}.values())[::-1]


def _key(settings: Mapping[str, Any]) -> str:
    return str({k: v for k, v in sorted(settings.items()) if k != "timed"})


def study(
    model: Any,
    batch: Mapping[str, Any],
    *,
    steps: Sequence[int] = STEPS,
    dampings: Sequence[float] = DAMPINGS,
    seconds: float = 200.0,
    on_row: Callable[[Row], None] | None = None,
) -> Study:
    """Hold all settings against the exact gradient on one batch.

    Args:
        model: a model of the zoo; its training mode is left as it is.
        batch: keyword arguments with labels.
        steps: k of the phantom gradients.
        dampings: their λ.
        seconds: the work ends after so much time; the study says how many settings it left out.
        on_row: called with every row, for progress.

    Raises:
        OutOfTime: the time did not suffice for the exact gradient and one setting.
    """
    clock = Clock(seconds)
    settings = plan(steps, dampings, model.config.solver["max_steps"])
    try:
        comparison = Comparison(model, batch, clock.check)
        own = comparison.recorded.solutions
        result = Study(own=dict(model.config.gradient), exact_residuals=comparison.exact_residuals)
        result.rows.append(_row(comparison, settings[0], []))
    except OutOfTime as error:
        raise OutOfTime(
            "the time allowed ended before the exact gradient of this batch was found; allow more "
            "(--seconds) or take fewer samples (--batch-size)"
        ) from error
    result.solve = {
        "seconds": sum(s.seconds for s in own),
        "steps_mean": float(own[0].n_steps.double().mean()),
        "residual_max": float(own[0].rel_residual.max()),
        "equilibria": len(own),
    }
    try:
        if on_row is not None:
            on_row(result.rows[-1])
        result.spectral_radius = comparison.radius()
        for gradient in settings[1:]:
            clock.check()
            result.rows.append(_row(comparison, gradient, result.rows))
            if on_row is not None:
                on_row(result.rows[-1])
    except OutOfTime:
        result.missing = len(settings) - len(result.rows)
    result.rows.sort(key=_order)
    return result


class OutOfTime(UserError):
    """The time that a user allowed is over."""


class Clock:
    """`check` raises `OutOfTime` once so many seconds have passed."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def check(self) -> None:
        if time.perf_counter() > self.end:
            raise OutOfTime


def _row(comparison: Comparison, gradient: dict[str, Any], measured_rows: Sequence[Row]) -> Row:
    is_timed = gradient.pop("timed", False)
    if gradient["name"] != "npg" or is_timed:
        return comparison.measure(gradient)
    row = comparison.neumann(gradient["steps"], gradient["damping"])
    for other in _same_work(row, measured_rows):  # λ has no influence on the cost
        row.seconds, row.saved_bytes = other.seconds, other.saved_bytes
        row.peak_bytes = other.peak_bytes
    return row


def _same_work(row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    for other in rows:
        same = [other.gradient.get(key) == row.gradient[key] for key in ("name", "steps")]
        if all(same) and other.seconds is not None:
            yield other


def _order(row: Row) -> tuple[Any, ...]:
    names = ("implicit", "unrolled", "jfb", "npg", "upg")
    g = row.gradient
    solver = g.get("solver") or {}
    place = (solver.get("name", ""), solver.get("tol", 0.0))
    return (names.index(g["name"]), place, -g.get("damping", 0), g.get("steps") or 0)


def describe(gradient: Mapping[str, Any]) -> str:
    """A setting in words: "npg k=5 λ=0.5"."""
    if gradient["name"] == "implicit":
        solver = gradient["solver"]
        return f"implicit {solver['name']} tol {solver['tol']:g}"
    if gradient["name"] in ("upg", "npg"):
        return f"{gradient['name']} k={gradient['steps']} λ={gradient['damping']:g}"
    if gradient["name"] == "unrolled":
        return f"unrolled {gradient['steps']} steps"
    return gradient["name"]
