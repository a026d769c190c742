"""MDEQ under transformers' own Trainer, DEQTrainer's additions, and options of a recipe's run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from deqzoo import DEQTrainer, DEQTrainingArguments
from deqzoo.errors import UserError
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.ignn.configuration_ignn import IGNNConfig
from deqzoo.models.ignn.modeling_ignn import IGNNForGraphClassification
from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification
from deqzoo.recipe import Jacobian
from deqzoo.training.norms import freeze_batch_norm
from deqzoo.training.trainer import penalty_of


def tiny_model(**changes: object) -> MDEQForImageClassification:
    torch.manual_seed(0)
    settings = {
        "channels": [8, 8], "head_channels": [4, 4], "final_channels": 16, "expansion": 1,
        "num_groups": 2, "image_size": 8, "num_labels": 2,
        "solver": {"name": "anderson", "max_steps": 15, "tol": 1e-4},
        "gradient": {"name": "upg", "steps": 2, "damping": 0.8},
    }  # fmt: skip
    return MDEQForImageClassification(MDEQConfig(**(settings | changes)))


class Pictures(torch.utils.data.Dataset):
    """Bright and dark pictures."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randn(3, 8, 8, generator=generator) + 2 * (index % 2) - 1
        return {"pixel_values": pixels, "labels": index % 2}


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "lr_scheduler_type": "constant",  # a shorter run is then the beginning of a longer one
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(folder: Path, model: MDEQForImageClassification, **changes: object) -> Trainer:
    trainer = Trainer(model, arguments(folder, **changes), train_dataset=Pictures())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trained(tmp_path_factory.mktemp("plain"), tiny_model())


def test_loss_falls(plain: Trainer) -> None:
    assert losses(plain)[-1] < 0.7 * losses(plain)[0]


def test_bf16_follows(plain: Trainer, tmp_path: Path) -> None:
    model = tiny_model()
    rounded = losses(trained(tmp_path, model, bf16=True))
    assert model.dtype == torch.float32
    assert rounded != losses(plain)
    # Which kernels round, and where, is the processor's own: half a nat would be another training.
    assert rounded == pytest.approx(losses(plain), abs=0.3)


def test_compiled_model_gives_the_same_losses(plain: Trainer, tmp_path: Path) -> None:
    """The tracing of torch.compile; generating machine code would take minutes."""
    torch._dynamo.reset()
    compiled = trained(
        tmp_path, tiny_model(), torch_compile=True, torch_compile_backend="eager", max_steps=3
    )
    torch._dynamo.reset()
    assert losses(compiled) == pytest.approx(losses(plain)[:3], abs=2e-3)


def test_compiled_model_is_penalised_alike(tmp_path: Path) -> None:
    found = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = penalised(tmp_path, jacobian_every=1, max_steps=2, **changes)
        trainer.train()
        logs = trainer.state.log_history[:2]
        found.append([e[key] for e in logs for key in ("loss", "jacobian_penalty")])
        assert bool(torch._dynamo.utils.counters["frames"]) == bool(changes)
    torch._dynamo.reset()
    assert found[1] == pytest.approx(found[0], rel=2e-3) and min(found[0]) > 0


def test_checkpointing_changes_nothing_but_memory(plain: Trainer, tmp_path: Path) -> None:
    model = tiny_model()
    recomputed = trained(tmp_path, model, gradient_checkpointing=True, max_steps=3)
    assert model.base_model.gradient_checkpointing
    assert losses(recomputed) == pytest.approx(losses(plain)[:3], abs=1e-4)


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    states = []
    for size, parts in ((16, 1), (4, 4)):
        model = tiny_model()
        freeze_batch_norm(model)  # its statistics are those of a forward pass
        trained(
            tmp_path,
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=2,
            train_sampling_strategy="sequential",
            optim="sgd",
        )
        states.append(dict(model.named_parameters()))
    start = dict(tiny_model().named_parameters())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(start[name], value) for name, value in states[0].items())


