"""What all converters share: any family refuses the same files, with one line that says why."""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deqzoo.errors import UserError
from deqzoo.models.convert import check_settings, output_folder, read_settings, read_state_dict

TENSORS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.zeros(2)}


@pytest.mark.parametrize("wrapper", (None, "state_dict", "model_state_dict", "model"))
def test_pickles_bare_and_wrapped(wrapper, tmp_path):
    source = tmp_path / "weights.pth.tar"
    prefixed = {f"module.{key}": tensor for key, tensor in TENSORS.items()}
    counters = {"epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save({wrapper: prefixed, **counters} if wrapper else prefixed, source)
    found = read_state_dict(source)
    assert list(found) == list(TENSORS)
    assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())


def test_safetensors(tmp_path):
    source = tmp_path / "weights.safetensors"
    save_file({f"module.{key}": tensor for key, tensor in TENSORS.items()}, source)
    assert read_state_dict(source).keys() == TENSORS.keys()


@pytest.mark.parametrize("suffix", ("safetensors", "pth"))
@pytest.mark.parametrize("content", (b"", b"hello, this is text", b"\x80" * 400))
def test_damaged_files(content, suffix, tmp_path):
    source = tmp_path / f"weights.{suffix}"
    source.write_bytes(content)
    with pytest.raises(UserError, match="damaged or of another format") as caught:
        read_state_dict(source)
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)


@pytest.mark.parametrize("suffix", ("safetensors", "pth"))
def test_truncated_files(suffix, tmp_path):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(TENSORS, whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut"):
        read_state_dict(cut)


def test_files_without_a_state_dict(tmp_path):
    source = tmp_path / "weights.pth"
    mixed = {"state_dict": TENSORS | {"step": 3}}
    for content in ({"epoch": 3}, mixed, {1: torch.zeros(2)}, [torch.zeros(2)], torch.zeros(2)):
        torch.save(content, source)
        with pytest.raises(UserError, match="holds no state dict"):
            read_state_dict(source)
    for content in ({}, {"state_dict": {}}):
        torch.save(content, source)
        with pytest.raises(UserError, match="an empty state dict"):
            read_state_dict(source)
    for missing in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError, match="no checkpoint file"):
            read_state_dict(missing)


def test_compiled_and_parallel_prefixes_are_stripped(tmp_path):
    source = tmp_path / "weights.pth"
    torch.save({f"module._orig_mod.{key}": value for key, value in TENSORS.items()}, source)
    assert list(read_state_dict(source)) == list(TENSORS)
    torch.save(TENSORS | {"_orig_mod.layer.bias": torch.ones(2)}, source)
    with pytest.raises(UserError, match="layer.bias twice"):
        read_state_dict(source)


def test_one_of_several_weights_is_chosen(tmp_path):
    source = tmp_path / "weights.pth"
    average = {key: value + 1 for key, value in TENSORS.items()}
    torch.save({"model": TENSORS, "model_ema": average, "epoch": 3}, source)
    with pytest.raises(UserError, match=r"several .*--weights \(model, model_ema\)"):
        read_state_dict(source)
    for name, expected in (("model", TENSORS), ("model_ema", average)):
        found = read_state_dict(source, name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(UserError, match="no weights 'ema'; it has model, model_ema"):
        read_state_dict(source, "ema")
    torch.save(TENSORS, source)
    with pytest.raises(UserError, match="leave --weights out"):
        read_state_dict(source, "model")


def test_weights_that_are_no_finite_numbers(tmp_path):
    source = tmp_path / "weights.pth"
    for wrong, said in (
        (torch.tensor([1.0, float("nan")]), "layer.bias .*NaN"),
        (torch.tensor([1.0, float("inf")]), "layer.bias .*NaN or infinite"),
        (torch.tensor([1, 2]), "layer.bias .*int64"),
        (torch.tensor([1j, 2j]), "layer.bias .*complex64"),
    ):
        torch.save(TENSORS | {"layer.bias": wrong}, source)
        with pytest.raises(UserError, match=said):
            read_state_dict(source)
    torch.save(TENSORS | {"bn.num_batches_tracked": torch.tensor(3)}, source)
    assert len(read_state_dict(source)) == 3


def test_misspelt_settings_are_refused():
    check_settings({"kappa": 0.9, "measured": 1, "seed": 2}, ("kappa", "dropout"), "c.json")
    with pytest.raises(UserError, match="c.json: unknown setting 'dropuot'; did you mean"):
        check_settings({"kappa": 0.9, "dropuot": 1}, ("kappa", "dropout"), "c.json")


class Malicious:
    """Unpickling this calls a function of its choice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_malicious_pickle_is_refused(tmp_path):
    victim, source = tmp_path / "touched", tmp_path / "weights.pth"
    torch.save({"state_dict": TENSORS, "extra": Malicious(victim)}, source)
    with pytest.raises(UserError, match=r"more than tensors \(.* could run code"):
        read_state_dict(source)
    source.write_bytes(pickle.dumps(Malicious(victim)))
    with pytest.raises(UserError, match="another format"):
        read_state_dict(source)
    assert not victim.exists()


def test_settings_files(tmp_path):
    path = tmp_path / "config.json"
    for content, message in (
        (None, "neither a JSON file nor a preset; the presets are small, large"),
        ("{", "not a JSON object"),
        ("[1]", "no JSON object with settings$"),
        ('{"config": 3}', "no JSON object with settings under 'config'"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_settings(path, ("small", "large"))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a JSON object"):
        read_settings(path, ())
    path.write_text('{"config": {"kappa": 0.5}}')
    assert read_settings(path, ()) == {"config": {"kappa": 0.5}}


def test_output_folder(tmp_path):
    assert output_folder(str(tmp_path / "new")) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    assert output_folder(tmp_path) == tmp_path
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken is a file; name a folder"):
        output_folder(tmp_path / "taken")


@pytest.mark.parametrize("family", ("mdeq", "deq_transformer", "ignn"))
def test_every_converter_uses_these(family, tmp_path):
    convert = import_module(f"deqzoo.models.{family}.convert_{family}").convert
    source = tmp_path / "weights.pth"
    torch.save({"epoch": 3}, source)
    with pytest.raises(UserError, match="weights.pth is a file; name a folder"):
        convert(source, "config.json", source)
    with pytest.raises(UserError, match="holds no state dict"):
        convert(source, "config.json", tmp_path / "out")
    torch.save(TENSORS, source)
    with pytest.raises(UserError, match="config.json is neither a JSON file nor a preset"):
        convert(source, "config.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()
