"""Parity with numbers that the official implementation produced in float64 (tests/golden/mdeq)."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deqzoo.equilibrium import FixedPointIteration, Rows, Solution, fixed_point
from deqzoo.models.mdeq.convert_mdeq import build_model, official_to_deqzoo, read_config

GOLDEN = Path(__file__).parents[1] / "golden" / "mdeq"
ARCHITECTURES = ("two_branch_small", "cifar_tiny", "four_branch_imagenet_style")
WITH_DETAILS = ("two_branch_small", "four_branch_imagenet_style")
PHANTOM = "phantom_gradient"
TIGHT = {"name": "anderson", "max_steps": 400, "tol": 1e-13, "window": 8}


class Golden:
    """One golden file: its tensors, its tolerances, and a model with its weights."""

    def __init__(self, name: str) -> None:
        self.values = load_file(GOLDEN / f"{name}.safetensors")
        self.info = json.loads((GOLDEN / f"{name}.json").read_text())
        self.model = build_model(self.group("sd."), read_config(GOLDEN / f"{name}.json"))

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        n = len(prefix)
        return {k[n:]: v.clone() for k, v in self.values.items() if k.startswith(prefix)}

    def state(self, prefix: str) -> tuple[torch.Tensor, ...]:
        n = len(self.info["channels"])
        return tuple(self.values[f"{prefix}.{i}"].clone() for i in range(n))

    def tolerance(self, name: str) -> float:
        return self.info["tolerances"].get(name, 1e-8)


@lru_cache
def golden(name: str) -> Golden:
    return Golden(name)


def fresh_model(name: str):
    return build_model(golden(name).group("sd."), read_config(GOLDEN / f"{name}.json"))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative 2-norm error."""
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def assert_close(actual, expected, tolerance: float) -> None:
    if isinstance(actual, torch.Tensor):
        actual, expected = (actual,), (expected,)
    for a, b in zip(actual, expected, strict=True):
        assert error(a.detach(), b) <= tolerance


@pytest.mark.parametrize("name", (*ARCHITECTURES, PHANTOM))
def test_parameters_and_dtype(name):
    data = golden(name)
    assert sum(p.numel() for p in data.model.parameters()) == data.info.get(
        "num_parameters", sum(p.numel() for p in data.model.parameters())
    )
    assert data.model.dtype == torch.float64 and data.model.config.dtype == torch.float64


