"""Gradients against worked numbers, and what each of them promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deqzoo.equilibrium import (
    JFB,
    NPG,
    UPG,
    Anderson,
    Equilibrium,
    Solution,
    Unrolled,
    fixed_point,
    make_gradient,
)

from .cases import F64, G_TANH, H_STAR, H_TANH, W_STAR, W_TANH, X_TANH, A, C, G, Q, U

EXACT_SOLVER = {"name": "anderson", "max_steps": 60, "tol": 1e-13, "ridge": 0.0}
EXACT = {"name": "implicit", "solver": EXACT_SOLVER}
NAMES = ["implicit", "upg", "npg", "jfb", "unrolled"]


class Held(Anderson):
    """A solver that stays where it starts, to differentiate at a chosen state."""

    def solve(self, f, z0, *_, **__) -> Solution:  # type: ignore[no-untyped-def, override]
        zero = torch.zeros(1)
        return Solution(z0.clone(), zero, zero, zero, zero, zero, 0, 0)


def affine_gradients(
    gradient: object, at: Tensor, solver: object = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of L = g·h, for the affine case."""
    tensors = {"A": A, "u": U, "c": C}
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}

    def f(h: Tensor) -> Tensor:
        return h @ leaves["A"].T + Q @ leaves["u"] + leaves["c"]

    solution = fixed_point(f, at.unsqueeze(0), solver=solver or Held(), gradient=gradient)
    (solution.state[0] @ G).backward()
    return solution.state[0].detach(), {name: t.grad for name, t in leaves.items()}


