"""Full back-propagation through the iteration, the baseline of every other gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deqzoo.equilibrium.gradients.base import Gradient, Problem, recorded_steps


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
        ok = isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps >= 1
        if self.steps is not None and not ok:
            raise ValueError(f"unrolled: steps must be None or an int ≥ 1, got {self.steps!r}")
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise ValueError(f"unrolled: damping must be in (0, 1], got {self.damping!r}")

    def attach(self, problem: Problem, state: Tensor) -> Tensor:
        return recorded_steps(problem, state, self.steps or problem.max_steps, self.damping)
