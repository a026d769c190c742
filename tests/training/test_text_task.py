"""Language-modelling runs: streams, memory, exact resume, exported folder."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from deqzoo import DEQModel
from deqzoo.data import text
from deqzoo.errors import UserError
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.recipe import Recipe, from_plain, load_recipe
from deqzoo.tasks.base import Plan
from deqzoo.tasks.text import LanguageModelingTask
from deqzoo.training.checkpoints import latest_checkpoint
from deqzoo.training.estimate import estimate
from deqzoo.training.run import export, run_recipe

ROW = "the dog saw the cat and the cat saw a <unk> dog"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for split in text.SPLITS:
        pq.write_table(pa.table({"text": [ROW] * 30}), folder / f"{split}-0.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return folder


def recipe(**changes: object) -> Recipe:
    small = {"d_model": 16, "d_embed": 16, "n_head": 2, "d_inner": 16, "cutoffs": [4]}
    content = {
        "name": "tiny",
        "task": "language-modeling",
        "data": {"name": "wikitext-2"},
        "model": {
            "family": "deq_transformer",
            "preset": "deq-transformer-wikitext2",
            "overrides": {**small, "local_size": 8, "mem_len": 7, "tgt_len": 5},
        },
        "batch_size": 4,
        "accumulate": 2,
        "optimizer": {"name": "adamw", "lr": 0.01},
        "evaluation": {"per_epoch": 1, "samples": 100, "snapshots": 0},
        "stages": [{"epochs": 1, "gradient": {"name": "jfb"}, "jacobian": {"every": 2}}],
    }
    return from_plain(Recipe, content | changes, "")


def test_batches_follow_the_text(data: Path) -> None:
    task = LanguageModelingTask(recipe(), data)
    plan = Plan.of(task.recipe, task)
    stream = task.corpus.stream("train")
    length = len(stream) // 8
    read = {row: [] for row in range(8)}
    for micro in range(plan.total * 2):
        halves = [task.batch(plan, micro, rank, 2) for rank in range(2)]
        whole = task.batch(plan, micro, 0, 1)
        assert torch.equal(torch.cat([h["input_ids"] for h in halves]), whole["input_ids"])
        assert whole["fresh"] == (micro < 2)
        for row in range(4):
            read[4 * (micro % 2) + row] += whole["input_ids"][row].tolist()
            assert whole["labels"][row, :-1].tolist() == whole["input_ids"][row, 1:].tolist()
    for row, words in read.items():
        assert words == stream[row * length : row * length + len(words)].tolist()


def test_some_steps_forget(data: Path) -> None:
    task = LanguageModelingTask(recipe(augment={"forget": 0.3}), data)
    plan = Plan.of(task.recipe, task)
    fresh = [task.batch(plan, micro, 0, 1)["fresh"] for micro in range(plan.total * 2)]
    assert 0.1 < sum(fresh) / len(fresh) < 0.6
    assert fresh == [task.batch(plan, micro, 1, 2)["fresh"] for micro in range(plan.total * 2)]
    other = LanguageModelingTask(recipe(augment={"forget": 0.3}, seed=1), data)
    assert fresh != [other.batch(plan, micro, 0, 1)["fresh"] for micro in range(plan.total * 2)]
    for augment, message in (({"crop": 4}, "'crop'"), ({"forget": 1}, "a share")):
        with pytest.raises(UserError, match=message):
            LanguageModelingTask(recipe(augment=augment), data)


def test_memory_belongs_to_its_part(data: Path) -> None:
    task = LanguageModelingTask(recipe(), data)
    plan, model = Plan.of(task.recipe, task), task.model()
    for micro in range(3):
        inputs = task.before_forward(model, task.batch(plan, micro, 0, 1))
        assert (inputs["memory"] is None) == (micro < 2)
        task.after_forward(model(**inputs))
    saved = {k: [t.clone() for t in v] for k, v in task.state_dict().items()}
    other = LanguageModelingTask(recipe(), data)
    other.load_state_dict(saved)
    assert torch.equal(other.memory[1][0], task.memory[1][0])


def test_run_stop_resume_and_result(data: Path, tmp_path: Path) -> None:
    whole = run_recipe(recipe(), data, tmp_path / "whole", progress=False)
    run_recipe(recipe(), data, tmp_path / "cut", progress=False, max_steps=3)
    cut = run_recipe(recipe(), data, tmp_path / "cut", progress=False, resume=True)
    one, other = DEQModel.from_pretrained(whole), DEQModel.from_pretrained(cut)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert tokenizer("the dog")["input_ids"] == [1, 2]
    record = json.loads((tmp_path / "whole" / "record.json").read_text())
    assert record["finished"] and record["epochs"] == 1
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    assert any("eval_perplexity" in line for line in lines)


def test_resuming_to_a_step_that_is_reached_does_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_recipe(recipe(), data, out, progress=False, max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in (*out.glob("model/*"), out / "record.json")}
    lines = (out / "metrics.jsonl").read_text()
    for steps in (1, 2):
        folder = run_recipe(recipe(), data, out, resume=True, progress=False, max_steps=steps)
        assert folder == out / "model"
        assert f"made 2 steps already; nothing to do up to step {steps}" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert (out / "metrics.jsonl").read_text() == lines
    assert latest_checkpoint(out / "checkpoints").endswith("checkpoint-2")
    run_recipe(recipe(), data, out, resume=True, progress=False, max_steps=3)
    assert latest_checkpoint(out / "checkpoints").endswith("checkpoint-3")


def test_estimate(data: Path) -> None:
    task = LanguageModelingTask(recipe(), data)
    figures = estimate(task.recipe, task)
    assert figures["pflop"] >= 0 and figures["steps"] == task.steps_per_epoch(recipe().stages[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"data": {"name": "wikitext-4"}}, "the corpora are"),
        ({"batch_size": 400}, "too few"),
    ],
)
def test_impossible_recipes(data: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LanguageModelingTask(recipe(**changes), data)


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("deq-transformer-*.yaml")), ids=lambda p: p.stem
)
def test_recipes_of_the_zoo(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.name == path.stem
    config = DEQTransformerConfig.from_preset(loaded.model.preset, **loaded.model.overrides)
    assert config.gradient["name"] == loaded.stages[-1].gradient["name"]
    if "wikitext103" not in path.stem:
        # What a token gets must not depend on how text is cut.
        assert config.mem_len == config.window - 1


@pytest.mark.parametrize("prefix", ["", "jr-"])
def test_pairs_differ_in_the_gradient_alone(prefix: str) -> None:
    pair = []
    for kind in ("implicit", "upg"):
        content = load_recipe(RECIPES / f"deq-transformer-wikitext2-{prefix}{kind}.yaml").to_dict()
        content.pop("name")
        content["model"]["overrides"].pop("gradient")
        for stage in content["stages"]:
            stage.pop("gradient")
        pair.append(content)
    assert pair[0] == pair[1]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    config = DEQTransformerConfig(vocab_size=9, d_model=8, d_embed=8, n_head=2, d_inner=8)
    model = DEQTransformerForCausalLM(config)
    export(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "transformer.embedding.tables.0.weight" in stored
    assert "lm_head.tables.0.weight" not in stored
    loaded = DEQModel.from_pretrained(tmp_path)
    assert loaded.lm_head.tables[0].weight is loaded.transformer.embedding.tables[0].weight


def test_a_run_by_the_clock(data: Path, tmp_path: Path) -> None:
    """Ends in time, with averaged weights that are still tied, measured and resumable."""
    fixed = {"name": "fixed_point", "max_steps": 3, "tol": 0.0}
    stages = [
        {"epochs": 1, "solver": fixed, "gradient": {"name": "jfb"}},
        {"epochs": 2, "solver": fixed, "gradient": {"name": "upg", "steps": 2},
         "jacobian": {"every": 2, "difference": 0.1}},
    ]  # fmt: skip
    timed = recipe(stages=stages, time_budget="5s", average=0.9, augment={"forget": 0.2})
    out = tmp_path / "run"
    run_recipe(timed, data, out, progress=False, max_steps=2)
    first = json.loads((out / "record.json").read_text())
    assert not first["finished"] and first["steps"] == 2
    folder = run_recipe(timed, data, out, progress=False, resume=True)
    record = json.loads((out / "record.json").read_text())
    assert record["finished"] and record["steps"] > 2
    assert first["training_seconds"] < record["training_seconds"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    trained = [line for line in lines if "learning_rate" in line]
    assert trained[-1]["learning_rate"] < trained[0]["learning_rate"] / 2
    assert "jacobian_penalty" in trained[-1] and "right" not in trained[-1]
    measured = [line["eval_perplexity"] for line in lines if "eval_perplexity" in line]
    assert len(measured) == 2 and 1 < measured[-1] < 9  # after each stage; there are 8 words
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.tables.0.weight" not in stored
    loaded = DEQModel.from_pretrained(folder)
    assert loaded.lm_head.tables[0].weight is loaded.transformer.embedding.tables[0].weight
