"""What `deqzoo list` and `deqzoo info` read from a checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deqzoo
from deqzoo.cli import run
from deqzoo.hub.catalogue import count_parameters, entry


@pytest.mark.parametrize("norm", ["none", "spectral"])
def test_spectral_norms_buffers_are_no_parameters(tmp_path: Path, norm: str) -> None:
    config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[8], weight_norm=norm)
    model = deqzoo.IGNNForGraphClassification(config)
    model.save_pretrained(tmp_path)
    assert entry(str(tmp_path)).parameters == model.num_parameters()


def test_damaged_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(deqzoo.UserError, match="no sound safetensors"):
        count_parameters(tmp_path / "model.safetensors")


def test_info_refuses_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"model_type": "bert", "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert run(["info", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert "'bert'" in printed.err and "mdeq, deq_transformer, ignn" in printed.err
