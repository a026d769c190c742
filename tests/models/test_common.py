"""What every registered model class must do; a new class is tested by being registered."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from deqzoo import DEQModel, UserError
from deqzoo.hub.catalogue import entry
from deqzoo.models.auto import CLASSES, load_class

TINY = {
    "MDEQ": {
        "channels": [8, 8],
        "head_channels": [2, 4],
        "final_channels": 16,
        "expansion": 1,
        "num_groups": 4,
        "num_labels": 5,
    },
    "DEQTransformer": {
        "vocab_size": 40,
        "d_model": 16,
        "d_embed": 16,
        "n_head": 2,
        "d_inner": 32,
        "cutoffs": [10],
        "div_val": 2,
        "local_size": 8,
        "mem_len": 8,
    },
    "IGNN": {"num_features": 3, "hidden_sizes": [16, 16], "num_labels": 2},
}
MODELS = [name for name in CLASSES if not name.endswith(("Config", "Processor"))]


def family(name: str) -> str:
    return next(prefix for prefix in TINY if name.startswith(prefix))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    config = load_class(f"{family(request.param)}Config")(**TINY[family(request.param)])
    return load_class(request.param)(config).eval()


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two samples."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.randint(0, 40, (2, 12), generator=generator)}
    ring = torch.arange(5)
    edges = torch.stack([ring, ring.roll(-1)])
    edges = torch.cat([edges, edges.flip(0)], dim=1)
    return {
        "x": torch.randn(10, 3, generator=generator),
        "edge_index": torch.cat([edges, edges + 5], dim=1),
        "batch": torch.arange(2).repeat_interleave(5),
    }


def tensors_of(output: object) -> dict[str, Tensor]:
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


@torch.no_grad()
def test_reports_have_one_entry_per_sample(model: PreTrainedModel) -> None:
    output = model(**inputs(model))
    for name in ("n_steps", "residual", "converged"):
        assert getattr(output, name).shape == (2,), name
    assert output.converged.dtype == torch.bool
    assert all(value.ndim > 0 for value in tensors_of(output).values())


@torch.no_grad()
@pytest.mark.parametrize("shard", ["50GB", "1KB"])
def test_loading_repeats_the_outputs(model: PreTrainedModel, tmp_path: Path, shard: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "1KB")
    loaded = DEQModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    expected, found = tensors_of(model(**inputs(model))), tensors_of(loaded(**inputs(model)))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, equal_nan=True)


def test_buffers_and_attributes_survive_loading(model: PreTrainedModel, tmp_path: Path) -> None:
    """Loading builds on the meta device: unsaved buffers and plain tensors would be lost."""
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    for module in loaded.modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
        assert not plain, f"{type(module).__name__} keeps plain tensors {plain}"
    assert not [n for n, p in loaded.named_parameters() if p.is_meta]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody initialised reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_partial_checkpoints_leave_no_garbage(
    model: PreTrainedModel, tmp_path: Path, poisoned_memory: None, part: int
) -> None:
    """Raw parameters, and weight-normalised ones of which a half is missing, are initialised."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for i, (key, value) in enumerate(sorted(weights.items())) if i % 3 == part}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    bound = 10 * max(1.0, *(p.abs().max().item() for p in model.parameters()))
    for name, value in loaded.state_dict().items():
        assert value.isfinite().all() and value.abs().max() <= bound, name
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in kept.items())


def test_configs_keep_every_setting(model: PreTrainedModel, tmp_path: Path) -> None:
    model.set_solver("broyden", max_steps=7, tol=0.02)
    model.set_gradient("npg", steps=3, damping=0.25)
    model.config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert loaded.solver == model.config.solver == stored["solver"]
    assert loaded.gradient == model.config.gradient == stored["gradient"]
    assert (loaded.solver["name"], loaded.solver["max_steps"]) == ("broyden", 7)


def test_trainer_sees_logits_only(model: PreTrainedModel, tmp_path: Path) -> None:
    """The solver's report must not reach `compute_metrics`."""
    if "labels" not in inspect.signature(model.forward).parameters:
        pytest.skip("no head")
    batch = inputs(model)
    n_labels = 10 if "NodeClassification" in type(model).__name__ else 2
    batch["labels"] = batch.get("input_ids", torch.zeros(n_labels, dtype=torch.int64))
    seen = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {}

    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=1
        ),
        data_collator=lambda items: items[0],
        eval_dataset=[batch],
        compute_metrics=metrics,
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert seen[0].shape == model(**batch).logits.shape


def test_catalogue_counts_parameters_only(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert entry(str(tmp_path)).parameters == model.num_parameters()


def test_misspelt_keywords_of_loading(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for keywords, expected in (({"foo": 3}, "'foo'"), ({"solver": 5}, "int")):
        with pytest.raises(UserError, match=expected) as caught:
            DEQModel.from_pretrained(tmp_path, **keywords)
        assert "\n" not in str(caught.value)


def test_unknown_settings_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="anderson"):
        model.set_solver("newton")
    with pytest.raises(ValueError, match="max_steps"):
        model.set_solver(maximum=3)
    with pytest.raises(ValueError, match="upg"):
        model.set_gradient("exact")
    with pytest.raises(ValueError, match="max_steps"):
        model(**inputs(model), solver={"maximum": 3})


@torch.no_grad()
def test_bfloat16_computes(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = DEQModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    data = inputs(model)
    output = loaded(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in data.items()})
    assert output.residual.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ("MDEQForImageClassification", "DEQTransformerForCausalLM", "IGNNForGraphClassification"),
)
def test_a_compiled_model_answers_the_same(name: str) -> None:
    torch.manual_seed(0)
    config = load_class(f"{family(name)}Config")(**TINY[family(name)])
    plain = load_class(name)(config).eval()
    plain.use_inference_kernels(False)  # which no graph has: they begin solves in bfloat16
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        compiled = torch.compile(plain, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(**inputs(plain)).logits, plain(**inputs(plain)).logits
            )
        # The solver stays out of the graphs: few of them, whatever it does.
        frames, totals = torch._dynamo.utils.counters["frames"], []
        for _ in range(2):
            with torch.no_grad():
                compiled(**inputs(plain))
            totals.append(frames["total"])
        assert totals[0] == totals[1] < 64  # and no new ones, whatever its clock says
    finally:
        torch._dynamo.reset()