@pytest.mark.parametrize("name", (*ARCHITECTURES, PHANTOM))
def test_injections(name):
    data = golden(name)
    f, z0 = data.model.equilibrium_map(data.values["input"])
    expected = data.state("inj")
    assert_close(f.injections[0], expected[0], data.tolerance("inj_rel"))
    for i, injection in enumerate(f.injections[1:], start=1):
        assert injection is None and not expected[i].any()
    if "z0.0" in data.values:
        for a, b in zip(z0, data.state("z0"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_application(name):
    data = golden(name)
    f, _ = data.model.equilibrium_map(data.values["input"])
    out = f(data.state("F_in"))
    assert_close(out, data.state("F_out"), data.tolerance("F_rel"))


@pytest.mark.parametrize("name", WITH_DETAILS)
def test_flat_order(name):
    data = golden(name)
    f, _ = data.model.equilibrium_map(data.values["input"])
    layout = Rows()
    vector = layout.to_matrix(data.state("F_in"))
    assert torch.equal(vector, data.values["F_in_vec"].squeeze(-1))
    out = layout.to_matrix(f(layout.to_state(vector)))
    assert_close(out, data.values["F_out_vec"].squeeze(-1), data.tolerance("F_rel"))


@pytest.mark.parametrize("name", WITH_DETAILS)
def test_dropout_masks(name):
    data = golden(name)
    blocks = data.info["blocks_per_branch"]
    masks = tuple(
        tuple(data.values[f"drop_mask.{i}.{b}"] for b in range(count))
        for i, count in enumerate(blocks)
    )
    f, _ = data.model.equilibrium_map(data.values["input"], masks)
    assert_close(f(data.state("F_in")), data.state("F_out_drop"), data.tolerance("F_rel"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equilibrium_and_logits(name):
    data = golden(name)
    with torch.no_grad():
        head = data.model.classifier(data.model.head(data.state("zstar")))
        output = data.model(data.values["input"], solver=TIGHT, output_hidden_states=True)
    assert output.converged.all()
    assert_close(output.hidden_states, data.state("zstar"), data.tolerance("zstar_rel"))
    assert_close(head, data.values["logits"], data.tolerance("logits_rel"))
    assert_close(output.logits, data.values["logits"], data.tolerance("logits_rel"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shallow_logits(name):
    data = golden(name)
    with torch.no_grad():
        output = data.model(data.values["input"], shallow=True)
    assert_close(output.logits, data.values["logits_unroll"], data.tolerance("logits_unroll_rel"))
    assert (output.n_steps == data.info["unroll_layers"]).all()


@pytest.mark.parametrize("name", WITH_DETAILS)
def test_jacobian_penalty(name):
    data = golden(name)
    f, _ = data.model.equilibrium_map(data.values["input"])
    layout = Rows()
    layout.to_matrix(data.state("F_in"))
    probes = [layout.to_state(v.squeeze(-1)) for v in data.values["jac.v"]]
    loss = data.model.jacobian_loss(f, data.state("F_in"), probes=probes)
    assert_close(loss.reshape(1), data.values["jac.loss"], 1e-8)
    loss.backward()
    assert data.model.mdeq.transformation.branches[0][0].conv1.direction.grad.any()
    data.model.zero_grad()


@pytest.mark.parametrize("name", WITH_DETAILS)
def test_spectral_radius(name):
    data = golden(name)
    f, _ = data.model.equilibrium_map(data.values["input"])
    layout = Rows()
    layout.to_matrix(data.state("zstar"))
    v0 = layout.to_state(data.values["specrad.v_init"].squeeze(-1))
    value = data.model.spectral_radius(f, data.state("zstar"), 150, "rayleigh", v0)
    assert_close(value, data.values["specrad.value"].squeeze(-1), 1e-8)


@dataclasses.dataclass(frozen=True)
class Given(FixedPointIteration):
    """A solver that returns its start, so that a gradient can be taken at any point."""

    def solve(self, f, z0, layout=None, *args, **kwargs) -> Solution:
        solution = super().solve(f, z0, layout)
        solution.state = z0
        return solution


def leaf_gradients(gradient: dict, point: str) -> dict[str, torch.Tensor]:
    """Gradient of sum(g . h) for every parameter of the map and every injection."""
    data = golden(PHANTOM)
    model = data.model
    f, _ = model.equilibrium_map(data.values["input"])
    injections = tuple(u.requires_grad_() for u in data.state("inj"))
    f = dataclasses.replace(f, injections=injections)
    solution = fixed_point(f, data.state(point), solver=Given(max_steps=1), gradient=gradient)
    loss = sum((g * h).sum() for g, h in zip(data.state("g"), solution.state, strict=True))
    named = dict(model.mdeq.transformation.named_parameters(prefix="mdeq.transformation"))
    named |= {f"inj.{i}": u for i, u in enumerate(injections)}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_gradients(prefix: str, found: dict[str, torch.Tensor], tolerance: float) -> None:
    expected = golden(PHANTOM).group(prefix)
    assert {official_to_deqzoo(k) for k in expected} == set(found)
    for key, value in expected.items():
        assert error(found[official_to_deqzoo(key)], value) <= tolerance, key


@pytest.mark.parametrize("damping", (0.5, 0.8, 1.0))
@pytest.mark.parametrize("steps", (1, 3, 5))
@pytest.mark.parametrize("mode", ("upg", "npg"))
@pytest.mark.parametrize("point", ("star", "approx"))
def test_phantom_gradients(point, mode, steps, damping):
    data = golden(PHANTOM)
    found = leaf_gradients({"name": mode, "steps": steps, "damping": damping}, f"h{point}")
    prefix = f"grad.{point}.{mode}.k{steps}.lam{round(100 * damping):03d}."
    assert_gradients(prefix, found, data.tolerance("grad_rel"))


@pytest.mark.parametrize("solver", ("anderson", "broyden", "fixed_point"))
@pytest.mark.parametrize("point", ("star", "approx"))
def test_implicit_gradients(point, solver):
    data = golden(PHANTOM)
    adjoint = {"name": solver, "max_steps": 300, "tol": 1e-11}
    found = leaf_gradients({"name": "implicit", "solver": adjoint}, f"h{point}")
    assert_gradients(f"grad.{point}.exact.", found, data.tolerance("exact_rel"))


@pytest.mark.parametrize("point", ("star", "approx"))
def test_adjoint(point):
    """The gradient with respect to a plain additive input is the adjoint y = (I - J^T)^-1 g."""
    data = golden(PHANTOM)
    f, _ = data.model.equilibrium_map(data.values["input"])
    shifts = tuple(torch.zeros_like(z, requires_grad=True) for z in data.state("g"))

    def shifted(state):
        return tuple(z + s for z, s in zip(f(state), shifts, strict=True))

    adjoint = {"name": "anderson", "max_steps": 300, "tol": 1e-12}
    solution = fixed_point(
        shifted,
        data.state(f"h{point}"),
        solver=Given(max_steps=1),
        gradient={"name": "implicit", "solver": adjoint},
    )
    loss = sum((g * h).sum() for g, h in zip(data.state("g"), solution.state, strict=True))
    found = torch.autograd.grad(loss, shifts)
    assert_close(found, data.state(f"adjoint.{point}"), data.tolerance("exact_rel"))


def test_training_step():
    data = golden(PHANTOM)
    model = fresh_model(PHANTOM).train()
    output = model(
        data.values["input"],
        labels=data.values["train.labels"],
        solver=TIGHT | {"tol": 1e-14},
        gradient={"name": "implicit", "solver": TIGHT},
    )
    assert_close(output.logits, data.values["train.logits"], 1e-8)
    assert_close(output.loss.reshape(1), data.values["train.loss"], 1e-8)
    output.loss.backward()
    expected = {official_to_deqzoo(k): v for k, v in data.group("train.grad.").items()}
    found = {name: p.grad for name, p in model.named_parameters()}
    assert set(expected) == set(found)
    for name, value in expected.items():
        if name.endswith("conv.bias"):  # batch norm removes these: zero up to rounding
            assert found[name].abs().max() < 1e-10, name
        else:
            assert error(found[name], value) <= data.tolerance("train_grad_rel"), name
    buffers = dict(model.named_buffers())
    for key, value in data.group("train.buffers_after.").items():
        assert_close(buffers[official_to_deqzoo(key)], value, 1e-8)
