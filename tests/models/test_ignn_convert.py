"""Conversion of official and TorchDEQ checkpoints, here made from the reference files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deqzoo import DEQModel
from deqzoo.cli import run
from deqzoo.errors import UserError
from deqzoo.models.ignn.convert_ignn import PRESETS, convert, read_config
from deqzoo.models.ignn.modeling_ignn import (
    IGNNForGraphClassification,
    IGNNForNodeClassification,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "ignn"
TIGHT = {"max_steps": 20000, "tol": 1e-13}


@pytest.fixture
def official(tmp_path):
    """Write the state dict of a reference file as a checkpoint: (path, all tensors)."""

    def write(stem, suffix=".safetensors"):
        tensors = load_file(GOLDEN / f"{stem}.safetensors")
        state = {key[3:]: value.clone() for key, value in tensors.items() if key.startswith("sd.")}
        path = tmp_path / f"{stem}{suffix}"
        if suffix == ".pt":
            torch.save({"state_dict": state}, path)
        else:
            save_file(state, path)
        return path, tensors

    return write


def raw_edges(tensors):
    """Edges of the matrix without the self loops that its normalisation added."""
    rows, columns = tensors["adj.row"], tensors["adj.col"]
    return torch.stack([rows, columns])[:, rows != columns]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_graph_classifier(official, tmp_path, suffix):
    path, tensors = official("model_graphcls", suffix)
    output = convert(path, GOLDEN / "model_graphcls.json", tmp_path / "model")
    model = DEQModel.from_pretrained(str(output))
    assert isinstance(model, IGNNForGraphClassification) and model.dtype == torch.float64
    logits = model(
        tensors["features"].T, raw_edges(tensors), batch=tensors["batch"], solver=TIGHT
    ).logits
    torch.testing.assert_close(logits.log_softmax(1), tensors["output"], rtol=0, atol=1e-9)


def test_ppi(official, tmp_path):
    """The adjacency is raw and its spectral radius measured."""
    path, tensors = official("model_ppi")
    code = run(
        ["convert", "ignn", str(path), "--config", str(GOLDEN / "model_ppi.json")]
        + ["--output", str(tmp_path / "model")]
    )
    assert code == 0
    model = DEQModel.from_pretrained(str(tmp_path / "model"))
    assert isinstance(model, IGNNForNodeClassification)
    assert model.config.problem_type == "multi_label_classification"
    edges = torch.stack([tensors["adj.row"], tensors["adj.col"]])
    output = model(tensors["features"].T, edges, edge_weight=tensors["adj.val"], solver=TIGHT)
    torch.testing.assert_close(output.logits, tensors["output"], rtol=1e-8, atol=1e-8)


def test_chains(official, tmp_path):
    path, tensors = official("model_chains")
    output = convert(path, "chains", tmp_path / "model")
    model = IGNNForNodeClassification.from_pretrained(output)
    assert model.config.directed and model.config.normalize_states
    assert not model.config.classifier_bias
    edges = raw_edges(tensors)
    logits = model(tensors["features"].T, edges, solver=TIGHT).logits
    torch.testing.assert_close(logits, tensors["output"], rtol=0, atol=1e-5)


def torchdeq_state(spectral):
    """A random checkpoint of TorchDEQ's PPI model: widths 12, 6, 6, 3 and 4 labels."""
    torch.manual_seed(0)
    widths = [5, 12, 6, 6, 3, 4]
    state = {}
    for i, (p, m) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        for name, columns in (("W", m), ("Omega_1", p), ("Omega_2", p)):
            if spectral:
                state[f"ignn.{i}.{name}_orig"] = torch.randn(m, columns) / 5
                state[f"ignn.{i}.{name}_g"] = torch.ones(m, 1)
                state[f"ignn.{i}.{name}_u"] = torch.ones(m) / m**0.5
                state[f"ignn.{i}.{name}_v"] = torch.ones(columns) / columns**0.5
            else:
                state[f"ignn.{i}.{name}"] = torch.randn(m, columns) / 5
        state[f"ignn.{i}.bias"] = torch.zeros(m, 1)
        state[f"proj.{i}.weight"] = torch.randn(m, p)
        state[f"proj.{i}.bias"] = torch.randn(m)
    return state