def own(folder: Path, **changes: object) -> dict[str, float]:
    """First log line of a DEQTrainer."""
    settings = arguments(folder, max_steps=2).to_dict() | changes
    trainer = DEQTrainer(tiny_model(), DEQTrainingArguments(**settings), train_dataset=Pictures())
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def test_own_trainer_logs_the_solver_and_overrides_it(tmp_path: Path) -> None:
    usual = own(tmp_path)
    for key in ("steps", "steps_p95", "residual", "residual_p95", "converged", "time_share"):
        assert f"solver_{key}" in usual
    assert 0 < usual["solver_time_share"] <= 1
    short = own(tmp_path, solver={"name": "anderson", "max_steps": 2, "tol": 0.0})
    assert short["solver_steps"] == 2 < usual["solver_steps"]
    assert short["solver_residual"] > usual["solver_residual"]
    other = own(tmp_path, gradient="jfb")
    assert other["grad_norm"] != pytest.approx(usual["grad_norm"], rel=1e-3)
    penalised = own(tmp_path, jacobian_weight=1.0, jacobian_every=1)
    assert penalised["jacobian_penalty"] > 0
    assert penalised["grad_norm"] != pytest.approx(usual["grad_norm"], rel=1e-3)


def test_own_trainer_takes_plain_arguments(tmp_path: Path) -> None:
    trainer = DEQTrainer(tiny_model(), arguments(tmp_path, max_steps=1), train_dataset=Pictures())
    trainer.train()
    assert trainer.jacobian is None and "solver_steps" in trainer.state.log_history[0]


def test_single_settings_are_laid_over_the_models_own(tmp_path: Path) -> None:
    short = own(tmp_path, solver={"max_steps": 2, "tol": 0.0}, gradient={"steps": 1})
    assert short["solver_steps"] == 2
    with pytest.raises(UserError, match="solver: .* 'memory'"):
        own(tmp_path, solver={"memory": 3})  # broyden's; the model has anderson


class Penalised(DEQTrainer):
    """Notes the steps on which the penalty was added."""

    def wants_penalty(self) -> bool:
        wanted = super().wants_penalty()
        if wanted:
            self.noted = [*getattr(self, "noted", []), self.state.global_step]
        return wanted


def penalised(folder: Path, **changes: object) -> Penalised:
    settings = arguments(folder).to_dict() | {"jacobian_every": 2, "jacobian_weight": 1.0} | changes
    return Penalised(tiny_model(), DEQTrainingArguments(**settings), train_dataset=Pictures())


def test_penalty_counts_optimiser_steps(tmp_path: Path) -> None:
    """Also where gradients are accumulated, and after a run was cut off."""
    whole = penalised(tmp_path / "whole", gradient_accumulation_steps=2, max_steps=5)
    whole.train()
    assert whole.noted == [0, 0, 2, 2, 4, 4]
    first = penalised(tmp_path / "cut", max_steps=3, save_strategy="steps", save_steps=3)
    first.train()
    rest = penalised(tmp_path / "cut", max_steps=5)
    rest.train(resume_from_checkpoint=True)
    assert first.noted + rest.noted == [0, 2, 4]


