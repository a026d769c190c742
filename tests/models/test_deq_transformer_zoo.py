"""The bundled language models: no leak at loose tolerances, exact generation, pipelines."""

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from deqzoo import DEQModel, list_models
from deqzoo.models.deq_transformer.tokenization_deq_transformer import prepare_text, text_style
from deqzoo.zoo import bundled_folder

NAMES = [name for name in list_models() if name.startswith("deq-transformer")]
TEXT = "The game was released in Japan, and it sold 1,000,000 copies in the first week.\n"

pytestmark = pytest.mark.skipif(not NAMES, reason="no language model is bundled")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest):
    folder = bundled_folder(request.param)
    return DEQModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer, text: str) -> torch.Tensor:
    prepared = prepare_text(text, tokenizer.get_vocab(), text_style(tokenizer)).text
    return tokenizer(prepared, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-3])
@torch.no_grad()
def test_no_leak(loaded, tol: float) -> None:
    model, tokenizer = loaded
    ids = encode(tokenizer, TEXT * 4)
    changed = ids.clone()
    changed[:, -9:] = changed[:, -9:].flip(1) + 5
    settings = {"tol": tol}
    one, other = (model(i, solver=settings).logits.log_softmax(-1) for i in (ids, changed))
    assert (one[:, :-9] - other[:, :-9]).abs().max() < 1e-4
    assert (one[:, -9:] - other[:, -9:]).abs().max() > 1e-2


def test_greedy_tokens_agree_at_the_default_tolerance(loaded) -> None:
    model, tokenizer = loaded
    ids = encode(tokenizer, TEXT)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    options |= {"max_new_tokens": 30, "min_new_tokens": 30}
    cached, recomputed = (
        model.generate(ids, use_cache=flag, **options).tolist() for flag in (True, False)
    )
    assert cached == recomputed


def test_most_tokens_are_solved(loaded) -> None:
    model, tokenizer = loaded
    with torch.no_grad():
        output = model(encode(tokenizer, TEXT * 6))
    assert output.token_residual.median() <= 5e-3


def test_pipeline(loaded) -> None:
    model, tokenizer = loaded
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["The game was", "It is"]
    results = generate(prompts, max_new_tokens=4, do_sample=False, batch_size=2)
    # A word of its own follows the prompt.
    assert all(
        r[0]["generated_text"].startswith(f"{p} ") for p, r in zip(prompts, results, strict=True)
    )
