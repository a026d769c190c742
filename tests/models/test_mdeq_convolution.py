"""Convolutions of coarse pictures by matrix products, against float64 and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deqzoo.models.mdeq import convolution
from deqzoo.models.mdeq.convolution import same_conv2d
from deqzoo.models.mdeq.native_norm import native_group_norm

from .mdeq_helpers import tiny_model

# channels in, channels out, side, stride
SHAPES = ((256, 320, 4, 1), (320, 256, 4, 1), (256, 256, 2, 1), (128, 256, 4, 1), (256, 64, 4, 1),
          (64, 256, 8, 2), (256, 32, 1, 1))  # fmt: skip


@pytest.fixture(autouse=True)
def amx(monkeypatch):
    """Products are right on every processor, and fast on those that have AMX."""
    monkeypatch.setattr(convolution, "has_amx", lambda: True)


def case(channels, out, side, stride, batch=3):
    """Inputs, weight and cotangent in bfloat16, as a model has them."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side)
    weight = torch.randn(out, channels, 3, 3) / (9 * channels) ** 0.5
    dy = torch.randn(batch, out, -(-side // stride), -(-side // stride))
    return tuple(
        t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, weight, dy)
    )


def results(conv, x, weight, dy):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = conv(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at_once", (None, 9 * 320 * 16))
def test_result_and_gradients_are_right_to_rounding(shape, at_once, monkeypatch):
    if at_once is not None:  # one or two pictures at once
        monkeypatch.setattr(convolution, "_AT_ONCE", at_once)
    x, weight, dy = case(*shape)
    stride = shape[-1]

    def own(x, weight):
        y = same_conv2d(x, weight, stride, once=True)
        assert y.grad_fn.name().startswith("_Products")
        return y

    found = results(own, x, weight, dy)
    exact = results(
        lambda x, w: F.conv2d(x, w, stride=stride, padding=1),
        x.double(),
        weight.double(),
        dy.double(),
    )
    for name, a, b in zip(("y", "dx", "dw"), found, exact, strict=True):
        assert a.dtype == torch.bfloat16 and a.shape == b.shape
        assert a.is_contiguous(memory_format=torch.channels_last)
        error = (a.double() - b).norm() / b.norm()
        assert error < 6e-3, f"{name}: {error:.1e}"  # rounding once gives 1.7e-3, eps is 7.8e-3


def test_under_autocast_a_state_comes_in_float32():
    x, weight, dy = case(256, 256, 4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lambda x, w: same_conv2d(x, w, once=True), x.float(), weight, dy)
        own = results(lambda x, w: F.conv2d(x, w, padding=1), x.float(), weight, dy)
    for a, b in zip(found, own, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_products_with_the_state_compute_no_gradient_of_weights(monkeypatch):
    x, weight, dy = case(256, 256, 4, 1)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = same_conv2d(x, weight, once=True)

    def fail(*arguments: object) -> None:
        raise AssertionError("computed for nothing")

    monkeypatch.setattr(convolution, "_weight_gradient", fail)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert dx.any()
    with pytest.raises(AssertionError, match="for nothing"):
        torch.autograd.grad(y, weight, dy)


@pytest.mark.parametrize(
    ("shape", "options"),
    (
        ((256, 256, 8, 1), {"once": True}),  # too wide
        ((128, 128, 4, 1), {"once": True}),  # few channels
        ((256, 256, 4, 1), {"once": False}),  # may be differentiated twice
    ),
)
def test_where_pytorch_s_own_is_taken(shape, options):
    x, weight, dy = case(*shape)
    y = same_conv2d(x, weight.requires_grad_(), **options)
    assert y.grad_fn.name().startswith("Convolution")


def test_other_precisions_and_processors(monkeypatch):
    x, weight, _ = case(256, 256, 4, 1)
    assert not convolution._takes_products(x.float(), weight.float(), 1)
    assert not convolution._takes_products(x.float(), weight, 1)  # an error of PyTorch's own
    assert convolution._takes_products(x, weight, 1)
    monkeypatch.setattr(convolution, "has_amx", lambda: False)
    assert not convolution._takes_products(x, weight, 1)


def test_gradient_of_a_model(monkeypatch):
    """In bfloat16 with products, with PyTorch's own, and in float64."""
    settings = {"channels": [16, 256], "num_groups": 8, "expansion": 1, "head_channels": [2, 2]}
    solver = {"max_steps": 4, "tol": 0.0}
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def gradient(products, double=False):
        monkeypatch.setattr(convolution, "has_amx", lambda: products)
        model = tiny_model(**settings).train()
        model.config.dropout = 0.0
        if double:
            model, pixels = model.double(), batch.double()
        else:
            model, pixels = model.to(memory_format=torch.channels_last), batch
            assert model.use_native_norm()
        seen = []
        original = convolution._weight_gradient
        monkeypatch.setattr(
            convolution, "_weight_gradient", lambda *a: seen.append(1) or original(*a)
        )
        f, z = model.equilibrium_map(pixels)
        if not double:
            f = f.in_precision(torch.bfloat16)
        state = model.solve(f, z, solver=solver, gradient={"name": "upg", "steps": 2}).state
        sum((s * s.detach().cos()).sum() for s in state).backward()
        monkeypatch.setattr(convolution, "_weight_gradient", original)
        assert bool(seen) == (products and not double)
        convs = model.mdeq.transformation.branches[1][0].named_parameters()
        return torch.cat([p.grad.double().flatten() for name, p in convs if "conv" in name])

    exact = gradient(False, double=True)
    errors = [(gradient(p) - exact).norm() / exact.norm() for p in (False, True)]
    assert errors[0] < 0.1 and errors[1] < 1.3 * errors[0] + 1e-3, errors


def test_a_map_that_is_differentiated_twice_has_none():
    model = tiny_model(channels=[16, 256], num_groups=8, expansion=1, head_channels=[2, 2])
    model.use_native_norm()
    f, z = model.equilibrium_map(torch.randn(2, 3, 8, 8))
    f = f.in_precision(torch.bfloat16)
    assert f.norm is native_group_norm
    z = tuple(t.requires_grad_() for t in z)
    y = f.twice_differentiable()(z)
    (dz,) = torch.autograd.grad(y[1].sum(), z[1], create_graph=True)
    assert torch.autograd.grad(dz.square().sum(), z[1])[0].isfinite().all()
