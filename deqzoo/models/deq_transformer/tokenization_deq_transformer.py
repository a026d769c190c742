"""Word-level tokenizers of the corpora, and how raw text is brought into a corpus's form.

The tokenizer itself is strict: words are what stands between white space, a line break is `<eos>`,
and text of the corpus gets exactly the official indices. Raw text written by people is prepared
first, by :func:`prepare_text`, which must never touch a corpus: it is not idempotent on it.
"""

import re
import unicodedata
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deqzoo.errors import UserError

END = "<eos>"
UNKNOWN = "<unk>"
Style = Literal["wikitext", "ptb"]
STYLES = ("wikitext", "ptb")


def build_tokenizer(
    vocabulary: Sequence[str], style: Style, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Tokenizer of a corpus.

    Decoding puts a space before every word, the first one too, and makes `<eos>` a line break: a
    pipeline appends the decoded continuation to the prompt as it is. Pipelines leave out `<unk>`
    and `<eos>`, which are special tokens, unless called with ``skip_special_tokens=False``.

    Padding is `<eos>`, since the corpora have no word for it. Therefore
    `DataCollatorForLanguageModeling(mlm=False)`, which sets the label of every padding index to
    -100, lets no line end be learnt: make labels of the tokens and the attention mask instead.

    Args:
        vocabulary: words in index order; holds `<eos>` and `<unk>`.
        style: the corpus's way to write text, kept in the tokenizer's settings as
            ``text_style``; "ptb" lower-cases.
        model_max_length: limit that pipelines cut at; none by default, texts may be of any length.

    Raises:
        UserError: a word occurs twice, or `<eos>` or `<unk>` is missing.
    """
    if style not in STYLES:
        raise UserError(f"unknown text style {style!r}; choose one of {', '.join(STYLES)}")
    indices = {word: index for index, word in enumerate(vocabulary)}
    missing_words = [word for word in (END, UNKNOWN) if word not in indices]
    if missing_words or len(indices) != len(vocabulary):
        what = f"lacks {missing_words[0]}" if missing_words else "holds a word twice"
        raise UserError(f"the vocabulary {what}")
    tokenizer = Tokenizer(models.WordLevel(indices, unk_token=UNKNOWN))
    line_break = normalizers.Replace(Regex(r"\r?\n"), f" {END} ")
    steps = [normalizers.Lowercase()] if style == "ptb" else []
    tokenizer.normalizer = normalizers.Sequence([*steps, line_break])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Replace(f" {END}", "\n"),
            decoders.Replace("\n ", "\n"),
        ]
    )
    settings = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        text_style=style,
        **settings,
    )


def text_style(tokenizer: PreTrainedTokenizerFast) -> Style:
    """The corpus's way to write text, "wikitext" where a tokenizer does not say."""
    return tokenizer.init_kwargs.get("text_style", "wikitext")


@dataclass(frozen=True)
class PreparedText:
    """Words of a raw text in a corpus's form, line by line.

    Attributes:
        text: words between single spaces, lines as in the raw text.
        n_words: number of words.
        n_unknown: words that are not in the vocabulary.
    """

    text: str
    n_words: int
    n_unknown: int

    @property
    def unknown_share(self) -> float:
        """Share of unknown words, 0 for an empty text."""
        return self.n_unknown / max(self.n_words, 1)


_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
"""Soft hyphens, zero-width spaces and joiners, and byte order marks inside a text."""


def normalise_text(text: str) -> str:
    """Unicode's composed form (NFC), without invisible characters."""
    return _INVISIBLE.sub("", unicodedata.normalize("NFC", text))


def prepare_text(text: str, vocabulary: Container[str], style: Style) -> PreparedText:
    """Bring text as people write it into the form of a corpus.

    Punctuation and contractions become words of their own, quotes and dashes get the corpus's
    characters; "wikitext" marks hyphens and separators inside words and numbers (`@-@`, `@,@`,
    `@.@`); "ptb" lower-cases, writes numbers as `N` and leaves out punctuation. Words that are
    not in the vocabulary are kept here and become `<unk>` in the tokenizer. Before all that the
    text is normalised by :func:`normalise_text`.
    """
    split = _wikitext_words if style == "wikitext" else _ptb_words
    lines, n_words, n_unknown = [], 0, 0
    for line in normalise_text(text).replace("\r\n", "\n").split("\n"):
        words = split(line, vocabulary)
        n_words += len(words)
        n_unknown += sum(in_corpus_case(word, style) not in vocabulary for word in words)
        lines.append(" ".join(words))
    return PreparedText("\n".join(lines), n_words, n_unknown)


def in_corpus_case(text: str, style: Style) -> str:
    """A text in the corpus's form as its vocabulary has the words: lower-cased for "ptb"."""
    return text.lower() if style == "ptb" else text


_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\u00a0": " "})
_ABBREVIATION = re.compile(r"^(?:[A-Za-z]\.)+$|^[A-Za-z]+\.$")
_CONTRACTION = re.compile(r"(?i)(?<=\w)'(?=(?:s|t|re|ve|ll|d|m)\b)")
_WIKITEXT_RULES = (
    (re.compile(r"(?<=\w)-(?=\w)"), " @-@ "),
    (re.compile(r"(?<=\d),(?=\d{3}\b)"), " @,@ "),
    (re.compile(r"(?<=\d)\.(?=\d)"), " @.@ "),
    (_CONTRACTION, " '"),
    (re.compile(r"(?<=[A-Za-z]s)'(?=\s|$)"), " '"),
    (re.compile(r"\.{3,}"), " ... "),
    (re.compile(r'(["()\[\]{};:!?$%&/+=#*°£€–—…]|(?<!@),(?!@))'), r" \1 "),
    (re.compile(r"(?:^|(?<=\s))'(?=\w{3,})"), "' "),
    (re.compile(r"(?<=[\w.,!?])'(?=\s|$)"), " '"),
)


def _wikitext_words(line: str, vocabulary: Container[str]) -> list[str]:
    line = line.translate(_QUOTES)
    for pattern, replacement in _WIKITEXT_RULES:
        line = pattern.sub(replacement, line)
    return _split_full_stops(line.split(), vocabulary)


def _split_full_stops(words: list[str], vocabulary: Container[str]) -> list[str]:
    """Part a full stop from its word, unless the word is a known abbreviation inside a line."""
    result = []
    for place, word in enumerate(words):
        ends_line = place == len(words) - 1
        is_abbreviation = bool(_ABBREVIATION.match(word)) and word in vocabulary
        has_initials = word.count(".") > 1 or len(word) == 2
        if len(word) > 1 and word.endswith(".") and word.strip("."):
            if not is_abbreviation or (ends_line and not has_initials):
                result += [word[:-1], "."]
                continue
        result.append(word)
    return result


_PTB_NUMBER = re.compile(r"^[+-]?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:st|nd|rd|th|s)?$")
_PTB_RULES = (
    (re.compile(r"(?<=\w)n't\b"), " n't"),
    (re.compile(r"(?<=\w)'(?=(?:s|re|ve|ll|d|m)\b)"), " '"),
    (re.compile(r"(?<=s)'(?=\s|$)"), " '"),
    (re.compile(r"([$#&])(?=\d|\s|$)|(?<=\s)([$#&])"), r" \1\2 "),
    (re.compile(r"(?<=\d)\s?%"), " N "),  # the corpus has a number for the sign, too
    (re.compile(r'["()\[\]{};:!?…–—%]|--|,(?!\d)|(?<!\w)\'(?!(?:s|t|re|ve|ll|d|m)\b)(?=\w)'), " "),
)


def _ptb_words(line: str, vocabulary: Container[str]) -> list[str]:
    line = line.translate(_QUOTES).lower().replace("cannot", "can not")
    for pattern, replacement in _PTB_RULES:
        line = pattern.sub(replacement, line)
    words = []
    for word in line.split():
        bare_word = word.rstrip(".,")
        if word not in vocabulary and (bare_word in vocabulary or word != bare_word):
            word = bare_word
        if _PTB_NUMBER.match(word) and word not in vocabulary:
            word = "N"
        if word:
            words.append("N" if word == "n" else word)
    return words


_JOINED = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([.,;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$£]) "), r"\1"),
    (re.compile(r" ('(?:s|t|re|ve|ll|d|m)\b|n't\b)"), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r" ?<eos> ?"), "\n"),
)


def detokenize(text: str) -> str:
    """Readable text from a corpus's form, as a tokenizer decodes it; lossy, for display."""
    text = text.lstrip(" ")
    for pattern, replacement in _JOINED:
        text = pattern.sub(replacement, text)
    return text
