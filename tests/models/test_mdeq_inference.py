"""The fast path of forwards without gradients: same answers, never a wait, off on request."""

from __future__ import annotations

import fcntl
import time

import pytest
import torch

from deqzoo.equilibrium import FixedPointIteration, fixed_point
from deqzoo.evaluation.options import recorded_traces
from deqzoo.evaluation.watch import watch
from deqzoo.models import coarse
from deqzoo.models.mdeq import map_mdeq, modeling_mdeq, native_norm

from .mdeq_helpers import pictures, tiny_model


@pytest.fixture
def bf16_units(monkeypatch):
    monkeypatch.setattr(modeling_mdeq, "has_fast_bfloat16", lambda: True)


@pytest.fixture
def no_build(tmp_path, monkeypatch):
    """A machine where nothing has been compiled, and nothing may be; the folder of builds."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(native_norm, "_extension_module", None)
    monkeypatch.setattr(native_norm, "_last_look", -native_norm.math.inf)

    def fail(wait: bool) -> None:
        raise AssertionError("compiled without being asked")

    monkeypatch.setattr(native_norm, "_build", fail)
    return native_norm._library().parent


@pytest.fixture
def steps_seen(monkeypatch):
    """Precision and layout of every step of a map."""
    seen = []
    original = map_mdeq.mdeq_step

    def step(state, injections, masks, tensors, groups, norm, dtype):
        weight = tensors.branches[0][0].first.weight
        last = state[0].stride(1) == weight.stride(1) == 1  # a state is a part of longer rows
        seen.append((dtype, last, norm))
        return original(state, injections, masks, tensors, groups, norm, dtype)

    monkeypatch.setattr(map_mdeq, "mdeq_step", step)
    return seen


def relative_residual(model, batch, state):
    """Of a state under the plain float32 map, (B,)."""
    model.use_inference_kernels(False)
    f, _ = model.equilibrium_map(batch)
    change = sum((a - b).flatten(1).square().sum(1) for a, b in zip(f(state), state, strict=True))
    size = sum(a.flatten(1).square().sum(1) for a in f(state))
    model.use_inference_kernels()
    return (change / size).sqrt()


@torch.no_grad()
def test_answers_are_those_of_the_plain_path(bf16_units, steps_seen):
    model, batch = tiny_model(contraction=0.1), pictures(4)
    model.use_inference_kernels(False)
    plain = model(batch)
    assert not any(last for _, last, _ in steps_seen) and model.inference_path() == "plain"
    steps_seen.clear()
    model.use_inference_kernels()
    fast = model(batch)
    assert native_norm.native_norm_ready()  # which conftest.py has compiled
    assert all(last and norm is native_norm.native_group_norm for _, last, norm in steps_seen)
    assert {dtype for dtype, _, _ in steps_seen} == {torch.bfloat16, None}
    assert model.inference_path() == "channels last, compiled norm, bfloat16 to 0.02"
    torch.testing.assert_close(fast.logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert fast.converged.all()


@torch.no_grad()
def test_a_solve_that_begins_in_bfloat16_meets_the_tolerance_in_float32(bf16_units, steps_seen):
    model, batch = tiny_model(), pictures(3)
    output = model.mdeq(batch)
    evaluations = len(steps_seen)
    assert steps_seen[0][0] == torch.bfloat16 and steps_seen[-1][0] is None
    assert output.converged.all() and (output.residual <= 1e-5).all()
    found = relative_residual(model, batch, output.features)
    torch.testing.assert_close(found, output.residual, rtol=0.2, atol=1e-6)
    assert evaluations == output.n_steps.max() + 1


@torch.no_grad()
def test_a_picture_alone_and_in_a_batch(bf16_units):
    model = tiny_model(contraction=0.2)
    batch = torch.cat([pictures(3), 0.01 * pictures(2, seed=5), 30 * pictures(2, seed=6)])
    together = model(batch)
    for i in range(len(batch)):
        alone = model(batch[i : i + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-4, atol=1e-4)
        assert abs(alone.n_steps[0] - together.n_steps[i]) <= 1


@torch.no_grad()
def test_no_more_steps_than_asked_for(bf16_units):
    model = tiny_model(contraction=30.0, solver={"max_steps": 12, "tol": 1e-6})
    output = model(pictures())
    assert not output.converged.any() and (output.n_steps == 12).all()


@torch.no_grad()
def test_a_long_budget_is_kept_for_float32():
    """The few steps in bfloat16 that are enough leave most of the others to what is hard."""

    def f(z):
        return 0.8 * z + 1

    start, solver = torch.zeros(2, 4, dtype=torch.float64), FixedPointIteration(57, 3e-6)
    plain = fixed_point(f, start, solver=solver)
    found = coarse.solve_from_coarse(f, f, start, solver)
    assert plain.converged.all() and (plain.n_steps > 45).all()
    assert found.converged.all() and (found.n_steps <= plain.n_steps + 1).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    ({}, {"tol": 1e-4}, {"max_steps": 30}, "broyden"),
    ids=("none", "tol", "steps", "name"),
)
def test_settings_of_a_call_are_followed_in_float32(change, bf16_units, steps_seen):
    model = tiny_model()
    model(pictures(), solver=change)
    assert {dtype for dtype, _, _ in steps_seen} == {None} and all(s[1] for s in steps_seen)


@pytest.mark.parametrize(
    "settings", ({"max_steps": 4}, {"tol": 0.0}, {"tol": 0.05}, {"stop_mode": "abs"})
)
def test_solves_that_do_not_begin_in_bfloat16(settings, bf16_units):
    model = tiny_model()
    assert model.starts_coarsely()
    model.set_solver(**settings)
    assert not model.starts_coarsely()


def test_processors_without_bfloat16(monkeypatch):
    coarse.has_fast_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert not coarse.has_fast_bfloat16() and not tiny_model().starts_coarsely()
    coarse.has_fast_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not coarse.has_fast_bfloat16()
    for name, fast in (("Intel Xeon", False), ("AMD EPYC", True)):  # without AMX, it depends
        known = {"avx512_bf16": True, "cpu_name": name}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        coarse.has_fast_bfloat16.cache_clear()
        assert coarse.has_fast_bfloat16() == (fast and torch.backends.mkldnn.is_available())
    coarse.has_fast_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert coarse.has_fast_bfloat16() == torch.backends.mkldnn.is_available()
    coarse.has_fast_bfloat16.cache_clear()


def test_where_the_path_is_not_taken(monkeypatch, steps_seen):
    model = tiny_model()
    model(pictures())  # with gradients
    with torch.no_grad():
        model.train()(pictures())
        model.eval().double()(pictures().double())
        model.float()
        monkeypatch.setenv("DEQZOO_PLAIN_INFERENCE", "1")
        model(pictures())
        assert model.inference_path() == "plain"
        assert not any(last for _, last, _ in steps_seen)
        monkeypatch.setenv("DEQZOO_PLAIN_INFERENCE", "0")
        model(pictures())
        assert steps_seen[-1][1]


@torch.no_grad()
def test_hooks_act(bf16_units):
    model, found = tiny_model(), []
    before = model.mdeq(pictures()).pooler_output
    for part in model.mdeq.transformation.post:
        part.conv.register_forward_hook(lambda module, inputs, output: -output)
    for enabled in (True, False):
        model.use_inference_kernels(enabled)
        found.append(model.mdeq(pictures()).pooler_output)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert (found[0] - before).abs().max() > 1e-2


@torch.no_grad()
def test_watching_takes_the_same_path(steps_seen):
    model = tiny_model()
    settings = {"tol": 1e-4}
    watched = watch(model, pictures(), settings)
    assert all(last for _, last, _ in steps_seen)
    assert watched.n_steps.tolist() == model(pictures(), solver=settings).n_steps.tolist()


@torch.no_grad()
def test_a_trace_is_of_steps_in_float32(bf16_units, steps_seen):
    model = tiny_model()
    with recorded_traces(model) as traces:
        output = model(pictures())
    assert {dtype for dtype, _, _ in steps_seen} == {None}
    assert traces[0].shape[1] == output.n_steps.max()


# Nothing is compiled in a forward, and nobody waited for


@torch.no_grad()
def test_a_forward_compiles_nothing(no_build, steps_seen):
    model = tiny_model()
    assert model(pictures()).converged.all()
    assert not native_norm.native_norm_ready() and "compiled" not in model.inference_path()
    assert {norm for _, _, norm in steps_seen} == {native_norm.group_norm}


def test_a_build_that_another_process_works_on_is_not_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(native_norm, "_extension_module", None)
    monkeypatch.setattr(native_norm, "_last_look", -native_norm.math.inf)
    folder = native_norm._library().parent
    folder.mkdir()
    with (folder / "deqzoo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        assert not native_norm.native_norm_available(wait=False)
        with torch.no_grad():
            assert tiny_model()(pictures()).converged.all()
        assert time.monotonic() - started < 20
    assert "PyTorch's own is used" in caplog.text


def test_a_machine_without_a_compiler(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    def load(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(native_norm, "_extension_module", None)
    monkeypatch.setattr(native_norm, "_last_look", -native_norm.math.inf)
    monkeypatch.setattr(cpp_extension, "load", load)
    assert not native_norm.native_norm_available(wait=False)
    assert not native_norm.native_norm_ready() and not tiny_model().use_native_norm()


def test_a_finished_build_is_loaded_without_a_compiler(monkeypatch):
    assert native_norm.native_norm_available()

    def fail(wait: bool) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(native_norm, "_build", fail)
    monkeypatch.setattr(native_norm, "_extension_module", None)
    monkeypatch.setattr(native_norm, "_last_look", -native_norm.math.inf)
    assert native_norm.native_norm_ready() and native_norm._extension_module is not None


@pytest.mark.parametrize("finished", (True, False))
def test_a_damaged_or_unfinished_library_is_left_alone(finished, no_build):
    no_build.mkdir()
    native_norm._library().write_bytes(b"part of a library")
    if finished:
        (no_build / native_norm._FINISHED).touch()
    assert not native_norm.native_norm_ready()
