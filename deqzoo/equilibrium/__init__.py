"""Equilibrium solving and its gradients, on plain torch.

A solver finds h* = F(h*), a gradient decides how h* is differentiated, and a layout says what one
independent sample is; the three are chosen separately:

>>> import torch
>>> from deqzoo.equilibrium import fixed_point
>>> weight = torch.eye(3) / 2
>>> x = torch.ones(2, 3, requires_grad=True)
>>> solution = fixed_point(lambda z: torch.tanh(z @ weight + x), torch.zeros(2, 3),
...                        solver={"name": "anderson", "tol": 1e-5}, gradient="npg")
>>> solution.state.sum().backward()
"""

from deqzoo.equilibrium.diagnostics import Fidelity, gradient_fidelity, spectral_radius
from deqzoo.equilibrium.gradients import (
    GRADIENTS,
    JFB,
    NPG,
    UPG,
    Gradient,
    Implicit,
    Unrolled,
    make_gradient,
)
from deqzoo.equilibrium.gradients.base import Cost, Problem, attach_cotangent
from deqzoo.equilibrium.layer import Equilibrium, fixed_point
from deqzoo.equilibrium.layout import Causal, Layout, Rows, Segments, Selection
from deqzoo.equilibrium.maps import BatchMap, BoundMap, DetachableMap, OnceDifferentiableMap
from deqzoo.equilibrium.regularization import (
    correction_weights,
    fixed_point_correction,
    jacobian_penalty,
)
from deqzoo.equilibrium.solvers import (
    SOLVERS,
    Anderson,
    Broyden,
    FixedPointIteration,
    Solution,
    Solver,
    Status,
    make_solver,
)
from deqzoo.equilibrium.solvers.base import StepRule

__all__ = [
    "GRADIENTS",
    "JFB",
    "NPG",
    "SOLVERS",
    "UPG",
    "Anderson",
    "BatchMap",
    "BoundMap",
    "Broyden",
    "Causal",
    "Cost",
    "DetachableMap",
    "Equilibrium",
    "Fidelity",
    "FixedPointIteration",
    "Gradient",
    "Implicit",
    "Layout",
    "OnceDifferentiableMap",
    "Problem",
    "Rows",
    "Segments",
    "Selection",
    "Solution",
    "Solver",
    "Status",
    "StepRule",
    "Unrolled",
    "attach_cotangent",
    "correction_weights",
    "fixed_point",
    "fixed_point_correction",
    "gradient_fidelity",
    "jacobian_penalty",
    "make_gradient",
    "make_solver",
    "spectral_radius",
]