@pytest.mark.parametrize("spectral", [False, True])
def test_torchdeq_ppi(tmp_path, spectral):
    state = torchdeq_state(spectral)
    save_file(state, tmp_path / "source.safetensors")
    output = convert(tmp_path / "source.safetensors", "ppi-torchdeq", tmp_path / "model")
    model = IGNNForNodeClassification.from_pretrained(output)
    config = model.config
    assert config.hidden_sizes == [12, 6, 6, 3] and config.num_labels == 4
    assert config.weight_norm == ("spectral" if spectral else "none")
    name = "W_orig" if spectral else "W"
    assert torch.equal(model.ignn.layers[1].state_weight, state[f"ignn.1.{name}"])
    assert torch.equal(model.implicit_head.local_weight, state["ignn.4.Omega_2" + name[1:]])
    assert torch.equal(model.classifier.bias, state["proj.4.bias"])
    if spectral:
        assert torch.equal(model.ignn.layers[2].norms[1].left, state["ignn.2.Omega_1_u"])
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    assert model(torch.randn(3, 5), edges).logits.shape == (3, 4)


def test_published_sizes_of_torchdeq_ppi():
    from deqzoo.models.ignn.configuration_ignn import IGNNConfig

    config = IGNNConfig(
        num_features=50,
        hidden_sizes=[1024, 512, 512, 256],
        num_labels=121,
        skip_connections=True,
        implicit_head=True,
        weight_norm="spectral",
        **PRESETS["ppi-torchdeq"],
    )
    model = IGNNForNodeClassification(config)
    bias = sum([1024, 512, 512, 256, 121])  # their layers hold an unused one
    assert sum(p.numel() for p in model.parameters()) + bias == 4_664_206


def test_a_description_names_the_longest_preset(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": "IGNN ppi-torchdeq"}))
    assert read_config(config)["local_injection"] is True
    config.write_text(json.dumps({"model": "IGNN_ppi"}))
    assert "local_injection" not in read_config(config)


def test_tensors_without_a_place_are_refused(tmp_path):
    source = tmp_path / "source.safetensors"
    cases = [
        ({"bn.running_mean": torch.zeros(2)}, "ppi-torchdeq", "no place for: bn.running_mean"),
        ({}, "ppi", "ignn.0.Omega_2.*set local_injection to true"),
        ({"ignn.0.Omega_1": torch.zeros(5)}, "ppi-torchdeq", "must be a floating-point matrix"),
        ({"proj.4.weight": torch.tensor(1.0)}, "ppi-torchdeq", "must be a floating-point matrix"),
    ]
    for changes, preset, message in cases:
        save_file({**torchdeq_state(False), **changes}, source)
        with pytest.raises(UserError, match=message):
            convert(source, preset, tmp_path / "model")


def test_unusable_sources(official, tmp_path):
    path, _ = official("model_graphcls")
    config = tmp_path / "config.json"
    cases = [
        (path, "cora", "neither a JSON file nor a preset"),
        (tmp_path / "missing.pt", "ppi", "no checkpoint file"),
    ]
    for source, settings, message in cases:
        with pytest.raises(UserError, match=message):
            convert(source, settings, tmp_path / "model")
    config.write_text(json.dumps({"num_features": 7}))
    with pytest.raises(UserError, match="num_features=7, the tensors 4"):
        convert(path, config, tmp_path / "model")
    config.write_text(json.dumps({"kappa": 2.0}))
    with pytest.raises(UserError, match="kappa=2.0"):
        convert(path, config, tmp_path / "model")
    config.write_text("[1]")
    with pytest.raises(UserError, match="no JSON object"):
        read_config(config)
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no implicit layer"):
        convert(tmp_path / "other.safetensors", "ppi", tmp_path / "model")
    state = torchdeq_state(False)
    del state["ignn.2.W"]
    save_file(state, tmp_path / "partial.safetensors")
    with pytest.raises(UserError, match="lacks tensors for ignn.layers.2.state_weight"):
        convert(tmp_path / "partial.safetensors", "ppi-torchdeq", tmp_path / "model")
    torch.save(run, tmp_path / "code.pt")
    with pytest.raises(UserError, match="could run code"):
        convert(tmp_path / "code.pt", "ppi", tmp_path / "model")
