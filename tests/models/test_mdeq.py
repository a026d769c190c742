"""Behaviour of the MDEQ classes beyond parity: settings, shapes, loading, precision, isolation."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, pipeline

from deqzoo.equilibrium import JFB, Anderson, Broyden
from deqzoo.errors import UserError
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.image_processing_mdeq import MDEQImageProcessor
from deqzoo.models.mdeq.layers_mdeq import WeightNormConv2d, make_conv
from deqzoo.models.mdeq.modeling_mdeq import (
    MDEQBackbone,
    MDEQForImageClassification,
    MDEQModel,
)
from deqzoo.models.mdeq.presets_mdeq import PRESETS
from deqzoo.models.weights import row_norms

from .mdeq_helpers import TINY, flat_gradient, pictures, tiny_model

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


def test_config_takes_names_and_objects():
    for spec in ("broyden", Broyden(max_steps=30, tol=1e-3)):
        config = MDEQConfig(solver=spec)
        assert config.solver["name"] == "broyden" and config.solver["max_steps"] == 30
        assert MDEQConfig.from_dict(config.to_dict()).solver == config.solver
    for spec in ("jfb", JFB()):
        assert MDEQConfig(gradient=spec).gradient == {"name": "jfb"}
    with pytest.raises((ValueError, StrictDataclassError), match="newton"):
        MDEQConfig(solver="newton")


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
    conv = make_conv(4, 3, 3, weight_norm=True).to(dtype)
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


@pytest.mark.parametrize(
    "kind, labels, message",
    [
        (None, torch.tensor([0, 1, 10]), "labels hold 10"),
        (None, torch.tensor([0, -1, 1]), "labels hold -1"),
        (None, torch.tensor([0, 1]), "2 labels for 3 pictures"),
        (None, torch.eye(10)[:3].long(), "30 labels for 3 pictures"),
        ("multi_label_classification", torch.tensor([0, 1, 2]), r"needs \(3, 5\)"),
        ("regression", torch.rand(3, 1), r"needs \(3, 5\)"),
    ],
)
def test_labels_are_checked_before_the_solve(kind, labels, message, monkeypatch):
    model = tiny_model()
    model.config.problem_type = kind
    monkeypatch.setattr(model.mdeq, "forward", lambda *_, **__: pytest.fail("solved"))
    with pytest.raises(UserError, match=message):
        model(pictures(), labels=labels)


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


def test_a_subclass_of_any_name_has_the_loss():
    class Classifier(MDEQForImageClassification):
        pass

    model, labels = tiny_model(), torch.tensor([0, 1, 2])
    other = Classifier(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(pictures(), labels=labels).loss
        torch.testing.assert_close(other(pictures(), labels=labels).loss, expected)


def test_feature_extraction_pipeline(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    MDEQImageProcessor.for_config(model.config).save_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path))
    picture = Image.new("RGB", (8, 8), "orange")
    processed = extract.image_processor(picture, return_tensors="pt")
    with torch.no_grad():
        features = extract.model(**processed).features
    torch.testing.assert_close(torch.tensor(extract(picture)), features[-1])
    pooled = torch.cat([z.mean((2, 3)) for z in features], dim=1)
    torch.testing.assert_close(extract(picture, pool=True, return_tensors=True), pooled)
    shallow = extract.model(**processed, shallow=True)
    assert shallow.last_hidden_state is shallow.features[-1]


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


def test_settings_given_to_from_pretrained_change_the_stored_ones(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    load = MDEQForImageClassification.from_pretrained
    model = load(tmp_path, solver={"max_steps": 3}, gradient="npg")
    assert model.config.solver["max_steps"] == 3 and model.config.solver["tol"] == 1e-5
    assert model.config.gradient["name"] == "npg"
    assert load(tmp_path, solver="broyden").config.solver["tol"] == 1e-5
    assert MDEQConfig.from_pretrained(tmp_path, solver={"tol": 1e-2}).solver["tol"] == 1e-2
    with pytest.raises(ValueError, match="max_step"):
        load(tmp_path, solver={"max_step": 3})


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


def test_a_picture_without_an_answer_gets_none():
    """With one NaN pixel no state is finite, and a class read from the start would be made up."""
    model = tiny_model().eval()
    pixels = pictures()
    with torch.no_grad():
        clean = model(pixels)
        pixels[1, 0, 2, 2] = float("nan")
        output = model(pixels)
    assert output.logits[1].isnan().all() and not output.converged[1]
    for row in (0, 2):
        torch.testing.assert_close(output.logits[row], clean.logits[row])


def test_backbone(tmp_path):
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    assert "out_indices" not in json.loads((tmp_path / "config.json").read_text())
    x = torch.randn(2, 3, 16, 16)
    features = model.forward_features(x)
    backbone = AutoBackbone.from_pretrained(tmp_path, out_features=["branch0", "branch1"]).eval()
    assert type(backbone) is MDEQBackbone and backbone.channels == model.config.channels
    output = backbone(x)
    assert len(output.feature_maps) == 2 and output.hidden_states is None
    for found, wanted in zip(output.feature_maps, features, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(output.n_steps, model(x).n_steps)
    # The coarsest alone by default, as other backbones have it; a choice is stored.
    assert AutoBackbone.from_pretrained(tmp_path).out_features == ["branch1"]
    backbone.out_indices = [0]
    backbone.save_pretrained(tmp_path / "finest")
    again = AutoBackbone.from_pretrained(tmp_path / "finest")
    (only,) = again(x).feature_maps
    assert torch.equal(only, features[0])
    with pytest.raises(ValueError, match="branch7"):
        AutoBackbone.from_pretrained(tmp_path, out_features=["branch7"])


def test_the_newest_of_two_saves_is_loaded(tmp_path):
    """In shards after in one file, and the other way round."""
    model = tiny_model()
    for number, size in enumerate(("20KB", "1GB", "20KB")):
        with torch.no_grad():
            model.classifier.bias.fill_(number)
        model.save_pretrained(tmp_path, max_shard_size="1GB" if number == 0 else size)
        model.save_pretrained(tmp_path, max_shard_size=size)
        loaded = MDEQForImageClassification.from_pretrained(tmp_path)
        assert (loaded.classifier.bias == number).all()
        for file in tmp_path.glob("*.json"):
            os.utime(file, (2e9, 2e9))  # clocks of shares differ
        stems = {file.name for file in tmp_path.glob("model*.safetensors*")}
        assert ("model.safetensors" in stems) != ("model.safetensors.index.json" in stems)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ("broyden", ("broyden", MDEQConfig.default_solver["max_steps"])),
        ({"max_steps": 7}, (MDEQConfig.default_solver["name"], 7)),
        (Anderson(max_steps=9), ("anderson", 9)),
    ],
)
def test_settings_assigned_to_the_config_are_completed(settings, wanted, tmp_path):
    model = tiny_model()
    model.config.solver = settings
    solver = model.resolve_solver()
    assert (solver.name, solver.max_steps) == wanted
    assert model(pictures()).n_steps.max() <= solver.max_steps
    model.save_pretrained(tmp_path)
    assert MDEQConfig.from_pretrained(tmp_path).solver == solver.to_dict()


def test_labels_of_several_kinds_may_be_whole_numbers():
    model = tiny_model()
    model.config.problem_type = "multi_label_classification"
    labels = torch.tensor([[0, 1, 0, 0, 1]] * 3)
    losses = [model(pictures(), labels=labels.to(kind)).loss for kind in (int, bool, float)]
    assert losses[0] == losses[1] == losses[2]


def test_masks_for_other_branches_are_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="dropout_masks must hold"):
        model(pictures(), dropout_masks=((torch.ones(3, 1, 1, 1),),))


def test_a_name_may_be_a_path():
    config = MDEQConfig.from_pretrained(Path("mdeq-tiny-cifar-upg"))
    assert config.num_labels == 10
