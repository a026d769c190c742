"""How states become matrices, and what one independent sample is."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import Tensor

from deqzoo.equilibrium import BatchMap, Causal, Rows, Segments, Selection, fixed_point, make_solver
from deqzoo.equilibrium.layout import Layout, SuffixSelection
from deqzoo.equilibrium.state import StatePacker, leaves, rebuild

Pair = namedtuple("Pair", "fine coarse")
SOLVERS = ["fixed_point", "anderson", "broyden"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STATES = {
    "tensor": lambda: randn(3, 4),
    "picture": lambda: randn(3, 2, 5, 4),
    "channels last": lambda: randn(3, 2, 5, 4).contiguous(memory_format=torch.channels_last),
    "vector": lambda: randn(3),
    "tuple": lambda: (randn(3, 2, 4, 4), randn(3, 4, 2, 2, seed=1)),
    "list": lambda: [randn(3, 2), randn(3, seed=1)],
    "named tuple": lambda: Pair(randn(3, 2, 4, 4), randn(3, 4, 2, 2, seed=1)),
    "nested": lambda: {
        "b": (randn(3, 2), [randn(3, 1, 2, seed=1)]),
        "a": randn(3, 2, 3, 3, seed=2).contiguous(memory_format=torch.channels_last),
    },
    "empty batch": lambda: (randn(0, 2), randn(0, 3)),
}


@pytest.mark.parametrize("kind", list(STATES))
def test_packing_is_lossless(kind: str) -> None:
    state = STATES[kind]()
    packer = StatePacker(state)
    matrix = packer.pack(state)
    assert matrix.shape == (
        leaves(state)[0].shape[0],
        sum(t.shape[1:].numel() for t in leaves(state)),
    )
    again = packer.unpack(matrix)
    assert type(again) is type(state)
    for a, b in zip(leaves(again), leaves(state), strict=True):
        assert torch.equal(a, b) and a.shape == b.shape
        if "last" in kind:
            assert a.stride() == b.stride()
    assert torch.equal(packer.pack(again), matrix)
    if isinstance(state, dict):
        assert list(again) == list(state)


def test_a_channels_last_state_is_packed_without_a_copy() -> None:
    state = STATES["channels last"]()
    packer = StatePacker(state)
    matrix = packer.pack(state)
    assert matrix.data_ptr() == state.data_ptr()
    assert packer.unpack(matrix).data_ptr() == state.data_ptr()
    # A map may answer in another memory format.
    assert torch.equal(packer.pack(state.contiguous()), matrix)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(3, 3)), "same leading batch dimension"),
        (torch.tensor(1.0), "same leading batch dimension"),
        ((torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)), "share dtype"),
        (torch.zeros(2, 3, dtype=torch.int64), "floating point"),
        ([], "no tensor"),
    ],
)
def test_states_that_do_not_fit_are_refused(state: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StatePacker(state)


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="not str"):
        fixed_point(lambda z: z, "state")


def test_a_map_that_changes_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="must return a state like its input"):
        fixed_point(lambda z: z[:, :2], torch.zeros(2, 3))


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize(
    ("f", "start", "layout"),
    [
        (lambda z: torch.tanh(z.mean(0, keepdim=True)), torch.zeros(5, 6), None),
        (lambda z: z.mean(), torch.zeros(5), None),
        (lambda z: (z[0], z[1][:1]), (torch.zeros(5, 6), torch.zeros(5, 2)), None),
        (lambda z: torch.cat((z, z)), torch.zeros(5, 6), None),
        (lambda z: z[:, :1], torch.zeros(4, 6), Segments(torch.tensor([0, 0, 1, 1]), 2)),
        (lambda z: z[:1], torch.zeros(4, 6), Segments(torch.tensor([0, 0, 1, 1]), 2)),
        (lambda z: 0.5 * z[:1], torch.zeros(5, 3, 6), Causal()),
        (lambda z: 0.5 * z.transpose(0, 1), torch.zeros(5, 3, 6), Causal()),
    ],
)
def test_a_map_that_changes_the_batch_is_refused(
    f: object, start: object, layout: object, gradient: str
) -> None:
    with pytest.raises(ValueError, match="must return a state like its input|segmented state"):
        fixed_point(
            f, start, solver={"name": "anderson", "max_steps": 3}, layout=layout, gradient=gradient
        )


def test_a_map_that_keeps_the_batch_when_others_leave_is_refused() -> None:
    class Stubborn(BatchMap):
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __call__(self, z: Tensor) -> Tensor:
            return 0.5 * torch.tanh(z[:1]) * self.x + self.x

        def select(self, selection: Selection) -> Stubborn:
            return self

    x = torch.zeros(8, 3)
    x[0] = 1
    with pytest.raises(ValueError, match=r"\[\(1, 3\)\], got \[\(8, 3\)\]"):
        make_solver({"name": "anderson", "tol": 1e-6}).solve(Stubborn(x), x, compact=True)


@pytest.mark.parametrize("gradient", ["implicit", "upg", "unrolled"])
@pytest.mark.parametrize("layout", [Rows(), Causal()])
def test_a_layout_serves_one_batch_after_another(layout: Layout, gradient: str) -> None:
    """Also before the backward pass of the first, which may evaluate the map again."""

    def gradients(shared: Layout | None) -> list[Tensor]:
        losses, weights = [], []
        for shape in ((2, 3, 4), (5, 2, 4), (5, 6, 4)):
            weight = (0.1 * randn(4, 4)).requires_grad_()
            f = lambda z, w=weight: torch.tanh(z.cumsum(1) @ w + 1)  # noqa: E731
            solution = fixed_point(
                f,
                torch.zeros(shape),
                layout=shared or type(layout)(),
                gradient=gradient,
                checkpoint=gradient != "implicit",
            )
            losses.append(solution.state.square().sum())
            weights.append(weight)
        return list(torch.autograd.grad(losses, weights))

    for shared, own in zip(gradients(layout), gradients(None), strict=True):
        assert torch.equal(shared, own)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_empty_batch_is_solved(solver: str) -> None:
    solution = fixed_point(lambda z: 0.5 * z, torch.zeros(0, 3), solver=solver)
    assert solution.state.shape == (0, 3) and solution.n_steps.shape == (0,)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["tuple", "list", "named tuple", "nested", "channels last"])
def test_structures_are_solved_in_place_of_a_flat_vector(kind: str, solver: str) -> None:
    start = STATES[kind]()
    settings = {"name": solver, "max_steps": 40, "tol": 1e-5}
    packer = StatePacker(start)
    shift = packer.pack(start)
    weight = 0.4 * randn(shift.shape[1], shift.shape[1], seed=5) / shift.shape[1] ** 0.5

    def flat(h: Tensor) -> Tensor:
        return torch.tanh(h @ weight) + shift

    zero = rebuild(start, [torch.zeros_like(t) for t in leaves(start)])
    with torch.no_grad():
        found = fixed_point(lambda z: packer.unpack(flat(packer.pack(z))), zero, solver=settings)
        expected = fixed_point(flat, torch.zeros_like(shift), solver=settings)
    assert type(found.state) is type(start)
    torch.testing.assert_close(packer.pack(found.state), expected.state)
    assert torch.equal(found.n_steps, expected.n_steps)


class CausalMap(BatchMap):
    """z_t ↦ tanh(mean of z_s W over s ≤ t, and x_t), which may drop a converged prefix."""

    def __init__(self, weight: Tensor, x: Tensor, frozen: Tensor | None = None) -> None:
        self.weight, self.x = weight, x
        self.frozen = x[:, :0] if frozen is None else frozen
        self.lengths: list[int] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.lengths.append(z.shape[1])
        whole = torch.cat((self.frozen, z), dim=1)
        count = torch.arange(1, whole.shape[1] + 1, dtype=z.dtype).view(1, -1, 1)
        context = (whole.cumsum(1) / count)[:, self.frozen.shape[1] :]
        return torch.tanh((0.5 * z + context) @ self.weight + self.x)

    def select(self, selection: Selection) -> CausalMap:
        assert isinstance(selection, SuffixSelection)
        kept = slice(None) if selection.sequences is None else selection.sequences
        frozen = torch.cat((self.frozen[kept], selection.dropped), dim=1)
        less = CausalMap(self.weight, selection.state(self.x), frozen)
        less.lengths = self.lengths
        return less


def causal_map(length: int = 24, easy: int = 0) -> CausalMap:
    weight = randn(8, 8, seed=3).double()
    x = randn(2, length, 8, seed=4).double()
    x[:, :easy] *= 8  # saturated positions settle within a few steps
    return CausalMap(0.9 * weight / torch.linalg.matrix_norm(weight, 2), x)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-8])
def test_causal_solves_never_look_ahead(solver: str, tol: float) -> None:
    f = causal_map()
    settings = make_solver({"name": solver, "max_steps": 40, "tol": tol})
    zero = torch.zeros_like(f.x)
    whole = settings.solve(f, zero, Causal())
    changed = CausalMap(f.weight, f.x.clone())
    changed.x[:, 15:] += 5.0
    other = settings.solve(changed, zero, Causal())
    short = settings.solve(CausalMap(f.weight, f.x[:, :15]), zero[:, :15], Causal())
    assert whole.n_steps.shape == (2, 24)
    for solution in (other, short):
        torch.testing.assert_close(
            solution.state[:, :15], whole.state[:, :15], rtol=1e-9, atol=1e-12
        )
        assert torch.equal(solution.n_steps[:, :15], whole.n_steps[:, :15])
        assert torch.equal(solution.status[:, :15], whole.status[:, :15])
    assert not torch.allclose(other.state[:, 15:], whole.state[:, 15:], atol=1e-2)


def test_prefix_rule_of_stopping() -> None:
    f = causal_map()
    solution = make_solver("anderson").solve(f, torch.zeros_like(f.x), Causal())
    assert solution.converged.all()
    assert (solution.n_steps.diff(dim=1) >= 0).all() and solution.n_steps.unique().numel() > 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_prefixes_leave_without_changing_the_rest(solver: str) -> None:
    settings = make_solver({"name": solver, "max_steps": 80, "tol": 1e-7})
    full_map, less_map = causal_map(24, easy=12), causal_map(24, easy=12)
    zero = torch.zeros_like(full_map.x)
    full = settings.solve(full_map, zero, Causal())
    less = settings.solve(less_map, zero, Causal(), compact=True)
    assert full.converged.all() and set(full_map.lengths) == {24}
    assert min(less_map.lengths) < 24 and less.row_evals < full.row_evals
    torch.testing.assert_close(less.state, full.state, rtol=1e-7, atol=1e-9)
    assert torch.equal(less.n_steps, full.n_steps)


@pytest.mark.parametrize("solver", SOLVERS)
def test_parts_are_solved_one_after_another(solver: str) -> None:
    settings = make_solver({"name": solver, "max_steps": 80, "tol": 1e-7})
    whole_map, parts_map = causal_map(), causal_map()
    zero = torch.zeros_like(whole_map.x)
    whole = settings.solve(whole_map, zero, Causal())
    parts = settings.solve(parts_map, zero, Causal(cuts=(1, 8)), compact=True)
    assert {1, 7, 16} <= set(parts_map.lengths) and max(parts_map.lengths) == 16
    assert parts.converged.all() and parts.row_evals < whole.row_evals
    torch.testing.assert_close(parts.state, whole.state, rtol=1e-5, atol=1e-6)
    residual = torch.linalg.vector_norm(whole_map(parts.state) - parts.state, dim=-1)
    torch.testing.assert_close(parts.abs_residual, residual, rtol=1e-6, atol=1e-12)
    assert (parts.residual.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_solved_sequences_leave(solver: str) -> None:
    f = causal_map(24)
    f.x[0] *= 30  # saturated: settles at once
    settings = make_solver({"name": solver, "max_steps": 80, "tol": 1e-7})
    kept: list[int] = []

    class Watched(CausalMap):
        def __call__(self, z: Tensor) -> Tensor:
            kept.append(z.shape[0])
            return super().__call__(z)

        def select(self, selection: Selection) -> CausalMap:
            less = super().select(selection)
            return Watched(less.weight, less.x, less.frozen)

    less = settings.solve(Watched(f.weight, f.x), torch.zeros_like(f.x), Causal(), compact=True)
    full = settings.solve(f, torch.zeros_like(f.x), Causal())
    assert kept[0] == 2 and kept[-1] == 1
    torch.testing.assert_close(less.state, full.state, rtol=1e-7, atol=1e-9)
    assert torch.equal(less.n_steps, full.n_steps) and torch.equal(less.status, full.status)


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("escape", [2, 3])
@pytest.mark.parametrize("floor", [0.003, 0.01, 0.02, 0.05])
def test_a_residual_minimum_that_is_no_fixed_point_is_left(
    floor: float, escape: int, sequences: int
) -> None:
    """The residual of the first number is least near 0, where it is `floor`; it vanishes at 4."""

    def f(z: Tensor) -> Tensor:
        x, y = z[..., :1], z[..., 1:]
        step = (floor + 0.5 * x.square() / (1 + x.square())) * torch.tanh(4 - x)
        return torch.cat((x + step, 0.5 * y.sin() + 0.1 * x.cos()), dim=-1)

    start = torch.full((sequences, 1, 2), -2.0, dtype=torch.float64)
    settings = {"name": "anderson", "max_steps": 30, "tol": 1e-8, "escape": escape}
    held = make_solver({**settings, "max_steps": 100, "escape": None}).solve(f, start, Causal())
    left = make_solver(settings).solve(f, start, Causal())
    assert not held.converged.any() and left.converged.all()
    torch.testing.assert_close(left.state[..., 0], torch.full_like(start[..., 0], 4.0))
    assert left.n_steps.max() <= 30


def test_who_waits_for_no_other_position() -> None:
    layout = Causal()
    layout.to_matrix(torch.zeros(2, 4, 3))
    square = torch.tensor([[0.0, 0.0, 1.0, 5.0], [0.01, 2.0, 0.0, 150.0]]).flatten()
    # Not behind positions that have stopped, nor with more than ten times the residual of those
    # before.
    expected = [[True, True, False, True], [False, False, True, True]]
    assert layout.waiting(square).reshape(2, 4).tolist() == expected


def test_a_stuck_position_need_not_wait_for_small_residuals_before_it() -> None:
    """Position 1 is held at a minimum of its residual, while position 0, which it does not read,
    is on its way to the tolerance far below."""
    slow = torch.linspace(0, 0.95, 32, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        x, y = z[:, 1:, :1], z[:, 1:, 1:]
        step = (0.01 + 0.5 * x.square() / (1 + x.square())) * torch.tanh(4 - x)
        held = torch.cat((x + step, 0.5 * y.sin() + 0.1 * x.cos()), dim=-1)
        return torch.cat((slow * z[:, :1] + 1e-4, held), dim=1)

    start = torch.zeros(1, 2, 32, dtype=torch.float64)
    start[0, 1, 0] = -2.0
    settings = {"name": "anderson", "max_steps": 60, "tol": 1e-8, "stop_mode": "abs"}
    both = make_solver(settings).solve(f, start, Causal())
    assert both.converged.all() and both.n_steps[0, 0] > 30
    torch.testing.assert_close(both.state[0, 1, 0], start.new_tensor(4.0))
    assert both.n_steps[0, 1] < both.n_steps[0, 0] + 5  # it was left on the way


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
def test_criterion_of_stopping(stop_mode: str) -> None:
    f = causal_map()
    zero = torch.zeros_like(f.x)
    solutions = {}
    for criterion in ("per token", "per sequence"):
        settings = {"name": "anderson", "criterion": criterion, "stop_mode": stop_mode, "tol": 1e-2}
        solutions[criterion] = make_solver(settings).solve(f, zero, Causal(), compact=True)
    one = solutions["per sequence"]
    residual, size = f(one.state) - one.state, f(one.state)
    norm = torch.linalg.vector_norm(residual, dim=(1, 2))
    if stop_mode == "rel":
        norm = norm / torch.linalg.vector_norm(size, dim=(1, 2))
    torch.testing.assert_close(one.residual, norm.unsqueeze(1).expand(2, 24), rtol=1e-6, atol=0)
    assert (norm <= 1e-2).all() and one.converged.all()
    if stop_mode == "rel":
        assert one.n_evals < solutions["per token"].n_evals
    with pytest.raises(ValueError, match="'per token' or 'per sequence'"):
        make_solver({"name": "anderson", "criterion": "token"})


def test_settings_of_a_causal_layout_are_checked() -> None:
    for cuts in ((3, 2), (0, 4), (2, 2)):
        with pytest.raises(ValueError, match="cuts must be ascending"):
            Causal(cuts=cuts)


@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_counts_as_converged_and_weighs_nothing(solver: str) -> None:
    f = causal_map()
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, 16:] = False
    settings = make_solver({"name": solver, "max_steps": 60, "tol": 1e-6})
    padded = settings.solve(f, torch.zeros_like(f.x), Causal(valid))
    alone = settings.solve(CausalMap(f.weight, f.x[1:, :16]), f.x.new_zeros(1, 16, 8), Causal())
    torch.testing.assert_close(padded.state[1:, :16], alone.state, rtol=1e-9, atol=1e-12)
    assert torch.equal(padded.n_steps[1:, :16], alone.n_steps)
    assert padded.converged[valid].all()


def test_gradients_of_a_causal_solve_flow_backwards_in_time() -> None:
    f = causal_map()
    found = {}
    for name in ("implicit", "unrolled"):
        x = f.x.clone().requires_grad_()
        gradient: dict = {"name": name}
        if name == "implicit":
            gradient["solver"] = {"name": "anderson", "max_steps": 80, "tol": 1e-11}
        solution = fixed_point(
            CausalMap(f.weight, x),
            torch.zeros_like(x),
            solver={"name": "anderson", "max_steps": 150, "tol": 1e-11},
            gradient=gradient,
            layout=Causal(),
        )
        (found[name],) = torch.autograd.grad(solution.state[:, -1].sum(), x)
    assert found["implicit"][:, 0].any()
    torch.testing.assert_close(found["implicit"], found["unrolled"], rtol=1e-6, atol=1e-8)


def test_segments_refuse_states_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, d\)"):
        make_solver("anderson").solve(
            lambda z: z, torch.zeros(4, 2), Segments(torch.tensor([0, 0, 1]), 2)
        )
    with pytest.raises(ValueError, match=r"index must have shape \(N,\)"):
        Segments(torch.zeros(2, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"shape \(B, T, d\)"):
        make_solver("anderson").solve(lambda z: z, torch.zeros(4, 2), Causal())


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_early_end_returns_one_iterate_and_its_residual(solver: str) -> None:
    """Positions read each other: a mixture of everyone's best iterates has another residual."""
    torch.manual_seed(0)
    f = causal_map()
    f = CausalMap(5 * f.weight, f.x)  # no contraction: residuals rise and fall
    settings = make_solver({"name": solver, "max_steps": 7, "tol": 1e-6, "stop_mode": "abs"})
    solution = settings.solve(f, torch.zeros_like(f.x), Causal())
    assert not solution.converged.all()
    residual = torch.linalg.vector_norm(f(solution.state) - solution.state, dim=-1)
    torch.testing.assert_close(solution.abs_residual, residual, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solution.residual, residual.cummax(1).values, rtol=1e-9, atol=1e-12)


