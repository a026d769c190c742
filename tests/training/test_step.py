"""The training step: what it computes, and that nothing in it waits for a device."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from deqzoo.models.mdeq import map_mdeq
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification
from deqzoo.models.mdeq.native_norm import cast_group_norm, group_norm, plain_group_norm
from deqzoo.recipe import Data, Jacobian, Model, Optimizer, Recipe, Stage
from deqzoo.tasks.images import ImageClassificationTask
from deqzoo.training import muon
from deqzoo.training.muon import Muon, orthogonalised
from deqzoo.training.optimizers import build_optimizer
from deqzoo.training.step import TrainingStep

SOLVER = {"name": "anderson", "max_steps": 4, "tol": 0.0}
UPG = {"name": "upg", "steps": 2, "damping": 0.9}
SMALL = {"channels": [8, 16], "head_channels": [4, 8], "final_channels": 16, "num_groups": 4}


def make_recipe(**changes) -> Recipe:
    base = Recipe(
        name="step",
        task="image-classification",
        data=Data("cifar10"),
        model=Model("mdeq", "mdeq-phantom-cifar-small", {**SMALL, "dropout": 0.0}),
        optimizer=Optimizer("muon", 0.02, clip=1.0),
        stages=(Stage(1, SOLVER, UPG, 16),),
        batch_size=8,
        augment={"crop": 4, "flip": "alternating", "cutout": 8, "cutmix": 0.5},
        label_smoothing=0.1,
        average=0.9,
    )
    return replace(base, **changes)


def make_step(device: str, recipe: Recipe, penalised: bool = False, bf16: bool = False):
    task = ImageClassificationTask(recipe, None, stand_in=True)
    torch.manual_seed(0)
    model = MDEQForImageClassification(task.config).to(memory_format=torch.channels_last)
    model = model.to(device).train()
    average = copy.deepcopy(model)
    model.use_training_kernels(False, torch.bfloat16 if bf16 else None)
    data = task.resident(torch.device(device))
    optimizer = build_optimizer(model, recipe.optimizer, capturable=True)
    step = TrainingStep(
        task, recipe, recipe.stages[0], data, model, average, optimizer, bf16, penalised
    )
    step.rows = torch.zeros(recipe.batch_size, dtype=torch.int64, device=device)
    return step


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("gradient", [UPG, {"name": "npg", "steps": 3}, {"name": "jfb"}], ids=str)
@pytest.mark.parametrize("side", [16, 24, 32])
def test_a_step_never_waits_for_the_device(
    never_waits, side: int, gradient, penalised: bool
) -> None:
    jacobian = Jacobian(0.3, 8, difference=0.1)
    recipe = make_recipe(stages=(Stage(1, SOLVER, gradient, side, jacobian),))
    step = make_step("meta", recipe, penalised, bf16=True)
    with never_waits():
        step.run()


def test_a_wild_gradient_changes_nothing(pictures) -> None:
    step = make_step("cpu", make_recipe(augment={}))
    step.run()
    step.read(1)
    before = [p.detach().clone() for p in step.model.parameters()]
    statistics = [b.clone() for b in step.model.buffers() if b.is_floating_point()]
    rates = [float(group["lr"]) for group in step.optimizer.param_groups]
    for group in step.optimizer.param_groups:  # momentum and decay would move the weights
        group["lr"].zero_()
    first = next(step.model.parameters())
    handle = first.register_hook(lambda gradient: gradient * torch.inf)
    step.run()
    handle.remove()
    memory = [v for state in step.optimizer.state.values() for v in state.values()]
    assert all(bool(t.isfinite().all()) for t in (*step.model.parameters(), *memory))
    for now, old in zip(step.model.parameters(), before, strict=True):
        assert torch.equal(now, old)
    now = [b for b in step.model.buffers() if b.is_floating_point()]
    assert statistics and all(map(torch.equal, now, statistics))
    assert step.read(1)["skipped"] == 1.0
    for group, rate in zip(step.optimizer.param_groups, rates, strict=True):
        group["lr"].fill_(rate)
    step.run()
    assert step.read(1)["skipped"] == 0.0
    assert not torch.equal(first, before[0])


def test_random_resized_crops_never_wait_either(never_waits) -> None:
    recipe = make_recipe(augment={"area": [0.3, 1.0], "aspect": [0.8, 1.25], "flip": "random"})
    step = make_step("meta", recipe)
    with never_waits():
        step.run()


@pytest.mark.parametrize("gradient", [UPG, {"name": "npg", "steps": 3}, {"name": "jfb"}], ids=str)
def test_fixed_steps_change_nothing_but_the_books(gradient) -> None:
    torch.manual_seed(0)
    model = MDEQForImageClassification(MDEQConfig(num_labels=10, **SMALL)).train()
    pixels, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    found = []
    for enabled in (False, True):
        model.use_fixed_steps(enabled)
        loss = model(pixels, labels, solver=SOLVER, gradient=gradient).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss.detach(), torch.cat([g.flatten() for g in grads])))
    (theirs, a), (mine, b) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    assert (a - b).norm() < 1e-5 * a.norm()


def test_a_traced_map_gives_the_plain_ones_gradient(monkeypatch) -> None:
    torch._dynamo.reset()
    traced = torch.compile(map_mdeq.mdeq_step, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(map_mdeq, "compiled_step", lambda: traced)
    jacobian = Jacobian(0.5, 1, difference=0.1)
    step = make_step("cpu", make_recipe(stages=(Stage(1, SOLVER, UPG, 16, jacobian),)), True)
    found = []
    for compiled in (False, True):
        step.model.use_training_kernels(compiled)
        torch.manual_seed(1)
        loss = step.loss(torch.arange(8))
        grads = torch.autograd.grad(loss, list(step.model.parameters()))
        found.append((float(loss.detach()), torch.cat([g.flatten() for g in grads])))
    (plain, a), (mine, b) = found
    assert mine == pytest.approx(plain, rel=0.01)
    assert F.cosine_similarity(a, b, dim=0) > 0.99


def test_one_precision_is_close_to_float32() -> None:
    torch.manual_seed(0)
    model = MDEQForImageClassification(MDEQConfig(num_labels=10, **SMALL)).train()
    pixels = torch.randn(4, 3, 8, 8)
    f, z = model.equilibrium_map(pixels)
    narrow = f.in_precision(torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in (narrow.injections[0], narrow.tensors.post[0][0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mine = narrow(z)
    theirs = f(z)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("flags", [{}, {"relu_before": True}, {"relu_after": True}], ids=str)
@pytest.mark.parametrize("norm", [plain_group_norm, cast_group_norm])
def test_norms_agree_and_the_plain_one_keeps_channels_last(norm, flags) -> None:
    x = torch.randn(3, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(16), torch.randn(16)
    mine = norm(x, 4, scale, shift, **flags)
    torch.testing.assert_close(mine, group_norm(x, 4, scale, shift, **flags), rtol=1e-4, atol=1e-5)
    if norm is plain_group_norm:
        assert mine.is_contiguous(memory_format=torch.channels_last)
    narrow = x.bfloat16()
    found = norm(narrow, 4, scale, shift, **flags)
    assert found.dtype == torch.bfloat16
    assert (found.float() - mine).norm() < 0.01 * mine.norm()


def reference_polar(matrix: torch.Tensor) -> torch.Tensor:
    """Five quintic steps of one matrix in float64, not padded."""
    x = matrix.double()
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    return x * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5


@pytest.mark.parametrize("fast", (True, False))
@pytest.mark.parametrize("shape", [(8, 8), (16, 8, 3, 3), (80, 20), (70, 1100), (300, 200)])
def test_stacked_matrices_are_orthogonalised_as_alone(shape, fast, monkeypatch) -> None:
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda: fast)
    torch.manual_seed(0)
    updates = [torch.randn(shape), torch.randn(16, 40)]
    mine = orthogonalised(updates)
    for update, result in zip(updates, mine, strict=True):
        expected = reference_polar(update.reshape(update.shape[0], -1)).reshape(update.shape)
        assert result.shape == update.shape and result.dtype == update.dtype
        tolerance = 0.03 if fast else 1e-4  # bfloat16 or float32 inside
        assert (result - expected).norm() < tolerance * expected.norm()


def test_channels_last_kernels_are_orthogonalised_in_their_layout() -> None:
    torch.manual_seed(0)
    update = torch.randn(16, 8, 3, 3)
    last = update.contiguous(memory_format=torch.channels_last)
    (expected,), (found,) = orthogonalised([update]), orthogonalised([last])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).norm() < 0.03 * expected.norm()  # other sums in bfloat16


def test_muon_is_its_definition() -> None:
    """Three steps against momentum, Nesterov, decay and AdamW written out, within bfloat16."""
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(6, 9)), torch.nn.Parameter(torch.randn(5))
    groups = [
        {"params": [matrix], "use_muon": True, "lr": 0.1, "momentum": 0.9, "nesterov": True,
         "weight_decay": 0.1},
        {"params": [vector], "use_muon": False, "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8,
         "weight_decay": 0.1},
    ]  # fmt: skip
    optimizer = Muon(groups)
    reference = torch.nn.Parameter(vector.detach().clone())
    adam = torch.optim.AdamW([reference], 0.01, (0.9, 0.99), 1e-8, 0.1)
    expected, momentum = matrix.detach().clone().double(), torch.zeros(6, 9).double()
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn(6, 9), torch.randn(5)
        reference.grad = vector.grad.clone()
        momentum = 0.9 * momentum + 0.1 * matrix.grad
        update = reference_polar(0.9 * momentum + 0.1 * matrix.grad)
        expected = expected * (1 - 0.1 * 0.1) - 0.1 * update
        optimizer.step()
        adam.step()
    torch.testing.assert_close(vector, reference, rtol=1e-5, atol=1e-6)
    assert (matrix - expected).norm() < 0.01 * expected.norm()


def test_muon_resumes_and_follows_rates_that_are_tensors() -> None:
    def train(optimizer, model, steps):
        for k in range(steps):
            torch.manual_seed(k)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    settings = Optimizer("muon", 0.02, weight_decay=0.1)
    models = [torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (build_optimizer(models[i], settings, capturable=bool(i)) for i in (0, 1))
    train(first, models[0], 2)
    train(second, models[1], 2)
    resumed = build_optimizer(models[1], settings, capturable=True)
    resumed.load_state_dict(second.state_dict())
    train(first, models[0], 2)
    train(resumed, models[1], 2)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