def test_penalty_does_not_shrink_where_gradients_are_accumulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty of known gradient in place of the estimate."""
    monkeypatch.setattr(
        "deqzoo.training.trainer.jacobian_penalty",
        lambda f, state, n_probes: 1000 * known.sum() / known.numel(),
    )
    norms = []
    for parts in (1, 4):
        trainer = penalised(
            tmp_path, gradient_accumulation_steps=parts, per_device_train_batch_size=16 // parts,
            max_steps=1, max_grad_norm=1e9,
        )  # fmt: skip
        known = trainer.model.classifier.weight
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_penalty_needs_a_model_with_a_map(tmp_path: Path) -> None:
    model = IGNNForGraphClassification(IGNNConfig(num_features=3, hidden_sizes=[4]))
    with pytest.raises(UserError, match="IGNNForGraphClassification has no output_state"):
        DEQTrainer(model, DEQTrainingArguments(str(tmp_path), jacobian_weight=1.0, use_cpu=True))


def smoothed_loss(model: torch.nn.Module, batch: dict, folder: Path, factor: float) -> float:
    settings = arguments(folder, label_smoothing_factor=factor)
    with torch.no_grad():
        return float(DEQTrainer(model, settings).compute_loss(model, batch))


def test_label_smoothing(tmp_path: Path) -> None:
    """Text is smoothed against the next words, as the model's own loss is; pictures as ever."""
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocab_size=30, d_model=16, d_embed=16, n_head=2, d_inner=16, initializer_range=0.2
    )
    text = DEQTransformerForCausalLM(config)
    ids = torch.arange(16).reshape(2, 8) * 7 % 30
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    for training in (True, False):
        with torch.no_grad():
            loss = float(text.train(training)(**batch).loss)
        assert smoothed_loss(text, batch, tmp_path, 1e-9) == pytest.approx(loss, rel=1e-4)
    # transformers' own, which moves the labels itself but does not know what is padding.
    with torch.no_grad():
        loss = float(text(ids, labels=ids).loss)
        plain = Trainer(text, TrainingArguments(tmp_path / "plain", label_smoothing_factor=1e-9))
        found = float(plain.compute_loss(text, {"input_ids": ids, "labels": ids.clone()}))
    assert found == pytest.approx(loss, rel=1e-4)
    with pytest.raises(UserError, match="shift=False"):
        smoothed_loss(text, {**batch, "shift": False}, tmp_path, 0.3)
    words = text.next_words(ids, ids, attention_mask=mask).flatten()
    with torch.no_grad():
        logits = text(ids, attention_mask=mask).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, words, label_smoothing=0.3)
    assert smoothed_loss(text, batch, tmp_path, 0.3) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(batch["labels"], ids)
    with pytest.raises(UserError, match="one label per token"):
        smoothed_loss(text, {**batch, "labels": ids[:, 1:]}, tmp_path, 0.3)
    pictures = tiny_model().eval()
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 1, 0])}
    with torch.no_grad():
        logits = pictures(batch["pixel_values"]).logits
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.3)
    found = smoothed_loss(pictures, batch, tmp_path, 0.3)
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "smoothing"), [(Trainer, 0.0), (DEQTrainer, 0.0), (DEQTrainer, 1e-9)]
)
def test_padding_does_not_lower_the_loss(
    tmp_path: Path, kind: type[Trainer], smoothing: float
) -> None:
    """Trainer counts labels at padding, and the first word behind it, which are not scored."""
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocab_size=30, d_model=16, d_embed=16, n_head=2, d_inner=16, initializer_range=0.2
    )
    text = DEQTransformerForCausalLM(config).eval()
    ids = torch.arange(16).reshape(2, 8) * 7 % 30
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for labels in (ids, ids.masked_fill(mask == 0, -100)):
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        rows = [{key: value[i] for key, value in batch.items()} for i in range(2)]
        settings = arguments(tmp_path, label_smoothing_factor=smoothing)
        found = kind(text, settings, eval_dataset=rows).evaluate()["eval_loss"]
        with torch.no_grad():
            assert found == pytest.approx(float(text(**batch).loss), rel=1e-4)


def test_arguments_are_read_from_a_command_line(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--solver", '{"name": "broyden", "max_steps": 7}',
            "--gradient", "jfb", "--jacobian_weight", "0.5", "--jacobian_every", "3"]  # fmt: skip
    (read,) = HfArgumentParser(DEQTrainingArguments).parse_args_into_dataclasses(line)
    assert read.solver == {"name": "broyden", "max_steps": 7} and read.gradient == "jfb"
    assert read.jacobian == Jacobian(weight=0.5, every=3, probes=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "newton"}, "solver: .*anderson"),
        ({"gradient": {"name": "upg", "step": 3}}, "gradient: .*step"),
        ({"jacobian_weight": -1.0}, "jacobian_weight must not be negative, got -1.0"),
        ({"jacobian_every": 0}, "jacobian_every must be at least 1, got 0"),
        ({"jacobian_weight": "a"}, "jacobian_weight must not be negative, got 'a'"),
        (
            {"gradient": 3},
            "gradient: a gradient is a name, a dict or an object of its class, not int",
        ),
    ],
)
def test_arguments_are_checked(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DEQTrainingArguments(str(tmp_path), **changes)


def test_batch_norms_stay_frozen() -> None:
    model = tiny_model()
    count = freeze_batch_norm(model)
    assert count > 0 and freeze_batch_norm(model) == 0
    before = {name: b.clone() for name, b in model.named_buffers()}
    model.train()(torch.randn(4, 3, 8, 8), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert model.training


def test_a_method_of_a_users_map_that_has_the_name_is_not_called() -> None:
    class Halved(torch.nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return 0.5 * h

        def twice_differentiable(self, something: int) -> None:
            raise AssertionError("not meant")

    outputs = SimpleNamespace(equilibrium_map=Halved(), state=torch.ones(4, 300))
    found = penalty_of(outputs, SimpleNamespace(difference=None, probes=2))
    assert float(found) == pytest.approx(0.25, rel=0.2)