def test_a_position_stalls_after_those_that_it_reads() -> None:
    def f(z: Tensor) -> Tensor:  # 1 follows 0, which converges slowly; alone it would cycle
        return torch.stack([0.9 * z[:, 0] + 1, 5 * z[:, 0] - z[:, 1]], dim=1)

    settings = make_solver({"name": "fixed_point", "max_steps": 200, "tol": 1e-6, "patience": 3})
    solution = settings.solve(f, torch.zeros(1, 2, 1, dtype=torch.float64), Causal())
    slow, cycling = solution.n_steps[0].tolist()
    assert solution.converged[0].tolist() == [True, False] and cycling > slow > 50
    residual = (f(solution.state) - solution.state).abs()
    torch.testing.assert_close(solution.abs_residual[..., None], residual)


def test_a_map_with_inputs_is_asked_to_select() -> None:
    class Scaled(BatchMap):
        def __init__(self, scale: Tensor) -> None:
            self.scale = scale

        def __call__(self, z: Tensor, x: Tensor, nothing: None) -> Tensor:
            return 0.5 * torch.tanh(z) * self.scale + x

        def select(self, selection: Selection) -> Scaled:
            return Scaled(selection.state(self.scale))

    scale = torch.zeros(8, 1)
    scale[0] = 1
    x = torch.ones(8, 3)
    with torch.no_grad():
        solution = fixed_point(
            Scaled(scale), torch.zeros(8, 3), x, None, solver={"name": "anderson", "tol": 1e-6}
        )
    assert solution.row_evals < 8 * solution.n_evals
    torch.testing.assert_close(solution.state[1:], x[1:])
    assert solution.converged.all() and float(solution.state[0, 0]) > 1.3


def test_dicts_are_matched_by_key() -> None:
    def f(z: dict) -> dict:
        return {"b": 0.5 * z["b"] + 2, "a": 0.5 * z["a"] + 1}

    zero = {"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)}
    solution = fixed_point(f, zero, solver={"name": "anderson", "tol": 1e-6}, gradient="jfb")
    assert {k: round(float(v), 4) for k, v in solution.state.items()} == {"a": 2, "b": 4}
    with pytest.raises(ValueError, match=r"keys \['a', 'b'\], got \['a'\]"):
        fixed_point(lambda z: {"a": z["a"]}, zero)
