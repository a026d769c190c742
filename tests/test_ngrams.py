"""Kneser-Ney baselines: distributions, and a case by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scripts import ROOT, load_script


@pytest.fixture
def ngrams(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script("benchmarks/ngrams.py")


def test_every_order_is_a_distribution(ngrams) -> None:
    """After seen and unseen words, over a vocabulary with a word that never occurs."""
    draw = np.random.default_rng(0)
    train = draw.integers(0, 6, 200) * draw.integers(0, 2, 200)
    for before in ([1, 2, 3, 4], [0, 0, 0, 0], [6, 6, 1, 0], [5, 6, 6, 6]):
        last = [
            [p[-1] for p in ngrams.probabilities(train, np.array([*before, word]), 7)]
            for word in range(7)
        ]
        np.testing.assert_allclose(np.sum(last, axis=0), 1.0, rtol=1e-12)
        assert np.min(last) > 0


def test_two_words_by_hand(ngrams) -> None:
    """Train a b a c: the pairs ab, ba and ac; D = 1 where each occurs once."""
    train, test = np.array([0, 1, 0, 2]), np.array([0])
    one, *_ = ngrams.probabilities(train, test, 4)
    # a, b and c follow one word each: counts 1, D = 1, all of it goes to the uniform share.
    assert one.tolist() == [0.25]
    train = np.array([0, 1, 0, 1, 2, 1, 0, 0])
    # Words by how many others they follow: a after b and a, b after a and c, c after b.
    one, *_ = ngrams.probabilities(train, np.array([2]), 3)
    discount = 1 / (1 + 2 * 2)
    assert one[0] == pytest.approx((1 - discount) / 5 + discount * 3 / 5 / 3)
