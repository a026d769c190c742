"""How an MDEQ computes: samples apart, precision, memory format, recomputation, compilation."""

from __future__ import annotations

import copy
import fcntl
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from deqzoo.models.mdeq import map_mdeq, native_norm
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification

from .mdeq_helpers import flat_gradient, pictures, tiny_model

# Samples do not touch each other


@pytest.mark.parametrize("solver", ("anderson", "broyden", "fixed_point"))
def test_a_picture_alone_and_in_a_batch(solver):
    model = tiny_model(contraction=0.1).double()
    batch = torch.cat([pictures(4), 0.01 * pictures(2, seed=5), 30 * pictures(2, seed=6)]).double()
    settings = {"name": solver, "max_steps": 60, "tol": 1e-6}
    with torch.no_grad():
        together = model(batch, solver=settings)
        for i in range(len(batch)):
            alone = model(batch[i : i + 1], solver=settings)
            torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-9, atol=1e-9)
            assert alone.n_steps[0] == together.n_steps[i]


@pytest.mark.parametrize("poison", (math.nan, math.inf))
def test_a_broken_picture_changes_no_other_row(poison):
    model = tiny_model()
    clean = pictures(4)
    broken = clean.clone()
    broken[1, 0, 2, 3] = poison
    with torch.no_grad():
        expected, found = model(clean), model(broken)
    others = [0, 2, 3]
    torch.testing.assert_close(found.logits[others], expected.logits[others], rtol=1e-6, atol=1e-6)
    assert found.converged.tolist() == [True, False, True, True]
    assert not found.residual[1].isfinite()


def test_converged_pictures_leave_the_batch():
    model = tiny_model(contraction=0.1)
    batch = torch.cat([pictures(2), 50 * pictures(6)])
    f, z0 = model.equilibrium_map(batch)
    with torch.no_grad():
        solution = model.solve(f, z0)
    assert solution.row_evals < solution.n_evals * len(batch)


# Precision, memory format, checkpointing, compilation


def test_bfloat16(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    low = MDEQForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    output = low(pictures(), labels=torch.tensor([0, 1, 2]), solver={"tol": 5e-2})
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and flat_gradient(low).isfinite().all()
    with torch.no_grad():
        assert (output.logits.float() - model(pictures()).logits).abs().max() < 0.05


def test_autocast():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        f, z0 = model.equilibrium_map(pictures())
        output = model(pictures(), labels=torch.tensor([0, 1, 2]), solver={"tol": 5e-2})
    assert f.tensors.branches[0][0].first.weight.dtype == torch.bfloat16
    assert all(z.dtype == torch.float32 for z in z0)
    output.loss.backward()
    assert flat_gradient(model).isfinite().all() and output.converged.all()
    with torch.no_grad():
        assert (output.logits.float() - model(pictures()).logits).abs().max() < 0.05


def test_channels_last():
    model = tiny_model()
    labels = torch.tensor([0, 1, 2])
    model(pictures(), labels=labels).loss.backward()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other.zero_grad()
    f, z0 = other.equilibrium_map(pictures())
    assert all(z.is_contiguous(memory_format=torch.channels_last) for z in (*z0, *f(z0)))
    other(pictures(), labels=labels).loss.backward()
    torch.testing.assert_close(flat_gradient(other), flat_gradient(model), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options", ({"gradient": "upg"}, {"gradient": "unrolled"}, {"shallow": True})
)
def test_gradient_checkpointing(options, monkeypatch):
    model = tiny_model(dropout=0.0).train()
    labels = torch.tensor([0, 1, 2])
    state = copy.deepcopy(model.state_dict())

    def backward() -> tuple[torch.Tensor, int]:
        calls = []
        original = map_mdeq.mdeq_step
        monkeypatch.setattr(map_mdeq, "mdeq_step", lambda *a: calls.append(1) or original(*a))
        model.load_state_dict(state)
        model.zero_grad()
        model(pictures(), labels=labels, **options).loss.backward()
        monkeypatch.setattr(map_mdeq, "mdeq_step", original)
        return flat_gradient(model), len(calls)

    plain, plain_calls = backward()
    model.gradient_checkpointing_enable()
    recomputed, calls = backward()
    assert calls > plain_calls
    torch.testing.assert_close(recomputed, plain)
    model.gradient_checkpointing_disable()
    assert backward()[1] == plain_calls


@pytest.mark.parametrize("gradient", ("implicit", "npg", "jfb"))
def test_gradient_checkpointing_is_refused_where_it_saves_nothing(gradient):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="needs no gradient checkpointing"):
        model(pictures(), gradient=gradient)


