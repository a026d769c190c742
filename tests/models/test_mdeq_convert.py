"""Official state dicts of every source become folders with the same logits, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import deqzoo  # noqa: F401  (registers the classes)
from deqzoo.errors import UserError
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.convert_mdeq import (
    build_model,
    convert,
    deqzoo_to_official,
    official_to_deqzoo,
)
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification
from deqzoo.models.mdeq.presets_mdeq import PRESETS

GOLDEN = Path(__file__).parents[1] / "golden" / "mdeq"
NAMES = ("two_branch_small", "cifar_tiny", "four_branch_imagenet_style", "phantom_gradient")
SOLVER = {"name": "anderson", "max_steps": 40, "tol": 1e-10}


def official(name: str) -> dict[str, torch.Tensor]:
    values = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix("sd."): v for k, v in values.items() if k.startswith("sd.")}


def golden_input(name: str) -> torch.Tensor:
    return load_file(GOLDEN / f"{name}.safetensors")["input"]


def shallow_logits(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folder)(pixels, shallow=True).logits


@pytest.mark.parametrize("name", NAMES)
def test_golden_state_dicts(name, tmp_path):
    source = tmp_path / "weights.safetensors"
    save_file(official(name), source)
    folder = convert(source, GOLDEN / f"{name}.json", tmp_path / "out")
    values = load_file(GOLDEN / f"{name}.safetensors")
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.dtype == torch.float64  # the source's dtype
    logits = shallow_logits(folder, values["input"])
    if "logits_unroll" in values:
        error = (logits - values["logits_unroll"]).norm() / values["logits_unroll"].norm()
        assert error < 1e-8
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.crop_size["height"] == model.config.image_size


def rename(state_dict, function):
    return {function(k): v for k, v in state_dict.items()}


def as_phantom(state_dict):
    """phantom_grad registers the map twice; its ImageNet checkpoints are wrapped and prefixed."""
    copies = {
        k.replace("fullstage.", "deq.func."): v
        for k, v in state_dict.items()
        if k.startswith("fullstage.")
    }
    prefixed = rename(state_dict | copies, lambda k: f"module.{k}")
    return {"state_dict": prefixed, "epoch": 3, "optimizer": {"lr": 0.1, "state": [1, 2]}}


def as_torchdeq(state_dict):
    return rename(state_dict, lambda k: k.replace("fullstage.", "full_stage."))


def as_old(state_dict):
    """Copies with plain, stale weights."""
    stale = {}
    for k in state_dict:
        if k.startswith("fullstage."):
            bare = k.removeprefix("fullstage.").replace("weight_v", "weight")
            for prefix in ("fullstage_copy.", "deq.func.", "deq.func_copy."):
                stale[prefix + bare] = torch.zeros(1)
    return state_dict | stale


@pytest.mark.parametrize("layout", (as_phantom, as_torchdeq, as_old))
def test_every_layout_gives_the_same_model(layout, tmp_path):
    name = "two_branch_small"
    source = tmp_path / "checkpoint.pth.tar"
    torch.save(layout(official(name)), source)
    folder = convert(source, GOLDEN / f"{name}.json", tmp_path / "out")
    expected = load_file(GOLDEN / f"{name}.safetensors")["logits_unroll"]
    torch.testing.assert_close(shallow_logits(folder, golden_input(name)), expected)


def fold(state_dict, pattern: str):
    """Replace weight-normalised pairs whose name holds `pattern` by the plain weight."""
    result = dict(state_dict)
    for key in state_dict:
        if key.endswith(".weight_v") and pattern in key:
            stem = key.removesuffix("_v")
            v, g = result.pop(key), result.pop(stem + "_g")
            result[stem] = v * (g / torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True))
    return result


def unfold(state_dict, pattern: str):
    """The opposite: plain weights become pairs."""
    result = dict(state_dict)
    for key in state_dict:
        if key.endswith("conv.weight") and pattern in key:
            v = result.pop(key)
            result[key + "_v"] = v
            result[key + "_g"] = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    return result


@pytest.mark.parametrize(
    ("change", "scope"),
    [
        (lambda sd: fold(sd, "post_fuse_layers"), "block"),
        (lambda sd: fold(sd, "fullstage"), "none"),
        (lambda sd: unfold(sd, "fuse_layers"), "all"),
        (dict, "block_post"),
    ],
)
def test_weight_norm_is_decided_by_the_keys(change, scope, tmp_path):
    name = "four_branch_imagenet_style"
    source = tmp_path / "weights.pt"
    torch.save(change(official(name)), source)
    folder = convert(source, GOLDEN / f"{name}.json", tmp_path / "out")
    assert MDEQConfig.from_pretrained(folder).weight_norm == scope
    expected = load_file(GOLDEN / f"{name}.safetensors")["logits_unroll"]
    torch.testing.assert_close(shallow_logits(folder, golden_input(name)), expected)


def test_stage0_and_affine_norms_are_decided_by_the_keys():
    name = "two_branch_small"
    state_dict = official(name)
    width = state_dict["downsample.0.weight"].shape[0]
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    settings = {k: settings[k] for k in ("channels", "head_channels", "final_channels")} | {
        "expansion": 3,
        "num_groups": settings["num_groups"],
        "image_size": 16,
        "num_labels": 10,
    }
    state_dict["stage0.0.weight"] = torch.eye(width).reshape(width, width, 1, 1).double()
    for key, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
        state_dict[f"stage0.1.{key}"] = torch.full((width,), value).double()
    model = build_model(state_dict, settings)
    assert model.config.injection_transform
    without = {k: v for k, v in state_dict.items() if ".gn" not in k}
    assert not build_model(without, settings).config.affine_block


SMALL_PRESETS = [n for n in PRESETS if "imagenet" not in n or "small" in n]  # same keys, less time


@pytest.mark.parametrize("name", SMALL_PRESETS)
def test_every_preset_reads_its_own_checkpoint(name, tmp_path):
    """A state dict with the official names of a preset loads by the preset's name."""
    source = tmp_path / "weights.pt"
    model = MDEQForImageClassification(MDEQConfig.from_preset(name))
    torch.save(official_names(model), source)
    folder = convert(source, name, tmp_path / "out")
    config = MDEQConfig.from_pretrained(folder)
    for field in ("channels", "weight_norm", "affine_post", "injection_transform", "num_labels"):
        assert getattr(config, field) == getattr(model.config, field), field
    loaded = load_file(folder / "model.safetensors")
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())


