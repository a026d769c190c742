"""Behaviour of the MDEQ classes beyond parity: settings, shapes, loading, precision, isolation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from deqzoo.errors import UserError
from deqzoo.models.mdeq import map_mdeq
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.layers_mdeq import WeightNormConv2d, row_norms
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification, MDEQModel
from deqzoo.models.mdeq.presets_mdeq import PRESETS

TINY = {
    "channels": [8, 16],
    "head_channels": [2, 3],
    "final_channels": 12,
    "expansion": 2,
    "num_groups": 4,
    "image_size": 8,
    "num_labels": 5,
    "solver": {"name": "anderson", "max_steps": 40, "tol": 1e-5},
}


def tiny_model(seed: int = 0, contraction: float = 0.05, **settings) -> MDEQForImageClassification:
    """A small model whose map contracts: states vary little around a random bias."""
    torch.manual_seed(seed)
    model = MDEQForImageClassification(MDEQConfig(**(TINY | settings)))
    with torch.no_grad():
        for post in model.mdeq.transformation.post:
            if model.config.affine_post:
                post.norm.weight.fill_(contraction)
                post.norm.bias.normal_()
    return model.eval()


def pictures(n: int = 3, side: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# Configuration


OFFICIAL_COUNTS = {
    "mdeq-cifar-tiny": (158_890, 94),
    "mdeq-cifar-large": (11_097_438, 216),
    "mdeq-cifar-large-reg": (11_097_438, 216),
    "mdeq-imagenet-small": (16_808_936, 224),
    "mdeq-imagenet-small-reg": (18_613_496, 216),
    "mdeq-imagenet-large": (67_063_624, 224),
    "mdeq-imagenet-large-reg": (67_061_224, 216),
    "mdeq-imagenet-xl": (90_463_280, 224),
    "mdeq-phantom-cifar-small": (158_986, 98),
    "mdeq-phantom-cifar-large": (11_098_398, 224),
    "mdeq-phantom-imagenet-small": (16_808_936, 224),
    "mdeq-torchdeq-cifar-small": (159_034, 100),
    "mdeq-torchdeq-cifar-large": (11_099_998, 240),
    "mdeq-torchdeq-imagenet-small": (16_808_456, 220),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_official_sizes(name):
    with torch.device("meta"):
        model = MDEQForImageClassification(MDEQConfig.from_preset(name))
    assert (model.num_parameters(), len(model.state_dict())) == OFFICIAL_COUNTS[name]


def test_preset_details():
    config = MDEQConfig.from_preset("mdeq-imagenet-small-reg")
    assert config.dropout == 0.02 and not config.affine_post and config.num_labels == 1000
    assert config.solver["max_steps"] == 14 and config.gradient["solver"]["max_steps"] == 14
    config = MDEQConfig.from_preset("mdeq-cifar-tiny")
    assert config.id2label[3] == "cat" and config.label2id["truck"] == 9
    assert not config.injection_transform and config.gradient["name"] == "implicit"
    assert MDEQConfig.from_preset("mdeq-cifar-large").injection_transform
    changed = MDEQConfig.from_preset("mdeq-phantom-cifar-small", num_labels=4, dropout=0.1)
    assert changed.num_labels == 4 and changed.dropout == 0.1
    assert MDEQConfig.from_preset("mdeq-phantom-cifar-small").num_labels == 10
    with pytest.raises(ValueError, match="mdeq-cifar-large"):
        MDEQConfig.from_preset("mdeq-cifar-huge")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": [8]}, "two branches"),
        ({"head_channels": [2]}, "head_channels"),
        ({"num_groups": 3}, "num_groups=3"),
        ({"num_groups": 32}, "must divide"),
        ({"dropout": 1.0}, "dropout"),
        ({"image_size": 7}, "multiple of 2"),
        ({"big_kernels": [3, 0]}, "big_kernels"),
        ({"weight_norm": "some"}, "weight_norm"),
        ({"unroll_layers": 0}, "unroll_layers"),
        ({"solver": {"name": "newton"}}, "newton"),
        ({"gradient": {"name": "upg", "lambda": 1}}, "lambda"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MDEQConfig(**(TINY | settings))


def test_config_round_trip(tmp_path):
    config = MDEQConfig(**(TINY | {"channels": (8, 16), "blocks_per_branch": (2, 1)}))
    config.save_pretrained(tmp_path)
    assert MDEQConfig.from_pretrained(tmp_path).to_dict() == config.to_dict() | {
        "transformers_version": MDEQConfig.from_pretrained(tmp_path).to_dict()[
            "transformers_version"
        ]
    }


@pytest.mark.parametrize(
    "change",
    [
        {"weight_norm": "none"},
        {"weight_norm": "block"},
        {"weight_norm": "all"},
        {"affine_block": False},
        {"affine_fuse": False},
        {"affine_post": False},
        {"blocks_per_branch": [2, 1]},
        {"big_kernels": [2, 1]},
        {"injection_transform": True},
        {"stem_downsamples": 3, "image_size": 16},
        {"expansion": 3},
        {"num_channels": 1},
    ],
)
def test_architecture_options_change_the_weights(change):
    base = MDEQForImageClassification(MDEQConfig(**TINY))
    model = MDEQForImageClassification(MDEQConfig(**(TINY | change))).eval()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (base, model)]
    assert shapes[0] != shapes[1]
    side, channels = model.config.image_size, model.config.num_channels
    with torch.no_grad():
        out = model(torch.randn(2, channels, side, side), solver={"max_steps": 2})
    assert out.logits.shape == (2, 5)


# Initialisation


def test_initialisation_is_the_references():
    torch.manual_seed(0)
    model = MDEQForImageClassification(MDEQConfig.from_preset("mdeq-phantom-cifar-small"))
    conv = model.mdeq.transformation.branches[0][0].conv1
    bound = 1 / math.sqrt(24 * 9)
    assert conv.direction.abs().max() <= bound and conv.direction.std() > 0.5 * bound
    torch.testing.assert_close(conv.magnitude, row_norms(conv.direction))
    fuse = model.mdeq.transformation.fuse[0]["1"].stages[0].conv.weight
    assert abs(fuse.std() - 0.01) < 0.002
    assert 0.005 < model.head.final.conv.bias.std() < 0.015
    assert model.classifier.weight.abs().max() <= 1 / math.sqrt(200)
    torch.manual_seed(0)
    default = MDEQForImageClassification(
        MDEQConfig.from_preset("mdeq-phantom-cifar-small", initializer_range=None)
    )
    assert default.mdeq.transformation.fuse[0]["1"].stages[0].conv.weight.std() > 0.08


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_effective_weight(dtype):
    conv = WeightNormConv2d(4, 3, 3).to(dtype)
    with torch.no_grad():
        conv.magnitude.uniform_(0.5, 2)
    weight = conv.effective_weight()
    expected = torch._weight_norm(conv.direction, conv.magnitude, 0)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(row_norms(weight), conv.magnitude.abs())


# Loading: each trap of loading on the meta device


def stored(model, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("missing", ("magnitude", "direction", "running_var", "norm2.weight"))
def test_a_partial_checkpoint_leaves_no_garbage(tmp_path, missing):
    model = tiny_model(contraction=0.3)
    tensors = stored(model, tmp_path)
    kept = {k: v for k, v in tensors.items() if not k.endswith(missing)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = MDEQForImageClassification.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        if name in kept:
            assert torch.equal(value, kept[name]), name
        elif missing in ("running_var", "norm2.weight"):
            assert torch.equal(value, torch.ones_like(value)), name
        elif missing == "direction":
            assert value.abs().max() <= 1 / math.sqrt(value[0].numel()) and value.any(), name
        else:
            direction = kept[name.replace("magnitude", "direction")]
            torch.testing.assert_close(value, row_norms(direction))


def test_no_plain_tensors_and_no_hidden_buffers(tmp_path):
    model = tiny_model()
    names = set(model.state_dict())
    assert {n for n, _ in model.named_buffers()} <= names  # all buffers are persistent
    for module in model.modules():
        assert not any(isinstance(v, torch.Tensor) for v in vars(module).values())
    model.save_pretrained(tmp_path)
    loaded = MDEQForImageClassification.from_pretrained(tmp_path)
    assert all(t.device.type == "cpu" for t in loaded.state_dict().values())
    assert not loaded.training


def test_sharded_round_trip(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = MDEQForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(pictures()).logits, model(pictures()).logits)


def test_base_model_head_and_labels(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    base = MDEQModel.from_pretrained(tmp_path)
    with torch.no_grad():
        features = base(pictures()).features
        expected = model(pictures(), output_hidden_states=True).hidden_states
    assert [f.shape for f in features] == [(3, 8, 8, 8), (3, 16, 4, 4)]
    for a, b in zip(features, expected, strict=True):
        assert torch.equal(a, b)
    resized = MDEQForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert resized.classifier.weight.shape == (7, 12)
    assert torch.equal(resized.head.final.conv.weight, model.head.final.conv.weight)
    with torch.no_grad():
        assert resized(pictures()).logits.shape == (3, 7)


def test_half_precision_storage_computes_in_the_configs_dtype(tmp_path):
    model = tiny_model()
    model.to(torch.float16).save_pretrained(tmp_path)
    config = MDEQConfig.from_pretrained(tmp_path)
    config.dtype = torch.float32
    config.save_pretrained(tmp_path)
    loaded = MDEQForImageClassification.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert load_file(tmp_path / "model.safetensors")["classifier.weight"].dtype == torch.float16


# Forward


def test_output_shapes_and_tuples():
    model = tiny_model()
    output = model(pictures(), labels=torch.tensor([0, 1, 2]))
    assert output.logits.shape == (3, 5) and output.loss.ndim == 0
    for name, dtype in (
        ("n_steps", torch.int64),
        ("residual", torch.float32),
        ("converged", torch.bool),
    ):
        value = getattr(output, name)
        assert value.shape == (3,) and value.dtype == dtype
    assert output.converged.all() and (output.residual <= 1e-5).all()
    as_tuple = model(pictures(), return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.logits)
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(output.loss, expected)


def test_settings_per_call_per_model_and_from_the_config():
    model = tiny_model()
    with torch.no_grad():
        few = model(pictures(), solver={"max_steps": 2})
        assert (few.n_steps == 2).all() and not few.converged.any()
        loose = model(pictures(), solver={"tol": 1e-1})
        assert (loose.n_steps < model(pictures()).n_steps).all()
        model.set_solver(max_steps=3)
        assert (model(pictures()).n_steps == 3).all()
        model.set_solver("fixed_point", max_steps=4, tol=1e-9)
        assert (model(pictures()).n_steps == 4).all() and model.config.solver["max_steps"] == 4
    with pytest.raises(ValueError, match="max_step"):
        model(pictures(), solver={"max_step": 2})


def test_every_gradient_reaches_every_parameter_of_the_map():
    model = tiny_model()
    directions = {}
    for name in ("implicit", "upg", "npg", "jfb", "unrolled"):
        model.zero_grad()
        model(pictures(), labels=torch.tensor([0, 1, 2]), gradient=name).loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
        directions[name] = flat_gradient(model)
    exact = directions.pop("implicit")
    for name, other in directions.items():
        cosine = torch.nn.functional.cosine_similarity(exact, other, dim=0)
        assert cosine > 0.9 and not torch.equal(exact, other), name
    model.zero_grad()
    model.set_gradient("npg", steps=2, damping=0.7)
    model(pictures(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert not torch.equal(flat_gradient(model), directions["npg"])


def test_shallow_mode_is_plain_unrolling():
    model = tiny_model(unroll_layers=3)
    output = model(pictures(), shallow=True, output_hidden_states=True)
    f, z = model.equilibrium_map(pictures())
    for _ in range(3):
        z = f(z)
    for a, b in zip(output.hidden_states, z, strict=True):
        torch.testing.assert_close(a, b)
    assert (output.n_steps == 3).all() and not output.converged.any()
    assert tiny_model(unroll_layers=60)(pictures(), shallow=True).converged.all()
    output.logits.sum().backward()
    assert model.mdeq.stem.convolutions[0].weight.grad.any()


@pytest.mark.parametrize("height, width", [(8, 8), (12, 4), (2, 16), (10, 14)])
def test_any_divisible_size(height, width):
    with torch.no_grad():
        out = tiny_model()(torch.randn(2, 3, height, width), output_hidden_states=True)
    assert out.hidden_states[1].shape == (2, 16, height // 2, width // 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.randn(2, 3, 9, 8), "multiples of 2"),
        (torch.randn(2, 3, 8, 0), "multiples of 2"),
        (torch.randn(3, 8, 8), "shape"),
        (torch.randn(2, 1, 8, 8), "shape"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "dtype torch.uint8"),
    ],
)
def test_wrong_pictures_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        tiny_model()(wrong)


def test_dropout_masks_are_drawn_once_per_forward():
    model = tiny_model(dropout=0.5).train()
    f, z = model.equilibrium_map(pictures())
    assert [m.shape for masks in f.masks for m in masks] == [(3, 8, 1, 1), (3, 16, 1, 1)]
    assert set(torch.cat([m.flatten() for masks in f.masks for m in masks]).tolist()) == {0.0, 2.0}
    once, again = f(f(z)), f(f(z))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    other, _ = model.equilibrium_map(pictures())
    assert not all(torch.equal(a, b) for a, b in zip(once, other(other(z)), strict=True))
    assert model.eval().equilibrium_map(pictures())[0].masks is None


def test_effective_weights_are_computed_once_per_forward(monkeypatch):
    model, calls = tiny_model(), []
    original = WeightNormConv2d.effective_weight
    monkeypatch.setattr(
        WeightNormConv2d, "effective_weight", lambda self: calls.append(1) or original(self)
    )
    model(pictures(), labels=torch.tensor([0, 1, 2]), gradient="npg").loss.backward()
    assert len(calls) == sum(isinstance(m, WeightNormConv2d) for m in model.modules()) == 6


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


@pytest.mark.parametrize("gradient", ("implicit", "npg"))
def test_gradient_checkpointing_is_refused_where_it_saves_nothing(gradient):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="needs no gradient checkpointing"):
        model(pictures(), gradient=gradient)


@pytest.fixture
def fast_compiler(monkeypatch):
    """The same graphs as `compile_map`, without the minutes of code generation."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", False)
    step = torch.compile(map_mdeq.mdeq_step, dynamic=False, fullgraph=True, backend="aot_eager")
    calls = []
    monkeypatch.setattr(map_mdeq, "compiled_step", lambda: calls.append(1) or step)
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


def test_compiled_model():
    torch._dynamo.reset()
    model = tiny_model(solver={"name": "anderson", "max_steps": 3})
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pictures()).logits, model(pictures()).logits)
    torch._dynamo.reset()


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
