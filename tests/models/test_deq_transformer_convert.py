"""Official checkpoints through the converter: same losses afterwards, old keys, clear errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deqzoo import DEQModel
from deqzoo.errors import UserError
from deqzoo.models.deq_transformer.convert_deq_transformer import (
    convert,
    convert_state_dict,
    read_config,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "deq_transformer"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def official(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["golden", "safetensors", "pickle"])
def test_same_losses(tmp_path: Path, name: str, form: str) -> None:
    source = GOLDEN / f"{name}.safetensors"
    if form == "safetensors":
        source = tmp_path / "model.safetensors"
        save_file({f"module.{k}": v.clone() for k, v in official(name).items()}, source)
    elif form == "pickle":
        source = tmp_path / "model.pt"
        torch.save({"state_dict": official(name)}, source)
    convert(source, GOLDEN / f"{name}.json", tmp_path / "out")
    model = DEQModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float64
    info = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    solver = {"tol": 1e-13, "max_steps": 300} if model.config.has_equilibrium else None
    with torch.no_grad():
        output = model(
            tensors["seg0.input_ids"], labels=tensors["seg0.targets"], shift=False, solver=solver
        )
    tolerance = info["tolerances"]["nll_abs"]
    torch.testing.assert_close(output.nll, tensors["seg0.nll"], rtol=0, atol=tolerance)


def test_legacy_keys() -> None:
    """Before v2: projections without `.weight`, convolutions, and the block four times over."""
    modern = official("post_adaptive")
    legacy = {}
    for key, value in modern.items():
        if "_projs." in key:
            key = key.removesuffix(".weight")
        if "pos_ff" in key and key.endswith(("weight_g", "weight_v")):
            value = value.unsqueeze(-1)
        legacy[key] = value
        if key.startswith("func."):
            legacy[f"deq.{key}"] = value
            derived = key.replace("func.", "func_copy.", 1).replace("weight_v", "weight")
            legacy[derived] = legacy[f"deq.{derived}"] = torch.full_like(value, 7.0)
    config = read_config(GOLDEN / "post_adaptive.json")
    expected, found = convert_state_dict(modern, config), convert_state_dict(legacy, config)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_presets_are_configs() -> None:
    assert read_config("deq-transformer-wikitext103-pre").d_inner == 48000


def test_errors_are_one_line(tmp_path: Path) -> None:
    golden, config = GOLDEN / "post_adaptive.safetensors", GOLDEN / "post_adaptive.json"
    settings = json.loads(config.read_text())["config"]

    def written(**changes: object) -> Path:
        path = tmp_path / f"{next(iter(changes))}.json"
        path.write_text(json.dumps(settings | changes))
        return path

    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "whole.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    untied = official("post_adaptive")
    untied["crit.out_layers.1.weight"] = untied["crit.out_layers.1.weight"] + 1
    save_file(untied, tmp_path / "untied.safetensors")
    lacking = {k: v for k, v in official("post_adaptive").items() if "o_net" not in k}
    save_file(lacking, tmp_path / "lacking.safetensors")
    cases = [
        (tmp_path / "missing", config, "no checkpoint file"),
        (tmp_path / "broken.pt", config, "damaged"),
        (tmp_path / "whole.pt", config, "more than tensors"),
        (tmp_path / "numbers.pt", config, "no state dict"),
        (tmp_path / "untied.safetensors", config, "differ"),
        (tmp_path / "lacking.safetensors", config, "lacks"),
        (golden, "nothing", "neither a JSON file nor a preset"),
        (golden, tmp_path / "broken.json", "not a JSON object"),
        (golden, written(variant="gpt"), "variant 'gpt'"),
        (golden, written(colour="red"), "colour"),
        (golden, written(d_head=9), "d_head"),
        (golden, written(cutoffs=[50, 20]), "cutoffs"),
        (golden, written(d_inner=64), "does not fit"),
    ]
    for source, chosen, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            convert(source, chosen, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="name a folder"):
        convert(golden, config, tmp_path / "broken.pt")
