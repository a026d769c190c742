"""The fine-tuning example, on a tiny model."""

import importlib.util
from pathlib import Path

import pytest
import torch

from deqzoo import DEQModel
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import build_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_text.py"


def test_finetuning_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = importlib.util.spec_from_file_location("finetune_text", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    words = ["<eos>", "the", "<unk>", ",", ".", "dog", "cat", "saw"]
    config = DEQTransformerConfig(
        vocab_size=len(words), d_model=16, d_embed=16, n_head=2, d_inner=16, tgt_len=8,
        initializer_range=0.1,
    )  # fmt: skip
    DEQTransformerForCausalLM(config).save_pretrained(tmp_path / "model")
    build_tokenizer(words, "wikitext").save_pretrained(tmp_path / "model")
    text = tmp_path / "notes.txt"
    text.write_text("the dog saw the cat, the bird.\n" * 40)
    arguments = [str(text), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    before, after = example.main([*arguments, "--lr", "0.02"])
    assert after < 0.7 * before
    assert DEQModel.from_pretrained(tmp_path / "out").config.vocab_size == len(words)
