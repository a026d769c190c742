"""Where generation stops: at strings, for a tokenizer of whole words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopWords(StoppingCriteria):
    """Ends a text whose newest word completes one of some strings.

    Args:
        strings: one or several; none of them empty.
        tokenizer: of the model.

    Raises:
        ValueError: there is an empty one, or none.
    """

    def __init__(self, strings: str | list[str], tokenizer: Any) -> None:
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        if not self.strings or not all(self.strings):
            raise ValueError(f"stop_strings must be strings that are not empty, got {strings!r}")
        self.tokenizer = tokenizer
        # A word has at least one letter; one word more gives the space before the first.
        self.n_words = max(map(len, self.strings)) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which of the texts (B, T) end: (B,) bool."""
        ends = [self._ends(words) for words in input_ids[:, -self.n_words :].tolist()]
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)

    def _ends(self, words: list[int]) -> bool:
        text, before = self.tokenizer.decode(words), self.tokenizer.decode(words[:-1])
        return any(s in text[max(0, len(before) - len(s) + 1) :] for s in self.strings)
