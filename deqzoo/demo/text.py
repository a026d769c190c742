"""What the demo finds out about texts, and how it shows it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqzoo.data.lines import Fragment, read_lines
from deqzoo.data.text import END, UNKNOWN
from deqzoo.errors import UserError
from deqzoo.evaluation.perplexity import PerplexityReport, perplexity
from deqzoo.hub.catalogue import Entry
from deqzoo.models.deq_transformer.tokenization_deq_transformer import (
    detokenize,
    in_corpus_case,
    prepare_text,
    text_style,
)

from .guard import (
    MAX_NEW_WORDS,
    MAX_TEXT_CHARACTERS,
    MAX_TEXT_FILE_BYTES,
    Deadline,
    real_number,
    whole_number,
)
from .shelf import LoadedCheckpoint

SHOWN_TOKENS = 1500
FOCUSABLE_TOKENS = 400
FULL_COLOUR_BITS = 15.0
CANDIDATES = 40
#: Larger numbers do not pass through JSON unchanged.
MAX_SEED = 2**53


@dataclass(frozen=True)
class Token:
    """One scored word.

    Attributes:
        word: as it stands in the prepared text; `<eos>` ends a line.
        known: whether the vocabulary has it.
        bits: surprisal.
        steps: solver steps.
        converged: whether its equilibrium, and all before it, reached the tolerance.
    """

    word: str
    known: bool
    bits: float
    steps: int
    converged: bool


@dataclass(frozen=True)
class ScoredText:
    """A text's figures and its tokens in order."""

    report: PerplexityReport
    tokens: list[Token]


@dataclass(frozen=True)
class WrittenText:
    """A growing text.

    Attributes:
        text: what has been added to the prompt so far, readable.
        steps: solver steps of each added word.
        unconverged: added words whose equilibrium missed the tolerance.
    """

    text: str
    steps: list[int]
    unconverged: int


def check_text(text: Any) -> str:
    """A user's text within the limits.

    Raises:
        UserError: no text, an empty one, or one that is too long.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError("the text is empty: write, paste or upload some words")
    if len(text) > MAX_TEXT_CHARACTERS:
        raise UserError(
            f"the text has {len(text):,} characters; this page takes up to "
            f"{MAX_TEXT_CHARACTERS:,}. For more, run: deqzoo perplexity FILE"
        )
    return text


def read_text_file(path: Any) -> str:
    """The text of an uploaded file.

    Raises:
        UserError: too large, or no UTF-8 text.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_TEXT_FILE_BYTES:
        raise UserError(
            f"{path.name} has {size / 1e6:.1f} MB; this page takes text files up to "
            f"{MAX_TEXT_FILE_BYTES / 1e6:.1f} MB. For more, run: deqzoo perplexity FILE"
        )
    try:
        return check_text(_text_of(path))
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error


def _text_of(path: Path) -> str:
    """The beginning of a file's text, up to the limit: a compressed file may be endless."""
    parts, length = [], 0
    for line in read_lines(path):
        parts.append(line if isinstance(line, Fragment) else line.rstrip("\r\n") + "\n")
        length += len(line)
        if length > MAX_TEXT_CHARACTERS:
            break
    return "".join(parts)


def score(
    checkpoint: LoadedCheckpoint, text: str, solver: dict[str, Any] | None = None
) -> ScoredText:
    """Perplexity of a text with every token's surprisal and steps.

    Raises:
        UserError: no words in it, or the time limit is over.
    """
    deadline = Deadline()
    steps: list[int] = []
    converged: list[bool] = []

    def watch(_: Tensor, outputs: Any) -> None:
        deadline.check()
        steps.extend(outputs.token_steps[0].tolist())
        converged.extend(outputs.token_converged[0].tolist())

    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    report = perplexity(
        checkpoint.model,
        lines,
        checkpoint.reader,
        keep_surprisal=True,
        solver=solver,
        on_segment=watch,
    )
    vocabulary = checkpoint.reader.get_vocab()
    words = [word for line in lines for word in [*_words(checkpoint, line), END]]
    tokens = [
        Token(word, word in vocabulary and word != UNKNOWN, nats / math.log(2), n, ok)
        for word, (_, nats), n, ok in zip(words, report.surprisal, steps, converged, strict=True)
    ]
    return ScoredText(report, tokens)


def _words(checkpoint: LoadedCheckpoint, text: str) -> list[str]:
    """Words of a raw text in the form of the model's corpus."""
    style = text_style(checkpoint.reader)
    prepared_text = prepare_text(text, checkpoint.reader.get_vocab(), style).text
    return in_corpus_case(prepared_text, style).split()