def vector(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def test_implicit_gradient_of_the_affine_case() -> None:
    state, found = affine_gradients(EXACT, torch.zeros(3, dtype=F64), EXACT_SOLVER)
    torch.testing.assert_close(state, H_STAR, atol=1e-11, rtol=0)
    torch.testing.assert_close(found["c"], W_STAR, atol=1e-10, rtol=0)
    expected = torch.tensor([6.148148148148, 1.981481481481], dtype=F64)
    torch.testing.assert_close(found["u"], expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found["A"], torch.outer(W_STAR, H_STAR), atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_the_adjoint_system_takes_any_solver(solver: str) -> None:
    adjoint = {"name": solver, "max_steps": 100, "tol": 1e-12}
    _, found = affine_gradients({"name": "implicit", "solver": adjoint}, H_STAR)
    torch.testing.assert_close(found["c"], W_STAR, atol=1e-9, rtol=0)


PHANTOM = [
    (1.0, 1, (1, -1, 2), (5, 2), 0.935937654116, 0.389355771549),
    (1.0, 2, (0.8, -1.4, 2.8), (6.4, 2.5), 0.976180156389, 0.219160941774),
    (1.0, 5, (0.056, -1.2644, 3.0832), (6.2224, 2.0632), 0.999859807679, 0.026571909183),
    (0.5, 1, (0.5, -0.5, 1.0), (2.5, 1.0), 0.935937654116, 0.653928549546),
    (0.5, 2, (0.7, -0.85, 1.7), (4.1, 1.625), 0.954359709402, 0.437213339051),
    (
        0.5,
        5,
        (0.5651875, -1.294825, 2.7251),
        (6.0153875, 2.25869375),
        0.987363725792,
        0.162113195679,
    ),
]


@pytest.mark.parametrize("cls", [UPG, NPG])
@pytest.mark.parametrize(("damping", "steps", "dc", "du", "cosine", "error"), PHANTOM)
def test_phantom_gradients_at_the_equilibrium(
    cls: type, damping: float, steps: int, dc: tuple, du: tuple, cosine: float, error: float
) -> None:
    state, found = affine_gradients(cls(steps, damping), H_STAR)
    dc, du = torch.tensor(dc, dtype=F64), torch.tensor(du, dtype=F64)
    torch.testing.assert_close(state, H_STAR, atol=1e-12, rtol=0)
    torch.testing.assert_close(found["c"], dc, atol=1e-11, rtol=0)
    torch.testing.assert_close(found["u"], du, atol=1e-11, rtol=0)
    torch.testing.assert_close(found["A"], torch.outer(dc, H_STAR), atol=1e-11, rtol=0)
    exact = torch.cat([torch.outer(W_STAR, H_STAR).flatten(), Q.T @ W_STAR, W_STAR])
    mine = vector(found)
    found_cosine = (mine @ exact / mine.norm() / exact.norm()).item()
    assert found_cosine == pytest.approx(cosine, abs=1e-11)
    assert ((mine - exact).norm() / exact.norm()).item() == pytest.approx(error, abs=1e-11)


AWAY = {
    (1.0, 2): [[0.3, 2.1, 1.7], [-0.9, -2.7, -2.3], [1.8, 5.4, 4.6]],
    (1.0, 5): [[-0.4452, 0.2216, 0.7404], [0.3888, -3.2216, -3.6852], [-0.4968, 7.5628, 8.3712]],
    (0.5, 2): [[0.575, 1.025, 0.925], [-0.725, -1.175, -1.075], [1.45, 2.35, 2.15]],
    (0.5, 5): [
        [0.0179625, 1.499425, 1.411575],
        [-0.4987875, -2.7622375, -2.5545375],
        [1.1104125, 5.71415, 5.2837875],
    ],
}


@pytest.mark.parametrize(("damping", "steps"), list(AWAY))
def test_phantom_gradients_away_from_the_equilibrium(damping: float, steps: int) -> None:
    at = torch.ones(3, dtype=F64)
    _, unrolled = affine_gradients(UPG(steps, damping), at)
    expected = torch.tensor(AWAY[damping, steps], dtype=F64)
    torch.testing.assert_close(unrolled["A"], expected, atol=1e-11, rtol=0)
    dc = next(row[2] for row in PHANTOM if row[:2] == (damping, steps))
    state, neumann = affine_gradients(NPG(steps, damping), at)
    expected = torch.tensor(dc, dtype=F64).unsqueeze(1).expand(3, 3)
    torch.testing.assert_close(neumann["A"], expected, atol=1e-11, rtol=0)
    assert torch.equal(state, at)
    torch.testing.assert_close(unrolled["c"], neumann["c"], atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("damping", "steps", "expected"),
    [
        (1.0, 2, (-0.02, 2.24, 2.36)),
        (1.0, 5, (-0.17732, 2.31104, 2.79296)),
        (0.5, 2, (0.045, 1.41, 1.44)),
        (0.5, 5, (-0.0605725, 2.13931375, 2.34393625)),
    ],
)
def test_values_after_unrolled_steps(damping: float, steps: int, expected: tuple) -> None:
    zero = torch.zeros(3, dtype=F64)
    for gradient in (UPG(steps, damping), Unrolled(steps, damping)):
        state, _ = affine_gradients(gradient, zero)
        torch.testing.assert_close(state, torch.tensor(expected, dtype=F64), atol=1e-12, rtol=0)


def tanh_gradients(gradient: object, at: Tensor, solver: object = None) -> tuple[Tensor, Tensor]:
    """dL/dW and dL/dx of the tanh case."""
    weight, x = W_TANH.clone().requires_grad_(), X_TANH.clone().requires_grad_()
    solution = fixed_point(
        lambda h, x: torch.tanh(h @ weight.T + x),
        at.unsqueeze(0),
        x.unsqueeze(0),
        solver=solver or Held(),
        gradient=gradient,
    )
    (solution.state[0] @ G_TANH).backward()
    return weight.grad, x.grad


def test_implicit_gradient_of_the_tanh_case() -> None:
    dw, dx = tanh_gradients(EXACT, torch.zeros(2, dtype=F64), EXACT_SOLVER)
    expected = [[0.340301799805, -0.304996192525], [-0.323752925504, 0.290164229676]]
    torch.testing.assert_close(dw, torch.tensor(expected, dtype=F64), atol=1e-10, rtol=0)
    expected_x = torch.tensor([0.426363588009, -0.405629529510], dtype=F64)
    torch.testing.assert_close(dx, expected_x, atol=1e-10, rtol=0)


TANH = {
    (1.0, 1): (0.289694429075, -0.259639231747, -0.194861944165, 0.174645420836),
    (1.0, 2): (0.338637193734, -0.303504285889, -0.284871957302, 0.255317081438),
    (1.0, 5): (0.340718776889, -0.305369909100, -0.323442567949, 0.289886071074),
    (0.5, 1): (0.144847214537, -0.129819615874, -0.097430972082, 0.087322710418),
    (0.5, 2): (0.229506512971, -0.205695687346, -0.168648961408, 0.151151980778),
    (0.5, 5): (0.322215671121, -0.288786462252, -0.277978717195, 0.249139000723),
}


@pytest.mark.parametrize(("damping", "steps"), list(TANH))
def test_phantom_gradients_of_the_tanh_case(damping: float, steps: int) -> None:
    for cls in (UPG, NPG):
        dw, _ = tanh_gradients(cls(steps, damping), H_TANH)
        expected = torch.tensor(TANH[damping, steps], dtype=F64)
        torch.testing.assert_close(dw.flatten(), expected, atol=1e-9, rtol=0)


def test_phantom_gradients_of_the_tanh_case_from_zero() -> None:
    expected = {
        (1.0, 2): (0.209800636718, -0.333720465239, -0.089065620942, 0.141672689476),
        (1.0, 5): (0.340305576652, -0.311748567982, -0.304045489450, 0.286370719398),
        (0.5, 2): (0.067253767626, -0.106977552463, -0.026091225953, 0.041502143176),
    }
    for (damping, steps), values in expected.items():
        dw, _ = tanh_gradients(UPG(steps, damping), torch.zeros(2, dtype=F64))
        close = torch.tensor(values, dtype=F64)
        torch.testing.assert_close(dw.flatten(), close, atol=1e-11, rtol=0)
        dw, _ = tanh_gradients(NPG(steps, damping), torch.zeros(2, dtype=F64))
        assert not dw.any()


def test_jfb_is_one_recorded_step() -> None:
    at = torch.ones(3, dtype=F64)
    state, found = affine_gradients(JFB(), at)
    other, expected = affine_gradients(UPG(1, 1.0), at)
    assert torch.equal(state, other) and torch.equal(vector(found), vector(expected))


class Block(nn.Module):
    """h ↦ tanh(W h + V x), a contraction."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(size, size), nn.Linear(size, size)
        with torch.no_grad():
            self.inner.weight.mul_(0.8)
        self.double()

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(h) + self.outer(x))


def inputs(n: int = 4, size: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, size, generator=torch.Generator().manual_seed(1), dtype=F64)
    return torch.zeros_like(x), x


def spec(name: str) -> dict:
    if name == "implicit":
        return EXACT
    return {"name": name, **({"steps": 12} if name == "unrolled" else {})}


def solve(block: nn.Module, name: str, x: Tensor, **options: object) -> Solution:
    return fixed_point(
        block, torch.zeros_like(x), x, solver=EXACT_SOLVER, gradient=spec(name), **options
    )


def test_gradcheck_of_the_implicit_gradient() -> None:
    weight = 0.4 * torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=F64)

    def layer(weight: Tensor, x: Tensor) -> Tensor:
        f = lambda h, x: torch.tanh(h @ weight.T + x)  # noqa: E731
        return fixed_point(f, torch.zeros_like(x), x, solver=EXACT_SOLVER, gradient=EXACT).state

    _, x = inputs(2, 3)
    arguments = (weight.requires_grad_(), x.requires_grad_())
    # A state solved to 1e-13 moves the quotient by 1e-8 for this step.
    assert torch.autograd.gradcheck(layer, arguments, eps=1e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_backward_gives_the_same_gradient(name: str) -> None:
    block, (_, x) = Block(), inputs()
    loss = solve(block, name, x).state.square().sum()
    parameters = list(block.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    third = torch.autograd.grad(loss, parameters)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c) and a.any()


@pytest.mark.parametrize("name", NAMES)
def test_training_and_evaluation_mode_make_no_difference(name: str) -> None:
    block, (z0, x) = Block(), inputs()
    found = []
    for mode in (True, False):
        layer = Equilibrium(block, EXACT_SOLVER, spec(name)).train(mode)
        loss = layer(z0, x).state.square().sum()
        found.append(torch.autograd.grad(loss, list(block.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_recorded_without_grad_mode(name: str) -> None:
    with torch.no_grad():
        solution = solve(Block(), name, inputs()[1])
    assert not solution.state.requires_grad and solution.converged.all()


@pytest.mark.parametrize("name", ["upg", "jfb", "unrolled"])
def test_double_backward_where_it_is_meaningful(name: str) -> None:
    block = Block(3)
    x = inputs(2, 3)[1].requires_grad_()
    solver = {"name": "fixed_point", "max_steps": 100, "tol": 1e-14}

    def loss(x: Tensor) -> Tensor:
        # At the equilibrium the start of the recorded steps moves with x as well, which these
        # gradients leave out by definition: hold it.
        start = torch.zeros_like(x)
        chosen = solver if name == "unrolled" else Held()
        return fixed_point(block, start, x, solver=chosen, gradient=spec(name)).state

    assert torch.autograd.gradgradcheck(loss, (x,), atol=1e-6)


@pytest.mark.parametrize("name", ["implicit", "npg"])
def test_double_backward_is_refused_where_it_is_not(name: str) -> None:
    block, (_, x) = Block(), inputs()
    loss = solve(block, name, x).state.square().sum()
    with pytest.raises(RuntimeError, match="choose gradient 'upg', 'jfb' or 'unrolled'"):
        torch.autograd.grad(loss, list(block.parameters()), create_graph=True)


@pytest.mark.parametrize("name", ["upg", "unrolled"])
def test_checkpointing_changes_memory_only(name: str) -> None:
    block, (_, x) = Block(), inputs()
    found, calls = [], []
    block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for checkpoint in (False, True):
        calls.clear()
        loss = solve(block, name, x, checkpoint=checkpoint).state.square().sum()
        before = len(calls)
        found.append(torch.autograd.grad(loss, list(block.parameters())))
        assert (len(calls) > before) == checkpoint
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["implicit", "npg", "jfb"])
def test_checkpointing_is_refused_where_it_is_useless(name: str) -> None:
    with pytest.raises(ValueError, match="needs no gradient checkpointing"):
        solve(Block(), name, inputs()[1], checkpoint=True)


def saved_bytes(gradient: object) -> int:
    """Bytes of activations that the recorded graph keeps."""
    block, (_, x) = Block(64), inputs(32, 64)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        state = fixed_point(block, torch.zeros_like(x), x, gradient=gradient).state
    assert state.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_memory_of_npg_does_not_grow_with_its_steps() -> None:
    assert saved_bytes(NPG(steps=1)) == saved_bytes(NPG(steps=9))
    assert saved_bytes(UPG(steps=9, damping=1.0)) > 3 * saved_bytes(NPG(steps=9))
    assert saved_bytes("implicit") == saved_bytes(NPG())


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_halves_give_the_gradient_of_the_batch(name: str) -> None:
    block, (_, x) = Block(), inputs()
    solve(block, name, x).state.square().sum().backward()
    whole = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    for half in x.split(2):
        solve(block, name, half).state.square().sum().backward()
    for p, expected in zip(block.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_hooks_see_one_gradient_per_backward(name: str) -> None:
    """What the reducers of DistributedDataParallel wait for."""
    block, (_, x) = Block(), inputs()
    seen: dict[str, int] = {}
    for key, parameter in block.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, key=key: seen.update({key: seen.get(key, 0) + 1})
        )
    solve(block, name, x).state.square().sum().backward()
    assert seen == {key: 1 for key, _ in block.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_works_under_distributed_data_parallel(name: str) -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, (z0, x) = Block(), inputs()
        layer = nn.parallel.DistributedDataParallel(
            Equilibrium(Block(), EXACT_SOLVER, spec(name)), find_unused_parameters=False
        )
        for _ in range(2):
            layer.zero_grad()
            layer(z0, x).state.square().sum().backward()
        solve(plain, name, x).state.square().sum().backward()
        for a, b in zip(plain.parameters(), layer.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_under_autocast_are_close(name: str) -> None:
    block, (_, x) = Block().float(), inputs()
    x = x.float()
    gradient = {"name": "implicit"} if name == "implicit" else spec(name)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            solution = fixed_point(
                block, torch.zeros_like(x), x, solver={"name": "anderson"}, gradient=gradient
            )
        assert solution.state.dtype == torch.float32
        loss = solution.state.square().sum()
        gradients = torch.autograd.grad(loss, list(block.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert torch.cosine_similarity(*found, dim=0) > 0.99


def test_implicit_reports_its_linear_solve() -> None:
    block, (_, x) = Block(), inputs()
    solution = solve(block, "implicit", x)
    assert solution.backward is not None and solution.backward.residual is None
    solution.state.sum().backward()
    assert solution.backward.residual.shape == (4,)
    assert (solution.backward.residual <= 1e-12).all() and solution.backward.n_evals > 1


def test_gradients_leave_nothing_behind_on_the_state() -> None:
    """Samples that start from a tensor with a gradient get none through the solve."""
    block, (_, x) = Block(), inputs()
    z0 = torch.zeros_like(x, requires_grad=True)
    fixed_point(block, z0, x, solver=EXACT_SOLVER, gradient="npg").state.sum().backward()
    assert z0.grad is None


def test_structured_states_get_gradients() -> None:
    block, (_, x) = Block(), inputs()

    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": block(state["b"], x), "b": 0.5 * state["a"]}

    z0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
    for name in NAMES:
        state = fixed_point(f, z0, solver=EXACT_SOLVER, gradient=spec(name)).state
        (g,) = torch.autograd.grad(state["a"].sum() + state["b"].sum(), [block.inner.weight])
        assert torch.isfinite(g).all() and g.any()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_settings_survive_json(name: str) -> None:
    gradient = make_gradient(name)
    assert make_gradient(gradient.to_dict()) == gradient


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "upg", "steps": 0},
        {"name": "npg", "damping": 0.0},
        {"name": "npg", "damping": 1.5},
        {"name": "unrolled", "steps": -1},
        {"name": "implicit", "solver": {"name": "anderson", "depth": 1}},
    ],
)
def test_values_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be|no option"):
        make_gradient(settings)


def test_the_implicit_gradient_does_not_depend_on_the_scale_of_the_loss() -> None:
    torch.manual_seed(0)
    weight = torch.randn(60, 60)
    weight = (0.9 * weight / torch.linalg.matrix_norm(weight, 2)).requires_grad_()
    x, g = torch.randn(2, 60), torch.randn(2, 60)
    solution = fixed_point(lambda h: torch.tanh(h @ weight) + x, torch.zeros(2, 60))
    found = []
    for scale in (1.0, 1e-14, 1e20):
        loss = (solution.state * g).sum() * scale
        found.append(torch.autograd.grad(loss, weight, retain_graph=True)[0] / scale)
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_differentiated_for_a_frozen_map(name: str) -> None:
    linear = nn.Linear(4, 4).requires_grad_(False)
    solution = fixed_point(lambda h: torch.tanh(linear(h)), torch.zeros(2, 4), gradient=spec(name))
    assert not solution.state.requires_grad


def test_unrolled_reports_what_it_returns() -> None:
    calls, seen = [], {}
    solution = fixed_point(
        lambda h: calls.append(1) or h / 2 + 1,
        torch.zeros(1, 1, requires_grad=True),
        solver={"name": "fixed_point", "max_steps": 3, "tol": 0.15, "stop_mode": "abs"},
        gradient={"name": "unrolled"},
        trace=True,
        callback=lambda k, z, residual: seen.__setitem__(k, (float(z), float(residual))),
        sample_steps=(1, 2),
    )
    assert float(solution.state) == 1.75 and float(solution.abs_residual) == 0.125
    assert bool(solution.converged) and solution.n_evals == len(calls) == 6
    assert solution.trace.tolist() == [[0.5, 0.25, 0.125]]
    assert seen == {1: (1.0, 0.5), 2: (1.5, 0.25), 3: (1.75, 0.125)}
    assert [float(s) for s in solution.samples] == [1.0, 1.5]
    assert all(s.requires_grad for s in solution.samples)
