"""`DEQModel.from_pretrained`: names, dtypes, damaged files, and the Auto classes."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import deqzoo
from deqzoo import DEQModel, UserError

PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "chelsea.png"


@pytest.fixture
def folder(tiny_mdeq: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_mdeq, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("name", ["mdeq-test", "deqzoo/mdeq-test"])
def test_zoo_names(zoo: Path, name: str) -> None:
    model = DEQModel.from_pretrained(name)
    assert type(model) is deqzoo.MDEQForImageClassification and not model.training
    assert model.config._name_or_path == str((zoo / "mdeq-test").resolve())
    assert AutoImageProcessor.from_pretrained(model.config._name_or_path).size
    assert model.config.id2label[3] == "cat"


def test_class_by_architecture(folder: Path, tmp_path: Path) -> None:
    assert type(DEQModel.from_pretrained(folder)) is deqzoo.MDEQForImageClassification
    DEQModel.from_pretrained(folder).mdeq.save_pretrained(tmp_path / "base")
    assert type(DEQModel.from_pretrained(tmp_path / "base")) is deqzoo.MDEQModel


def test_a_model_in_a_subfolder(tiny_mdeq: Path, tmp_path: Path) -> None:
    inner = Path(shutil.copytree(tiny_mdeq, tmp_path / "outer" / "inner"))
    found = DEQModel.from_pretrained(tmp_path / "outer", subfolder="inner")
    assert type(found) is deqzoo.MDEQForImageClassification
    with pytest.raises(UserError, match="has no subfolder other"):
        DEQModel.from_pretrained(tmp_path / "outer", subfolder="other")
    (inner / "SHA256SUMS").write_text("0" * 64 + "  model.safetensors\n")
    for loader in (DEQModel, AutoModelForImageClassification):
        with pytest.raises(UserError, match="is not as SHA256SUMS"):
            loader.from_pretrained(tmp_path / "outer", subfolder="inner")


def test_auto_classes_load_a_folder(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is deqzoo.MDEQConfig
    assert type(AutoModel.from_pretrained(folder)) is deqzoo.MDEQModel
    assert (
        type(AutoModelForImageClassification.from_pretrained(folder))
        is deqzoo.MDEQForImageClassification
    )
    assert type(AutoImageProcessor.from_pretrained(folder)) is deqzoo.MDEQImageProcessor


def test_registration_can_be_repeated(folder: Path) -> None:
    from deqzoo.models.registration import install

    install()
    assert type(AutoModel.from_pretrained(folder)) is deqzoo.MDEQModel


def test_half_precision_storage_computes_in_float32(folder: Path) -> None:
    weights = {
        key: value.half() if value.is_floating_point() else value
        for key, value in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, dtype="float32")
    classifier = pipeline("image-classification", model=str(folder))
    for model in (
        DEQModel.from_pretrained(folder),
        AutoModelForImageClassification.from_pretrained(folder),
        AutoModel.from_pretrained(folder),
        classifier.model,
    ):
        assert model.dtype == torch.float32
    assert len(classifier(str(PICTURE), top_k=10)) == 10
    assert DEQModel.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_keywords_reach_the_class(folder: Path) -> None:
    model = DEQModel.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 3


def fails(*arguments: object, **keywords: object) -> str:
    with pytest.raises(UserError) as caught:
        DEQModel.from_pretrained(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_settings_of_a_call_are_checked_like_stored_ones(folder: Path, tmp_path: Path) -> None:
    """transformers sets them one by one, on a configuration that it has checked before."""
    assert DEQModel.from_pretrained(folder, dropout=0.5).config.dropout == 0.5
    assert "dropout=1.5 must be in [0, 1)" in fails(folder, dropout=1.5)
    assert "one entry per branch" in fails(folder, head_channels=[2])
    with pytest.raises(StrictDataclassError, match="dropout=1.5"):
        AutoModelForImageClassification.from_pretrained(folder, dropout=1.5)
    deqzoo.IGNNConfig().save_pretrained(tmp_path / "graphs")
    with pytest.raises(StrictDataclassError, match="kappa=3"):  # no equilibrium would be certain
        AutoConfig.from_pretrained(tmp_path / "graphs", kappa=3)


def test_a_revision_of_a_bundled_name_is_asked_of_the_hub(zoo: Path) -> None:
    assert "of revision 'v1': the Hub cannot be reached" in fails("mdeq-test", revision="v1")
    assert DEQModel.from_pretrained("mdeq-test", revision="main").config.image_size == 32
    assert DEQModel.from_pretrained(zoo / "mdeq-test", revision="v1").config.image_size == 32


def test_a_variant_of_the_weights_is_none_of_the_block(tmp_path: Path) -> None:
    config = deqzoo.DEQTransformerConfig(
        vocab_size=20, d_model=8, d_embed=8, n_head=2, d_inner=8, cutoffs=[]
    )
    deqzoo.DEQTransformerForCausalLM(config).save_pretrained(tmp_path, variant="fp16")
    for loader in (DEQModel, AutoModelForCausalLM, AutoModel):
        assert loader.from_pretrained(tmp_path, variant="fp16").config.variant == config.variant
    changed = AutoConfig.from_pretrained(tmp_path, variant="torchdeq-seq")
    assert changed.variant == "torchdeq-seq"


def test_misspelt_names_list_the_nearest_without_waiting(zoo: Path, monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert "did you mean mdeq-test?" in fails("mdeq-tst")
    assert "did you mean mdeq-test?" in fails("deqzoo/mdeq_test")
    assert "mdeq-test" in fails("org/entirely-else")
    assert "no valid repository name" in fails("a/b/c")
    assert sum(waited) == 0  # a request that is repeated waits half a minute


def test_an_unreachable_hub_is_not_waited_for(tmp_path: Path) -> None:
    script = (
        "from deqzoo import DEQModel, UserError\n"
        "import time\n"
        "waited = []\n"
        "time.sleep = waited.append\n"
        "try:\n"
        "    DEQModel.from_pretrained('org/name')\n"
        "except UserError as error:\n"
        "    print(sum(waited), 'cannot be reached' in str(error))\n"
    )
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "PATH": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    waited, reached = done.stdout.split()
    assert float(waited) < 4 and reached == "True"


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in fails(folder)
    weights.write_bytes(b"not safetensors at all")
    assert "damaged" in fails(folder)
    weights.unlink()
    assert "model.safetensors" in fails(folder)


def test_missing_tensors_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "classifier.weight" in fails(folder)


def test_other_model_types_and_broken_configs(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, model_type="bert")
    assert "'bert'" in fails(folder)
    edit_config(folder, model_type="mdeq", architectures=["IGNNModel"])
    assert "IGNNModel" in fails(folder)
    edit_config(folder, architectures=["MDEQModel"], channels=[8])
    assert "channels" in fails(folder)
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in fails(folder)
    assert "config.json" in fails(tmp_path)
    assert "is a file" in fails(folder / "config.json")


def test_no_instances() -> None:
    with pytest.raises(TypeError, match="from_pretrained"):
        DEQModel()


def test_public_names_resolve() -> None:
    logging.disable(logging.NOTSET)
    for name in deqzoo.__all__:
        assert getattr(deqzoo, name) is not None
        assert name in dir(deqzoo)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = deqzoo.nonsense


def test_other_labels_name_the_keyword_that_allows_them(tiny_mdeq: Path) -> None:
    with pytest.raises(UserError, match="ignore_mismatched_sizes=True"):
        DEQModel.from_pretrained(tiny_mdeq, num_labels=5)
    model = DEQModel.from_pretrained(tiny_mdeq, num_labels=5, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 5