@pytest.fixture
def fast_compiler(monkeypatch):
    """The same graphs as `compile_map`, without the minutes of code generation."""
    torch._dynamo.reset()
    step = torch.compile(map_mdeq.mdeq_step, dynamic=False, fullgraph=True, backend="aot_eager")
    calls = []
    monkeypatch.setattr(map_mdeq, "compiled_step", lambda: calls.append(1) or step)
    # Not by monkeypatch, which takes the setting away for good where a torch keeps it elsewhere.
    with torch._functorch.config.patch(donated_buffer=False):
        yield calls
    torch._dynamo.reset()


def test_compiled_map(fast_compiler):
    model, labels = tiny_model(), torch.tensor([0, 1, 2])
    for gradient in ("upg", "npg", "implicit"):
        found = []
        for enabled in (False, True):
            model.compile_map(enabled)
            fast_compiler.clear()
            model.zero_grad()
            output = model(pictures(), labels=labels, gradient=gradient)
            output.loss.backward()
            found.append(flat_gradient(model))
            assert bool(fast_compiler) == enabled
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert model(pictures()).converged.all()
    output = model(pictures(), output_state=True)
    penalty = model.jacobian_loss(output.equilibrium_map, output.state)
    penalty.backward()  # the penalty needs a second derivative, so it runs eagerly


@pytest.mark.timeout(600)
def test_a_killed_compilation_of_the_norm_does_not_block_later_ones(tmp_path, monkeypatch):
    """torch's own locking, with nothing compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    fresh = type(cpp_extension.JIT_EXTENSION_VERSIONER)()
    monkeypatch.setattr(cpp_extension, "JIT_EXTENSION_VERSIONER", fresh)
    built = []

    def build(build_directory: str, **_: object) -> None:
        folder = Path(build_directory)
        assert (folder / "lock").exists()
        with (folder / "deqzoo.lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second process waits
        built.append(folder)

    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", build)
    monkeypatch.setattr(
        cpp_extension, "_import_module_from_library", lambda name, *_: ModuleType(name)
    )
    monkeypatch.setattr(native_norm, "_build_key", lambda _: "key")
    leftover = tmp_path / "deqzoo_group_norm_key" / "lock"
    leftover.parent.mkdir()
    leftover.write_text("of a killed process")
    monkeypatch.setattr(native_norm, "_extension_module", None)
    extension = native_norm._build(wait=True)
    assert extension.__name__ == "deqzoo_group_norm_key" and built == [leftover.parent]
    # From 2.14 on torch leaves the file of its own lock, which is another one.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        assert not leftover.exists()
    assert not leftover.exists() or leftover.read_text() != "of a killed process"


def test_builds_of_the_norm_are_kept_apart(monkeypatch):
    """By environment and processor, and not by the checkout that they come from."""
    keys = {native_norm._build_key("code")}
    assert native_norm._build_key("code") in keys
    for target, value in (
        ("deqzoo.models.mdeq.native_norm._processor", lambda: "flags: avx2"),
        ("torch.__file__", "/elsewhere/torch/__init__.py"),
        ("torch.__version__", "9.9"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            keys.add(native_norm._build_key("code"))
    keys.add(native_norm._build_key("other code"))
    assert len(keys) == 5 and len(native_norm._processor()) > 10


# Diagnostics


def test_jacobian_loss_shrinks_the_jacobian():
    model = tiny_model(contraction=1.0)
    output = model(pictures(), labels=torch.tensor([0, 1, 2]), output_state=True)
    assert all(not z.requires_grad for z in output.state)
    generator = torch.Generator().manual_seed(0)
    loss = model.jacobian_loss(output.equilibrium_map, output.state, 3, generator=generator)
    loss.backward()
    gradient = flat_gradient(model)
    assert loss > 0 and gradient.any()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad / gradient.norm()
    f, _ = model.equilibrium_map(pictures())
    generator = torch.Generator().manual_seed(0)
    assert model.jacobian_loss(f, output.state, 3, generator=generator) < loss


def test_spectral_radius_grows_with_the_map():
    radii = []
    for contraction in (0.05, 0.1):
        model = tiny_model(contraction=contraction)
        output = model(pictures(), output_state=True)
        radius = model.spectral_radius(
            output.equilibrium_map, output.state, generator=torch.Generator().manual_seed(0)
        )
        assert radius.shape == (3,)
        radii.append(radius)
    assert (radii[0] < radii[1]).all()


def test_no_state_without_asking():
    output = tiny_model()(pictures())
    assert output.state is None and output.equilibrium_map is None and output.hidden_states is None
