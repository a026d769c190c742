"""The largest spectral radius that training has measured: kept, and shared by processes."""

from pathlib import Path

import pytest
import torch
from torch_geometric.data import Data
from transformers import TrainingArguments

from deqzoo import DEQTrainer
from deqzoo.data.graphs import collate_graphs
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification
from deqzoo.models.ignn.projection import row_norm
from deqzoo.training import constraints


def clique(n: int) -> Data:
    """A graph whose adjacency has the spectral radius n - 1."""
    edges = (1 - torch.eye(n)).nonzero().T.contiguous()
    return Data(x=torch.randn(n, 3), edge_index=edges, y=torch.tensor([n % 2]))


def trained(folder: Path, steps: int, resume: bool = False) -> IGNNForGraphClassification:
    torch.manual_seed(0)
    config = IGNNConfig(num_features=3, hidden_sizes=[8], normalization="none", dropout=0.0)
    model = IGNNForGraphClassification(config)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=1, max_steps=steps, use_cpu=True,
        report_to="none", remove_unused_columns=False, learning_rate=0.1, save_steps=1,
        train_sampling_strategy="sequential", disable_tqdm=True,
    )  # fmt: skip
    data = [clique(n) for n in (8, 3, 4)]
    trainer = DEQTrainer(model, arguments, train_dataset=data, data_collator=collate_graphs)
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_largest_radius_survives_a_resume(tmp_path: Path) -> None:
    assert trained(tmp_path, 1).ignn.largest_radius == pytest.approx(7, abs=1e-3)
    resumed = trained(tmp_path, 2, resume=True)
    assert resumed.ignn.largest_radius == pytest.approx(7, abs=1e-3)
    assert row_norm(resumed.ignn.layers[0].state_weight) <= 0.9 / 7 + 1e-4


def test_processes_project_onto_one_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for another process that has seen a radius of 50."""
    monkeypatch.setattr(constraints.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(constraints.distributed, "all_reduce", lambda radius, op: radius.fill_(50))
    model = IGNNForGraphClassification(
        IGNNConfig(num_features=3, hidden_sizes=[8], normalization="none")
    )
    kept: dict = {}
    constraints._project(model, torch.device("cpu"), kept)
    assert model.ignn.largest_radius == 50
    assert row_norm(model.ignn.layers[0].state_weight) <= 0.9 / 50 + 1e-6
    assert kept["ProjectionCallback"]["attributes"] == {"largest_radius": 50.0}
