"""Golden predictions of every family, from the configuration alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import deqzoo
from deqzoo.hub.cards import snippet
from deqzoo.hub.catalogue import entry
from deqzoo.hub.integrity import check_golden, golden_prediction, write_golden
from deqzoo.hub.verify import verify_model


def tiny_text() -> PreTrainedModel:
    config = deqzoo.DEQTransformerConfig(
        vocab_size=50, d_model=16, d_embed=16, n_head=2, d_inner=32, local_size=8, mem_len=8
    )
    return deqzoo.DEQTransformerForCausalLM(config)


def tiny_graph() -> PreTrainedModel:
    config = deqzoo.IGNNConfig(num_features=3, hidden_sizes=[8], num_labels=2)
    return deqzoo.IGNNForGraphClassification(config)


@pytest.mark.parametrize("build", [tiny_text, tiny_graph])
def test_golden_predictions_tell_weights_apart(build, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    assert all(math.isfinite(number) for number in golden_prediction(model)["logits"])
    write_golden(tmp_path, model)
    assert check_golden(tmp_path, model) == []
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert check_golden(tmp_path, other)


def test_snippet_of_a_graph_model_runs(tmp_path: Path) -> None:
    folder = tmp_path / "ignn-test"
    tiny_graph().save_pretrained(folder)
    assert "ignn-test" in snippet(entry(str(folder)))
    assert not [fault for fault in verify_model(str(folder)) if "example" in fault]