def _prompt(checkpoint: LoadedCheckpoint, text: str) -> Tensor:
    """The end of a text as word indices (1, T), as much of it as the model's window holds."""
    vocabulary = checkpoint.reader.get_vocab()
    unknown, end = vocabulary[UNKNOWN], vocabulary[END]
    indices = [end]
    for number, line in enumerate(text.strip().split("\n")):
        indices += [end] if number else []
        indices += [vocabulary.get(word, unknown) for word in _words(checkpoint, line)]
    return torch.tensor([indices[-checkpoint.model.config.window :]])


@torch.inference_mode()
def next_words(
    checkpoint: LoadedCheckpoint, text: str, count: int = 8, solver: dict[str, Any] | None = None
) -> list[tuple[str, float]]:
    """The most probable continuations of a text, with their probabilities."""
    output = checkpoint.model(_prompt(checkpoint, text), logits_to_keep=1, solver=solver)
    probabilities = output.logits[0, -1].float().softmax(-1)
    unknown = checkpoint.reader.get_vocab()[UNKNOWN]
    best = probabilities.topk(min(count + 1, len(probabilities)))
    words = checkpoint.reader.convert_ids_to_tokens(best.indices.tolist())
    candidates = zip(words, best.indices.tolist(), best.values.tolist(), strict=True)
    return [(word, p) for word, index, p in candidates if index != unknown][:count]


def check_writing(length: Any, temperature: Any) -> tuple[int, float]:
    """Length and temperature within the limits.

    Raises:
        UserError: out of range.
    """
    words = whole_number(length, "the number of words", 1, MAX_NEW_WORDS)
    return words, real_number(temperature, "the temperature", 0.0, 2.0)


def check_seed(seed: Any) -> int | None:
    """A seed within the limits; None for a new one each time.

    Raises:
        UserError: out of range.
    """
    number = -1 if seed is None else whole_number(seed, "the seed", -1, MAX_SEED)
    return None if number < 0 else number


@torch.inference_mode()
def _step(
    checkpoint: LoadedCheckpoint, ids: Tensor, cache: Any, solver: dict[str, Any] | None
) -> Any:
    use_cache = checkpoint.model.config.has_equilibrium
    return checkpoint.model(ids, cache=cache, use_cache=use_cache, logits_to_keep=1, solver=solver)


def write(
    checkpoint: LoadedCheckpoint,
    prompt: str,
    length: int,
    temperature: float = 0.8,
    seed: int | None = None,
    solver: dict[str, Any] | None = None,
) -> Iterator[WrittenText]:
    """Continue a text word by word; the state is yielded after each word.

    Args:
        length: words to add.
        temperature: 0 takes the most probable word; otherwise one of the best 40 is drawn.
        seed: of the drawing.

    Raises:
        UserError: the time limit is over.
    """
    deadline = Deadline()
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    unknown = checkpoint.reader.get_vocab()[UNKNOWN]
    ids, cache = _prompt(checkpoint, prompt), None
    added_ids: list[int] = []
    steps: list[int] = []
    n_unconverged = 0
    new = ids
    for _ in range(length):
        deadline.check()
        output = _step(checkpoint, new, cache, solver)
        cache = output.cache
        token_id = _choose(output.logits[0, -1], temperature, unknown, generator)
        steps.append(int(output.token_steps[0, -1]))
        n_unconverged += int(not output.token_converged[0, -1])
        added_ids.append(token_id)
        ids = torch.cat([ids, torch.tensor([[token_id]])], dim=1)
        new = ids if cache is None else ids[:, -1:]
        words = checkpoint.reader.convert_ids_to_tokens(added_ids)
        yield WrittenText(detokenize(" ".join(words)), list(steps), n_unconverged)


def _choose(logits: Tensor, temperature: float, unknown: int, generator: torch.Generator) -> int:
    logits = logits.float().clone()
    logits[unknown] = -math.inf
    if temperature == 0:
        return int(logits.argmax())
    best = logits.topk(min(CANDIDATES, len(logits)))
    weights = (best.values / temperature).softmax(-1)
    return int(best.indices[torch.multinomial(weights, 1, generator=generator)])


def readable(text: str) -> str:
    """Generated text without the corpus's marks of headings."""
    return re.sub(r"\s*(?:= ?)+([^=\n]+?)(?: ?=)+\s*", r"\n\n\1\n\n", text)


#: Marks of the corpus -> as people write them.
_MARKS = {"@-@": "-", "@,@": ",", "@.@": "."}
_NO_SPACE_BEFORE = re.compile(r"[.,;:!?%)\]]|'(s|t|re|ve|ll|d|m)|n't|@[-,.]@")
_NO_SPACE_AFTER = re.compile(r"[(\[$£]|@[-,.]@")


def _has_space(word: str, next_word: str | None) -> bool:
    """Whether a space stands between two words of the corpus."""
    if next_word is None or _NO_SPACE_AFTER.fullmatch(word):
        return False
    return not _NO_SPACE_BEFORE.fullmatch(next_word)


