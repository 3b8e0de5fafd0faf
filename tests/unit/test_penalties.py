"""Penalties by value, and their bounds on any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mssr.rewards.penalties import length_penalty, overlong_penalty, repetition_penalty

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (12, 0), (16, 0), (17, 0.25), (18, 0.5), (20, 1), (25, 1)]
)
def test_the_overlong_penalty_is_daposs(length: int, expected: float) -> None:
    assert overlong_penalty(length, max_length=20, buffer=4) == expected
    assert overlong_penalty(length, 20, 4, weight=0.5) == 0.5 * expected
    if length <= 20:  # the formula of the paper, which goes up to Lmax
        assert expected == -min(-(length - (20 - 4)) / 4, 0)


def test_the_length_penalty_is_proportional() -> None:
    assert [length_penalty(n, 20, 0.4) for n in (0, 5, 20, 30)] == pytest.approx([0, 0.1, 0.4, 0.4])


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ("", 2, 0),
        ("a", 2, 0),
        ("a a", 2, 0),  # one 2-gram
        ("a a a", 2, 1 / 2),
        ("a b c d", 2, 0),
        ("a b a b a b", 2, 3 / 5),
        ("a  b\na\tb", 2, 1 / 3),
        ("a a a a", 1, 3 / 4),
        ("a b c a b c", 3, 1 / 4),
        ("a b c a b c", 20, 0),
    ],
)
def test_the_repetition_penalty_is_the_fraction_of_repeated_ngrams(
    text: str, ngram: int, expected: float
) -> None:
    assert repetition_penalty(text, ngram) == pytest.approx(expected)
    assert repetition_penalty(text, ngram, 0.3) == pytest.approx(0.3 * expected)


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 5))
def test_repetition_counts_like_the_definition(text: str, ngram: int) -> None:
    words = text.split()
    ngrams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    repeated = sum(gram in ngrams[:i] for i, gram in enumerate(ngrams))
    assert repetition_penalty(text, ngram) == pytest.approx(repeated / len(ngrams) if ngrams else 0)


def test_long_texts_take_linear_time() -> None:
    """In quadratic time this would take an hour."""
    assert repetition_penalty("x " * 400_000, 20) == pytest.approx(1, abs=1e-4)