def official_names(model) -> dict[str, torch.Tensor]:
    """The names of locuslab/deq, written independently of the converter."""
    result = {}
    for key, value in model.state_dict().items():
        part = key.split(".")
        match part:
            case ["mdeq", "stem", kind, i, leaf]:
                k, norm = int(i), kind == "norms"
                name = f"downsample.{3 * k + norm}" if k < 2 else f"downsample.DS{k + 1}"
                result[f"{name}{'-BN' if norm and k > 1 else ''}.{leaf}"] = value
            case ["mdeq", "injection", kind, leaf]:
                result[f"stage0.{int(kind == 'norm')}.{leaf}"] = value
            case ["mdeq", "transformation", "branches", i, b, module, leaf]:
                stem = f"fullstage.branches.{i}.blocks.{b}.{module.replace('norm', 'gn')}"
                result[f"{stem}.{weight_norm_leaf(leaf)}"] = value
            case ["mdeq", "transformation", "fuse", i, j, "stages", k, module, leaf]:
                stage = "" if int(j) > int(i) else f".{k}"
                stem = f"fullstage.fuse_layers.{i}.{j}.net{stage}"
                result[f"{stem}.{module.replace('norm', 'gnorm')}.{weight_norm_leaf(leaf)}"] = value
            case ["mdeq", "transformation", "post", i, module, leaf]:
                stem = f"fullstage.post_fuse_layers.{i}.{module.replace('norm', 'gnorm')}"
                result[f"{stem}.{weight_norm_leaf(leaf)}"] = value
            case ["head", "bottlenecks", i, "shortcut", kind, leaf]:
                result[f"incre_modules.{i}.0.downsample.{int(kind == 'norm')}.{leaf}"] = value
            case ["head", "bottlenecks", i, module, leaf]:
                result[f"incre_modules.{i}.0.{module.replace('norm', 'bn')}.{leaf}"] = value
            case ["head", "downsamples", i, kind, leaf]:
                result[f"downsamp_modules.{i}.{int(kind == 'norm')}.{leaf}"] = value
            case ["head", "final", kind, leaf]:
                result[f"final_layer.{int(kind == 'norm')}.{leaf}"] = value
            case _:
                result[key] = value
    return result