def figures_html(scored_text: ScoredText, entry: Entry | None = None) -> str:
    """The text's figures as a row of cards; `entry` is the checkpoint, for a scale."""
    figures = scored_text.report.to_dict()
    test_perplexity = None if entry is None else entry.best_test("perplexity")
    scale = (
        ""
        if test_perplexity is None
        else f"; {test_perplexity:,.0f} on the test texts of its corpus"
    )
    n_unconverged = scored_text.report.unconverged
    cards = [
        (
            f"{figures['perplexity']:,.1f}",
            "perplexity per word",
            f"as unsure as among so many words{scale}",
        ),
        (f"{figures['bits_per_character']:.2f}", "bits per character", "to write the text down"),
        (f"{figures['unknown_share']:.1%}", "unknown words", f"of {figures['tokens']:,} tokens"),
        (
            f"{figures['n_steps_mean']:.1f}",
            "solver steps per word",
            f"at most {figures['n_steps_max']}; "
            + (f"{n_unconverged:,} not converged" if n_unconverged else "all converged"),
        ),
    ]
    return (
        '<div class="dz-figures">'
        + "".join(
            f'<div class="dz-figure"><b>{value}</b><span>{name}</span><small>{note}</small></div>'
            for value, name, note in cards
        )
        + "</div>"
    )


def tokens_html(scored_text: ScoredText) -> str:
    """The text with every word coloured by surprisal or by solver steps, details on hover."""
    shown_tokens = scored_text.tokens[:SHOWN_TOKENS]
    most = max(token.steps for token in scored_text.tokens)
    least = min(token.steps for token in scored_text.tokens)
    focus = ' tabindex="0"' if len(shown_tokens) <= FOCUSABLE_TOKENS else ""
    spans = [
        _span(token, least, most, focus, next_token)
        for token, next_token in zip(shown_tokens, [*shown_tokens[1:], None], strict=True)
    ]
    unknown = (
        '<span class="dz-ends"><span class="dz-unknown">word</span> not in the vocabulary, read '
        f"as {escape(UNKNOWN)}</span>"
        if any(not token.known for token in shown_tokens)
        else ""
    )
    n_hidden = len(scored_text.tokens) - len(shown_tokens)
    more = (
        f'<p class="dz-note">The first {len(shown_tokens):,} tokens; '
        f"{n_hidden:,} more were measured.</p>"
    )
    return (
        '<div class="dz-tokens"><fieldset class="dz-switch"><legend>Colour the words by</legend>'
        '<label><input type="radio" name="dz-colour" checked/> surprisal</label>'
        '<label><input type="radio" name="dz-colour" class="dz-by-steps"/> solver steps</label>'
        '<span class="dz-scale"><i></i></span>'
        f'<span class="dz-ends"><span class="dz-on-surprise">0 to {FULL_COLOUR_BITS:.0f} bits or '
        f'more</span><span class="dz-on-steps">{least} to {most} steps</span></span>'
        f"{unknown}</fieldset>"
        f'<p class="dz-text">{"".join(spans)}</p>{more if n_hidden else ""}</div>'
    )


def _span(token: Token, least: int, most: int, focus: str, next_token: Token | None) -> str:
    surprise = min(token.bits / FULL_COLOUR_BITS, 1.0)
    effort = (token.steps - least) / max(most - least, 1)
    ends_line = token.word == END
    name = "end of the line" if ends_line else token.word
    unknown = "" if token.known else ", not in the vocabulary"
    state = "" if token.converged else ", not converged"
    steps = f"{token.steps} solver step" + ("" if token.steps == 1 else "s")
    tip = escape(f"{name}: {token.bits:.1f} bits{unknown} · {steps}{state}", quote=True)
    kind = "dz-token" + ("" if token.known else " dz-unknown")
    word = "⏎" if ends_line else escape(_MARKS.get(token.word, token.word))
    has_space = _has_space(token.word, None if next_token is None else next_token.word)
    after = "<br/>" if ends_line else " " if has_space else ""
    return (
        f'<span class="{kind}" style="--s:{surprise:.2f};--e:{effort:.2f}" data-tip="{tip}" '
        f'aria-label="{tip}"{focus}>{word}</span>{after}'
    )


def next_words_html(suggestions: list[tuple[str, float]]) -> str:
    """Suggestions as bars."""
    longest = max((p for _, p in suggestions), default=1.0)
    rows = "".join(
        f"<tr><th>{'end of the line' if word == END else escape(_MARKS.get(word, word))}</th>"
        f'<td><div class="dz-bar"><i style="width:{100 * p / longest:.0f}%"></i></div></td>'
        f"<td>{p:.1%}</td></tr>"
        for word, p in suggestions
    )
    return f'<h3 class="dz-h">How would it go on?</h3><table class="dz-next">{rows}</table>'
