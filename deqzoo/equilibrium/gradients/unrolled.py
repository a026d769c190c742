"""Full back-propagation through the iteration, the baseline of every other gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deqzoo.equilibrium.gradients.base import Gradient, Problem, recorded_steps
from deqzoo.equilibrium.options import is_count, is_damping, require


@dataclass(frozen=True)
class Unrolled(Gradient):
    """A weight-tied network of `steps` damped applications of F from the start, recorded.

    No solver takes part in the gradient: accelerated iterations would be differentiated through
    their mixing weights, which is neither cheap nor what anybody compares with.

    Args:
        steps: applications of F; None takes the solver's max_steps.
        damping: β of each application, in (0, 1].
    """

    steps: int | None = None
    damping: float = 1.0

    name: ClassVar[str] = "unrolled"
    can_checkpoint: ClassVar[bool] = True
    needs_solve: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.steps is None or is_count(self.steps), self, "steps", "None or an int ≥ 1")
        require(is_damping(self.damping), self, "damping", "in (0, 1]")

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        return recorded_steps(problem, state, self.steps or problem.max_steps, self.damping)