def weight_norm_leaf(leaf: str) -> str:
    return {"magnitude": "weight_g", "direction": "weight_v"}.get(leaf, leaf)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_the_sources_dtype_is_kept(dtype, tmp_path):
    name = "two_branch_small"
    source = tmp_path / "weights.pt"
    state_dict = official(name)
    torch.save(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}, source
    )
    folder = convert(source, GOLDEN / f"{name}.json", tmp_path / "out")
    assert load_file(folder / "model.safetensors")["classifier.weight"].dtype == dtype
    assert AutoModelForImageClassification.from_pretrained(folder).dtype == dtype


def test_counters_may_be_missing(tmp_path):
    name = "two_branch_small"
    source = tmp_path / "weights.pt"
    torch.save({k: v for k, v in official(name).items() if "num_batches" not in k}, source)
    convert(source, GOLDEN / f"{name}.json", tmp_path / "out")


# Errors


def test_wrong_keys_are_listed_in_one_error(tmp_path):
    name = "two_branch_small"
    state_dict = official(name)
    del state_dict["classifier.bias"], state_dict["fullstage.branches.0.blocks.0.gn1.weight"]
    state_dict["classifier.weight"] = torch.zeros(3, 4)
    state_dict["last_layer.0.weight"] = torch.zeros(2)
    source = tmp_path / "weights.pt"
    torch.save(state_dict, source)
    with pytest.raises(UserError) as caught:
        convert(source, GOLDEN / f"{name}.json", tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "1 unknown: last_layer.0.weight",
        "2 missing: classifier.bias, fullstage.branches.0.blocks.0.gn1.weight",
        "1 misshapen: classifier.weight is (3, 4), expected (10, 24)",
    ):
        assert part in message
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="and 97 more") as caught:
        convert(source, "mdeq-phantom-cifar-large", tmp_path / "out")
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("name", SMALL_PRESETS)
def test_names_go_both_ways(name):
    with torch.device("meta"):
        model = MDEQForImageClassification(MDEQConfig.from_preset(name))
    for ours, theirs in zip(model.state_dict(), official_names(model), strict=True):
        assert official_to_deqzoo(theirs) == ours and deqzoo_to_official(ours) == theirs


def test_bad_configurations(tmp_path):
    source = tmp_path / "weights.safetensors"
    save_file(official("two_branch_small"), source)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="mdeq-cifar-tiny"):
        convert(source, "mdeq-cifar-tinny", out)
    bad = tmp_path / "config.json"
    bad.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        convert(source, bad, out)
    bad.write_text('{"channels": [8, 16]}')
    with pytest.raises(UserError, match="lacks the settings head_channels"):
        convert(source, bad, out)
    settings = json.loads((GOLDEN / "two_branch_small.json").read_text())
    bad.write_text(json.dumps(settings | {"num_groups": 5}))
    with pytest.raises(UserError, match="num_groups=5"):
        convert(source, bad, out)
    bad.write_text(json.dumps(settings | {"num_groups": "many"}))
    with pytest.raises(UserError, match="num_groups"):
        convert(source, bad, out)
    out.write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        convert(source, GOLDEN / "two_branch_small.json", out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": 10.5}, "num_classes"),
        ({"channels": [24, 10**9]}, "not valid|misshapen"),
        ({"final_channels": 10**12}, "misshapen|not valid"),
        ({"chanels": 3}, "misshapen|missing"),
    ],
    ids=str,
)
def test_settings_that_no_checkpoint_has(tmp_path, change, said):
    source = tmp_path / "weights.safetensors"
    save_file(official("two_branch_small"), source)
    settings = json.loads((GOLDEN / "two_branch_small.json").read_text())
    if "chanels" in change:
        settings["chanels"] = settings.pop("channels")
        change, said = {}, "did you mean 'channels'"
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=said) as caught:
        convert(source, tmp_path / "config.json", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_both_spellings_of_a_key_are_refused(tmp_path):
    source = tmp_path / "weights.safetensors"
    tensors = official("two_branch_small")
    key = next(key for key in tensors if key.startswith("fullstage."))
    tensors[key.replace("fullstage.", "full_stage.")] = tensors[key].clone()
    save_file(tensors, source)
    with pytest.raises(UserError, match="twice"):
        convert(source, GOLDEN / "two_branch_small.json", tmp_path / "out")
