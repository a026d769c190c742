"""Training: Trainer, autocast, compiled maps, memory from segment to segment."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM


def tiny_model(dtype: torch.dtype = torch.float32, **changes: object) -> DEQTransformerForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 60, "d_model": 32, "d_embed": 32, "n_head": 4, "d_inner": 48,
        "cutoffs": [15, 35], "div_val": 2, "mem_len": 8, "local_size": 9, "initializer_range": 0.2,
    }  # fmt: skip
    return DEQTransformerForCausalLM(DEQTransformerConfig(**(settings | changes))).to(dtype)


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(1))


class Segments(torch.utils.data.Dataset):
    """The same few words over and over, so that there is something to learn."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) + index) % 5
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("autocast", [False, True])
def test_trainer(tmp_path: Path, autocast: bool) -> None:
    model = tiny_model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2,
        use_cpu=True, bf16=autocast, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Segments(), eval_dataset=Segments())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 0.3


def test_autocast_keeps_the_state_wide() -> None:
    model = tiny_model()
    ids = random_ids(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids, solver={"max_steps": 4}, output_state=True)
    assert output.state.dtype == output.loss.dtype == torch.float32
    wide = model(ids, labels=ids, solver={"max_steps": 4})
    assert abs(output.loss - wide.loss) < 0.02
    output.loss.backward()


def test_loss_falls_with_memory() -> None:
    model = tiny_model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    stream = torch.arange(400).remainder(7).view(2, 200)
    losses, memory = [], None
    for start in range(0, 192, 8):
        inputs, targets = stream[:, start : start + 8], stream[:, start + 1 : start + 9]
        output = model(inputs, labels=targets, shift=False, memory=memory, return_logits=False)
        memory = output.memory
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 1
    assert memory[0].shape == (2, 8, 32) and memory[1].shape == (2, 8, 96)


@pytest.mark.parametrize("gradient", ["implicit", "upg", "npg"])
def test_compiled_map_gives_the_same_gradients(
    gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled path, with an eager backend in place of the slow compiler."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compiled(f, **o, backend="aot_eager"))
    from deqzoo.models.deq_transformer import block

    block._compiled_layers.cache_clear()
    ids = random_ids(2, 8)
    gradients = []
    for enabled in (False, True):
        model = tiny_model(torch.float64, dropout=0.2).train()
        model.compile_map(enabled)
        torch.manual_seed(5)
        model(ids, labels=ids, gradient=gradient, solver={"tol": 1e-10}).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-6, atol=1e-9)
    block._compiled_layers.cache_clear()


def test_dropped_words_have_a_gentle_equilibrium() -> None:
    """Without an injected bias a dropped word stays at zero, where layer norm is steep."""
    model = tiny_model(dropword=0.5).train()
    output = model(random_ids(4, 12), labels=random_ids(4, 12), output_state=True)
    assert model.jacobian_loss(output.equilibrium_map, output.state) < 10
