"""The LoRA example, a few steps for a small model of each family."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from deqzoo import DEQModel
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification

pytest.importorskip("peft")
EXAMPLE = Path(__file__).parents[1] / "examples" / "lora.py"


def stored(family: str, folder: Path) -> str:
    torch.manual_seed(0)
    if family == "text":
        words = ["<eos>", "the", "<unk>", ",", ".", "of", "a", "model"]
        config = DEQTransformerConfig(
            vocab_size=len(words), d_model=16, d_embed=16, n_head=2, d_inner=16, tgt_len=8,
            initializer_range=0.1,
        )  # fmt: skip
        DEQTransformerForCausalLM(config).save_pretrained(folder)
        build_tokenizer(words, "wikitext").save_pretrained(folder)
    else:
        config = IGNNConfig(num_features=3, hidden_sizes=[16], num_labels=2, skip_connections=True)
        IGNNForGraphClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["images", "text", "graphs"])
def test_lora_learns_and_merges(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("lora", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = "mdeq-tiny-cifar-upg" if family == "images" else stored(family, tmp_path / "model")
    arguments = ["--model", model, "--output", str(tmp_path / "out"), "--lr", "0.02"]
    before, after = example.main([*arguments, "--steps", "10"])
    assert after < before
    assert f"held-out loss {after:.3f} merged" in capsys.readouterr().out
    assert DEQModel.from_pretrained(tmp_path / "out").config.model_type


def test_a_mistake_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["lora.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lora.py: ") and "no config.json" in line
