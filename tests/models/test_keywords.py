"""Keywords that transformers, PEFT and generate() pass, and what generation needs of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, Trainer, TrainingArguments

from deqzoo import DEQModel, UserError
from deqzoo.models.deq_transformer.cache_deq_transformer import DEQTransformerCache
from deqzoo.models.names import load_class

from .test_adapters import build
from .test_common import MODELS, TINY, family, inputs
from .test_deq_transformer import TIGHT, lively_model, random_ids


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    config = load_class(f"{family(request.param)}Config")(**TINY[family(request.param)])
    return load_class(request.param)(config).eval()


@torch.no_grad()
def test_standard_keywords(model: PreTrainedModel) -> None:
    batch = inputs(model)
    for name in ("output_attentions", "head_mask", "position_ids", "token_type_ids"):
        for value in (None, False):
            if not (name == "position_ids" and value is False):
                model(**batch, **{name: value})
    model(**batch, output_hidden_states=True, return_dict=True)
    with pytest.raises(UserError, match="attention weights") as caught:
        model(**batch, output_attentions=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="output_attention"):
        model(**batch, output_attention=None)


@torch.no_grad()
def test_hidden_states_by_the_configuration(model: PreTrainedModel) -> None:
    assert model(**inputs(model)).hidden_states is None
    model.config.output_hidden_states = True
    assert model(**inputs(model)).hidden_states is not None
    assert model(**inputs(model), output_hidden_states=False).hidden_states is None


@pytest.fixture
def text() -> PreTrainedModel:
    """Contracting, so that every equilibrium is found."""
    model = lively_model(0.7)
    model.set_solver(**TIGHT)
    return model


@pytest.fixture
def ids() -> Tensor:
    return random_ids(2, 12)


@torch.no_grad()
def test_vectors_instead_of_words(text: PreTrainedModel, ids: Tensor) -> None:
    vectors = text.get_input_embeddings()(ids)
    for one in (text, text.base_model):
        expected, found = one(input_ids=ids)[0], one(inputs_embeds=vectors)[0]
        assert torch.equal(expected, found)
    assert torch.equal(text(ids, labels=ids).loss, text(inputs_embeds=vectors, labels=ids).loss)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": vectors}):
        with pytest.raises(UserError, match="either"):
            text(**wrong)
    with pytest.raises(UserError, match="inputs_embeds"):
        text(inputs_embeds=vectors[..., :3])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_generation_from_vectors(
    text: PreTrainedModel, ids: Tensor, options: dict[str, Any]
) -> None:
    """What is new is what the words themselves would go on with."""
    vectors = text.get_input_embeddings()(ids)
    options = {"max_new_tokens": 5, "attention_mask": torch.ones_like(ids), **options}
    expected = text.generate(ids, **options)[:, ids.shape[1] :]
    assert torch.equal(text.generate(inputs_embeds=vectors, **options), expected)


@torch.no_grad()
def test_positions_are_consecutive(text: PreTrainedModel, ids: Tensor) -> None:
    positions = torch.arange(12).expand(2, 12)
    assert torch.equal(text(ids, position_ids=positions + 3).logits, text(ids).logits)
    with pytest.raises(UserError, match="consecutive"):
        text(ids, position_ids=positions.flip(1))


@torch.no_grad()
def test_shifted_labels_and_the_number_of_items(text: PreTrainedModel, ids: Tensor) -> None:
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    mean = text(ids, labels=ids).loss
    torch.testing.assert_close(text(ids, shift_labels=shifted).loss, mean)
    torch.testing.assert_close(text(ids, labels=ids, num_items_in_batch=44).loss, mean / 2)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 9:] = 0
    padded = text(ids, attention_mask=mask, labels=ids, num_items_in_batch=22).loss
    torch.testing.assert_close(padded, text(ids, attention_mask=mask, labels=ids).loss)
    assert text(ids[:, :1], labels=ids[:, :1], num_items_in_batch=22).loss == 0


def trained(model: PreTrainedModel, folder: Path, batch: int, accumulate: int) -> Tensor:
    rows = []
    for scored in (12, 3, 7, 2):
        ids = torch.arange(12) % 9 + scored
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) >= scored, -100)})
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", max_steps=1, optim="sgd", learning_rate=0.1,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0, save_strategy="no", train_sampling_strategy="sequential",
        lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path: Path) -> None:
    """With unequal numbers of scored words."""
    start = build("deq_transformer", {})
    before = torch.cat([p.detach().flatten() for p in start.parameters()])
    whole = trained(build("deq_transformer", {}), tmp_path, 4, 1)
    parts = trained(build("deq_transformer", {}), tmp_path, 1, 4)
    assert (whole - before).abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_layers_are_counted(text: PreTrainedModel) -> None:
    assert text.config.num_hidden_layers == 1
    assert len(DynamicCache(config=text.config).layers) == 1


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("dropped", [1, 5])
def test_a_cropped_cache_never_saw_the_tokens(
    text: PreTrainedModel, padding: int, dropped: int
) -> None:
    ids = random_ids(2, 200)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    for length in (6, 30, 150):  # within the window, beyond it, and after the buffers grew
        caches = [DEQTransformerCache(text.config.window) for _ in range(2)]
        for one, extra in zip(caches, (0, dropped), strict=True):
            for a, b in ((0, length), (length, length + extra)):
                if b > a:
                    text(ids[:, a:b], attention_mask=mask[:, :b], cache=one)
        caches[1].crop(-dropped)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == length
        expected, found = (
            text(
                ids[:, length : length + 4], attention_mask=mask[:, : length + 4], cache=one
            ).logits
            for one in caches
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    caches[1].crop(-500)
    assert caches[1].get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("how", ["assisted", "lookup"])
def test_speculative_decoding_says_what_greedy_decoding_says(
    text: PreTrainedModel, how: str
) -> None:
    prompt = random_ids(1, 12)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = text.generate(prompt, **settings)
    if how == "assisted":
        draft = lively_model(0.7)
        draft.set_solver(max_steps=2)
        found = text.generate(prompt, assistant_model=draft, **settings)
    else:
        found = text.generate(prompt, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(found, expected)


def test_peft_calls_a_causal_model_its_way(text: PreTrainedModel, ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["injection"])
    assert peft.get_peft_model(text, lora)(input_ids=ids, labels=ids).loss > 0
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=16)
    plain = build("deq_transformer", {"cutoffs": [], "div_val": 1})
    ids = ids % 40
    tuned = peft.get_peft_model(plain, prompt)
    loss = tuned(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in tuned.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_soft_prompts_generate_with_a_cache_as_without(kind: str) -> None:
    peft = pytest.importorskip("peft")
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    plain = lively_model(0.7, cutoffs=[], div_val=1)
    plain.set_solver(**TIGHT)
    tuned = peft.get_peft_model(plain, settings).eval()
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0  # a shorter prompt, padded on the left
    prompt = {"input_ids": random_ids(2, 6) % 40, "attention_mask": mask}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = [
        tuned.generate(
            **prompt, use_cache=cached, return_dict_in_generate=True, output_logits=True, **options
        )
        for cached in (True, False)
    ]
    assert torch.equal(said[0].sequences, said[1].sequences)
    for with_cache, without in zip(said[0].logits, said[1].logits, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-3, atol=1e-4)


def test_ready_made_keys_are_refused_in_one_line(ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    plain = build("deq_transformer", {"cutoffs": [], "div_val": 1})
    with pytest.raises(UserError, match="PromptTuningConfig"):
        peft.get_peft_model(plain, settings)(input_ids=ids % 40)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_stops_at_strings(beams: int) -> None:
    """Of a tokenizer of words, in a padded batch; a string may begin inside of a word."""
    name = "deq-transformer-ptb-upg"
    model, tokenizer = DEQModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    prompts = tokenizer(["the company said that", "it"], return_tensors="pt", padding=True)
    settings = {**prompts, "max_new_tokens": 12, "num_beams": beams, "do_sample": False}
    free = tokenizer.batch_decode(model.generate(**settings, tokenizer=tokenizer))
    words = free[1].split()
    for string in (words[2], f"{words[1][-1]} {words[2]}"):
        ended = model.generate(**settings, stop_strings=[string, "zzz"], tokenizer=tokenizer)
        text = tokenizer.batch_decode(ended)[1].rstrip()
        assert text.endswith(string) and string not in text[: -len(string)]
    with pytest.raises(ValueError, match="not empty"):
        model.generate(**settings, stop_strings=[""], tokenizer=tokenizer)


def test_labels_of_another_kind(text: PreTrainedModel, ids: Tensor) -> None:
    for labels in (ids.float(), ids > 3):
        with pytest.raises(UserError, match="whole numbers"):
            text(input_ids=ids, labels=labels)
