"""Arguments of a training run that plain `TrainingArguments` has no field for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from deqzoo.equilibrium import make_gradient, make_solver
from deqzoo.errors import UserError, as_user_error
from deqzoo.recipe import Jacobian


def check_report_to(names: Sequence[str]) -> list[str]:
    """Names for `TrainingArguments.report_to`, "none" where there are none.

    Raises:
        UserError: an unknown one, or one whose package is not installed.
    """
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    installed_names = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all") or name in installed_names:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            choices = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"report_to: unknown {name!r}; known are {choices}")
        raise UserError(f"report_to: {name} is not installed: pip install {name}")
    return list(names) or ["none"]


@dataclass
class DEQTrainingArguments(TrainingArguments):
    """`TrainingArguments` with solver, gradient and Jacobian penalty of the training steps.

    What is given here holds for training steps only; evaluation, and the saved checkpoint, keep
    the solver and gradient of the model's config.

    Args:
        solver: settings over those of the config, e.g. `{"max_steps": 8}`, or a solver's name; a
            JSON object on a command line read by `HfArgumentParser`.
        gradient: likewise, e.g. `{"name": "npg", "steps": 5, "damping": 0.5}`.
        jacobian_weight: weight γ of the Jacobian penalty (Bai et al., ICML 2021); 0 for none.
        jacobian_every: the penalty is added on every n-th step.
        jacobian_probes: random probes per sample of the penalty's estimate.

    Raises:
        UserError: an unknown solver, gradient or option, or a number out of range. A dict
            without "name" is checked when `DEQTrainer` gets the model whose settings it changes.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "solver", "gradient"]

    solver: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Solver of training steps: a name or a JSON object."}
    )
    gradient: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Gradient of training steps: a name or a JSON object."}
    )
    jacobian_weight: float = field(
        default=0.0, metadata={"help": "Weight of the Jacobian penalty; 0 for none."}
    )
    jacobian_every: int = field(
        default=4, metadata={"help": "The Jacobian penalty is added on every n-th step."}
    )
    jacobian_probes: int = field(
        default=1, metadata={"help": "Random probes per sample of the Jacobian penalty."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, make in (("solver", make_solver), ("gradient", make_gradient)):
            value = getattr(self, name)
            if value is None or (isinstance(value, dict) and "name" not in value):
                continue  # single settings are checked over those of the model, by DEQTrainer
            with as_user_error(name, ValueError, TypeError):
                make(value)
        weight = self.jacobian_weight
        if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise UserError(f"jacobian_weight must not be negative, got {weight!r}")
        for name in ("jacobian_every", "jacobian_probes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be at least 1, got {value!r}")

    @property
    def jacobian(self) -> Jacobian | None:
        """The penalty's settings, or None."""
        if not self.jacobian_weight:
            return None
        return Jacobian(self.jacobian_weight, self.jacobian_every, self.jacobian_probes)
