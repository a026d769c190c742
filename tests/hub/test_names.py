"""The zoo's names where transformers takes a name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import deqzoo
from deqzoo.cli import run
from deqzoo.zoo import WITHDRAWN, bundled_source, list_models

PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "chelsea.png"
IMAGES = "mdeq-tiny-cifar-upg"


@pytest.mark.parametrize("name", [IMAGES, f"deqzoo/{IMAGES}"])
def test_a_pipeline_needs_the_name_only(name: str) -> None:
    classifier = pipeline(model=name)
    assert type(classifier.model) is deqzoo.MDEQForImageClassification
    assert len(classifier(str(PICTURE), top_k=3)) == 3


@pytest.mark.parametrize(
    "loader",
    [AutoImageProcessor, deqzoo.MDEQImageProcessor, AutoConfig, deqzoo.MDEQConfig, AutoModel,
     deqzoo.MDEQModel, deqzoo.MDEQForImageClassification],
)  # fmt: skip
def test_classes_know_the_names(loader: type) -> None:
    assert type(loader.from_pretrained(IMAGES)).__name__.startswith("MDEQ")
    assert loader.from_pretrained(pretrained_model_name_or_path=IMAGES)


def test_tokenizers_and_text_pipelines() -> None:
    name = next((n for n in list_models() if n.startswith("deq-transformer-ptb")), None)
    if name is None:
        pytest.skip("not in this wheel")
    assert AutoTokenizer.from_pretrained(name)("the cat")["input_ids"]
    writer = pipeline("text-generation", model=name)
    assert writer("the company", max_new_tokens=2)[0]["generated_text"].startswith("the")


#: Ends where a host is asked for while pipelines are made of a model's name alone.
_ASKED = """
import socket, sys

def no_network(host, *args, **kwargs):
    sys.exit(f"{host} was asked for")

socket.getaddrinfo = no_network
import deqzoo
from transformers import AutoProcessor, pipeline

for given in sys.argv[1:]:
    task, name = given.split(":")
    pipeline(task or None, model=name)
    assert AutoProcessor.from_pretrained(name)
"""


def test_no_loader_asks_the_hub_about_a_bundled_name() -> None:
    text = next((n for n in list_models() if n.startswith("deq-transformer-ptb")), None)
    tasks = [f":{IMAGES}", f"image-feature-extraction:deqzoo/{IMAGES}"]
    if text is not None:
        tasks += [f"text-generation:{text}", f"feature-extraction:{text}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _ASKED, *tasks], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_verify_without_a_network_is_told_in_words(monkeypatch, capsys) -> None:
    def unreachable(*arguments, **keywords):
        raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known")

    monkeypatch.setattr("deqzoo.hub.verify.snapshot_download", unreachable)
    assert run(["verify", "nobody/nothing"]) == 2
    error = capsys.readouterr().err
    assert "the Hub cannot be reached" in error and "Errno" not in error


def test_a_folder_and_a_revision_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled_source(IMAGES) != IMAGES
    assert bundled_source(IMAGES, "v1") == IMAGES
    assert bundled_source("resnet-50") == "resnet-50"
    monkeypatch.chdir(tmp_path)
    asked = []

    def fetched(name, repository, hub):
        asked.append((repository, hub["revision"]))
        raise deqzoo.UserError("no such revision")

    monkeypatch.setattr("deqzoo.models.auto._fetch_config", fetched)
    monkeypatch.setattr(
        "deqzoo.hub.verify.snapshot_download",
        lambda repository, revision: fetched("", repository, {"revision": revision}),
    )
    for options in ({}, {"subfolder": "inner"}):
        with pytest.raises(deqzoo.UserError, match="no such revision"):
            deqzoo.DEQModel.from_pretrained(IMAGES, revision="v1", **options)
    assert run(["verify", IMAGES, "--revision", "v1"]) == 2
    assert asked == [(f"deqzoo/{IMAGES}", "v1")] * 3
    (tmp_path / IMAGES).mkdir()
    assert bundled_source(IMAGES) == IMAGES


@pytest.mark.parametrize("name", WITHDRAWN)
def test_withdrawn_names_say_what_to_use(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instead, _ = WITHDRAWN[name]
    said = f"{name} is withdrawn: use {instead} "
    assert name not in list_models() and name not in list_models(f"{name}*")
    for given in (name, f"deqzoo/{name}"):
        for command in ("info", "list", "verify"):
            assert run([command, given]) == 2
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1
        for load in (deqzoo.DEQModel, AutoConfig, AutoTokenizer, AutoModel):
            with pytest.raises(deqzoo.UserError, match=said):
                load.from_pretrained(given)
    assert bundled_source(name, "v0.1.0") == name  # the Hub keeps what was published
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert bundled_source(name) == name
    capsys.readouterr()
    assert run(["list", "*no-such-name*"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "No such checkpoint" in printed.err  # nothing for a pipe to count


def test_what_replaces_a_withdrawn_name_is_there() -> None:
    found = list_models()
    if "mdeq-cifar-upg" not in found:
        pytest.skip("a wheel has small checkpoints only")
    assert {instead for instead, _ in WITHDRAWN.values()} <= set(found) - set(WITHDRAWN)


def test_names_by_pattern_and_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_models("mdeq*") == list_models(task="image classification") != []
    assert list_models("mdeq*") == list_models(task="image") == list_models("mdeq")
    assert list_models("tiny") == list_models("*tiny*") != []
    assert set(list_models("ignn*")) <= set(list_models()) - set(list_models("mdeq*"))
    assert list_models("mdeq*", task="node") == []
    with pytest.raises(deqzoo.UserError, match="image classification"):
        list_models(task="chess")
    assert run(["list", "*tiny*", "--task", "image"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_models("*tiny*")


def test_features_as_timm_names_them() -> None:
    model = deqzoo.MDEQForImageClassification.from_pretrained(IMAGES).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, 32, 32))
    assert [f.shape[1] for f in features] == model.config.channels
