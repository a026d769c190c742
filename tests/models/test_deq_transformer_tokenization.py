"""Word-level tokenizers and the preparation of raw text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from deqzoo.errors import UserError
from deqzoo.models.deq_transformer import DEQTransformerConfig, DEQTransformerForCausalLM
from deqzoo.models.deq_transformer.tokenization_deq_transformer import (
    build_tokenizer,
    detokenize,
    prepare_text,
    text_style,
)

WORDS = ["<eos>", "the", ",", ".", "<unk>", "Mr.", "U.S.", "dog", "'s", "@-@", "No."]


def test_corpus_rows_get_their_indices() -> None:
    tokenizer = build_tokenizer(WORDS, "wikitext")
    ids = tokenizer("the dog\n\n cat @-@ the \r\n <unk>\n")["input_ids"]
    assert ids == [1, 7, 0, 0, 4, 9, 1, 0, 4, 0]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0 and tokenizer.unk_token_id == 4
    assert tokenizer.padding_side == "left"


def test_offsets_point_into_the_raw_text() -> None:
    text = "the  dog\ncat"
    encoded = build_tokenizer(WORDS, "wikitext")(text, return_offsets_mapping=True)
    assert [text[a:b] for a, b in encoded["offset_mapping"]] == ["the", "dog", "\n", "cat"]


@pytest.mark.parametrize("style", ["wikitext", "ptb"])
def test_save_and_load(tmp_path: Path, style: str) -> None:
    words = [word.lower() for word in WORDS] if style == "ptb" else WORDS
    tokenizer = build_tokenizer(words, style)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The dog\nMr. the"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded(text)["input_ids"][0] == (1 if style == "ptb" else 4)
    assert text_style(loaded) == style and loaded.padding_side == "left"


def test_continuations_append_to_prompts(tmp_path: Path) -> None:
    build_tokenizer(WORDS, "wikitext").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [2, 1, 0, 0, 4, 7, 3]
    text = "the" + tokenizer.decode(ids)
    assert text == "the , the\n\n<unk> dog ."
    assert tokenizer(text)["input_ids"] == [1, *ids]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " , the dog ."
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocab_size=len(WORDS), d_model=16, d_embed=16, n_head=2, d_inner=16, eos_token_id=None
    )
    generate = pipeline(
        "text-generation", model=DEQTransformerForCausalLM(config), tokenizer=tokenizer
    )
    # Older pipelines would join what words the untrained model happens to take (". ." to "..").
    how = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    how |= {"max_new_tokens": 3, "do_sample": False}
    written = generate("the dog", **how)[0]["generated_text"]
    assert len(tokenizer(written)["input_ids"]) == 5 and written.startswith(
        ("the dog ", "the dog\n")
    )


@pytest.mark.parametrize("words", [["a", "<eos>"], ["<eos>", "<unk>", "a", "a"]])
def test_impossible_vocabularies(words: list[str]) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        build_tokenizer(words, "wikitext")
    with pytest.raises(UserError, match="style"):
        build_tokenizer(WORDS, "penn")


@pytest.mark.parametrize(
    ("raw", "prepared"),
    [
        ("The dog's tail, well-known.", "The dog 's tail , well @-@ known ."),
        ("He doesn't pay 1,000,000 or 3.5%", "He doesn 't pay 1 @,@ 000 @,@ 000 or 3 @.@ 5 %"),
        ("Mr. X saw the U.S. flag.", "Mr. X saw the U.S. flag ."),
        ("There is no other, he said: No.", "There is no other , he said : No ."),
        ("“Stop!” (he cried)...", '" Stop ! " ( he cried ) ...'),
        ("a\n\nb\r\nc", "a\n\nb\nc"),
        ("", ""),
    ],
)
def test_wikitext_form(raw: str, prepared: str) -> None:
    assert prepare_text(raw, WORDS, "wikitext").text == prepared


@pytest.mark.parametrize(
    ("raw", "prepared"),
    [
        ("Mr. Vinken doesn't earn $1,250.50!", "mr. vinken does n't earn $ N"),
        ("It's up 3.5%, he said.", "it 's up N N he said"),
        ("I cannot: “buy-out”", "i can not buy-out"),
    ],
)
def test_ptb_form(raw: str, prepared: str) -> None:
    assert prepare_text(raw, ["mr.", "buy-out", "n"], "ptb").text == prepared


def test_unknown_words_are_counted() -> None:
    result = prepare_text("The dog.", ["dog", "."], "wikitext")
    assert (result.n_words, result.n_unknown) == (3, 1)
    assert result.unknown_share == pytest.approx(1 / 3)
    assert prepare_text("", [], "ptb").unknown_share == 0
    assert prepare_text("7", ["n"], "ptb").n_unknown == 0


def test_detokenize() -> None:
    assert detokenize('It \'s well @-@ known , ( 1 @,@ 000 ) " a b " .') == (
        'It\'s well-known, (1,000) "a b".'
    )
    assert detokenize("a <eos> b") == "a\nb"
