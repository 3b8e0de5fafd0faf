"""Statistics of evaluations, by value against closed forms, enumeration and hand-computed examples."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from mssr.errors import UserError
from mssr.evaluation import statistics
from mssr.evaluation.statistics import (
    average,
    bolded_steps,
    bootstrap,
    keeps_format,
    ks,
    maj_at_k,
    paired_bootstrap,
    pass_at_k,
)

pytestmark = pytest.mark.unit


# The bootstrap


def test_the_interval_of_an_accuracy_is_that_of_the_binomial_distribution() -> None:
    # The bootstrap of m scores of 0 and 1 is binomial: quantiles of B(200, 0.3) / 200.
    result = bootstrap(np.array([1.0] * 60 + [0.0] * 140), seed=0)
    assert result.value == pytest.approx(0.3)
    assert result.replicates.std() == pytest.approx(math.sqrt(0.3 * 0.7 / 200), rel=0.03)
    low, high = result.interval()
    cdf = np.cumsum([math.comb(200, i) * 0.3**i * 0.7 ** (200 - i) for i in range(201)])
    assert low == pytest.approx(np.searchsorted(cdf, 0.025) / 200, abs=0.0051)
    assert high == pytest.approx(np.searchsorted(cdf, 0.975) / 200, abs=0.0051)
    narrow = result.interval(0.5)
    assert low < narrow[0] < 0.3 < narrow[1] < high


def test_it_is_the_plain_bootstrap_of_resampled_items() -> None:
    means = np.array([0.0, 0.25, 0.25, 0.5, 1.0, 1.0, 0.75])
    draws = np.random.default_rng(5).integers(0, len(means), (40_000, len(means)))
    plain = means[draws].mean(axis=1)
    ours = bootstrap(means, seed=5, resamples=40_000).replicates
    assert ours.mean() == pytest.approx(plain.mean(), abs=0.003)
    assert ours.std() == pytest.approx(plain.std(), rel=0.02)
    # All means lie on a grid of 1/28; every one of them is as frequent as in the plain bootstrap.
    frequencies = [np.bincount(np.rint(x * 28).astype(int), minlength=29) / 40_000 for x in (plain, ours)]
    assert np.abs(frequencies[0] - frequencies[1]).max() < 0.01


def test_samples_of_an_item_are_not_independent_items() -> None:
    # 50 items, 8 samples each, all samples of an item the same: no more is known than from one sample.
    one = bootstrap(np.array([1.0, 0.0] * 25))
    width = np.subtract(*one.interval()[::-1])
    as_items = bootstrap(np.array([1.0, 0.0] * 25 * 8))
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 50), rel=0.05)
    assert np.subtract(*as_items.interval()[::-1]) == pytest.approx(width / math.sqrt(8), rel=0.1)


def test_the_bootstrap_is_seeded_and_knows_no_order() -> None:
    means = np.random.default_rng(0).integers(0, 5, 100) / 4
    a, b = bootstrap(means, seed=[1, 2]), bootstrap(means[::-1], seed=[1, 2])
    assert (a.replicates == b.replicates).all() and a.value == b.value
    assert (a.replicates != bootstrap(means, seed=[1, 3]).replicates).any()


def test_the_bootstrap_in_parts_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    means = np.random.default_rng(0).random(50)
    monkeypatch.setattr(statistics, "_CHUNK", 50 * 64)
    result = bootstrap(means, resamples=1000)
    assert result.replicates.shape == (1000,)
    assert result.replicates.std() == pytest.approx(means.std() / math.sqrt(50), rel=0.1)


def test_all_right_and_no_items() -> None:
    assert bootstrap(np.ones(3)).interval() == (1.0, 1.0)
    with pytest.raises(ValueError, match="no items"):
        bootstrap(np.array([]))


def test_the_average_of_independent_benchmarks() -> None:
    parts = [
        bootstrap(np.array([1.0, 0.0] * 50), seed=1),
        bootstrap(np.array([1.0, 0.0, 0.0, 0.0] * 100), seed=2),
    ]
    both = average(parts)
    assert both.value == pytest.approx((0.5 + 0.25) / 2)
    expected = math.sqrt(0.25 / 100 + 0.1875 / 400) / 2
    assert both.replicates.std() == pytest.approx(expected, rel=0.03)


# Differences


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    # Two evaluations of accuracy 0.5 and 0.53 that disagree on 5 of 100 items only: -1 once, +1 four times.
    first = {str(i): float(i % 2) for i in range(100)}
    second = first | {"0": 1.0, "2": 1.0, "4": 1.0, "6": 1.0, "1": 0.0}
    result = paired_bootstrap(first, second)
    assert result.value == pytest.approx(0.03)
    deviation = math.sqrt((5 / 100 - 0.03**2) / 100)
    assert result.replicates.std() == pytest.approx(deviation, rel=0.03)
    low, high = result.interval()
    assert low == pytest.approx(-0.01, abs=0.0051) and high == pytest.approx(0.07, abs=0.0151)
    # The difference is 1.36 standard errors; resamples lie on a grid of 0.01.
    assert 0.1 < result.p_value() < 0.3
    back = paired_bootstrap(second, first)
    assert back.value == pytest.approx(-0.03)
    assert back.p_value() == pytest.approx(result.p_value(), abs=0.02)


def test_p_values_at_both_ends() -> None:
    items = {str(i): float(i % 2) for i in range(400)}
    assert paired_bootstrap(items, items).p_value() == 1.0
    better = {i: 1.0 for i in items}
    assert paired_bootstrap(items, better, resamples=999).p_value() == pytest.approx(0.001)


def test_p_values_are_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(3)
    values = []
    for i in range(300):
        a, b = rng.random((2, 150)) < 0.6
        pair = [{str(j): float(x) for j, x in enumerate(side)} for side in (a, b)]
        values.append(paired_bootstrap(pair[0], pair[1], seed=i, resamples=500).p_value())
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.09
    assert np.mean(values) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": 1.0, "b": 0.0}, {"a": 1.0}, "1 of 2 items of old, b the first, are not in new"),
        ({"a": 1.0}, {"a": 1.0, "c": 1.0, "b": 0.0}, "2 of 3 items of new, b the first, are not in old"),
    ],
)
def test_items_must_match(first: dict[str, float], second: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        paired_bootstrap(first, second, ("old", "new"))


# pass@k


def test_pass_at_k_by_hand() -> None:
    # One item, 5 samples, 2 right: 1 - C(3, k)/C(5, k).
    assert [pass_at_k([2], 5, k) for k in (1, 2, 3, 4, 5)] == pytest.approx([0.4, 0.7, 0.9, 1.0, 1.0])
    assert pass_at_k([0, 5, 2], 5, 2) == pytest.approx((0 + 1 + 0.7) / 3)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_is_the_mean_over_subsets(n: int) -> None:
    for c in range(n + 1):
        samples = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = [any(s) for s in itertools.combinations(samples, k)]
            assert pass_at_k([c], n, k) == pytest.approx(np.mean(subsets))


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert pass_at_k([1], 2000, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize(("correct", "n", "k"), [([1], 4, 5), ([1], 4, 0), ([5], 4, 1), ([], 4, 1)])
def test_pass_at_k_refuses_nonsense(correct: list[int], n: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(correct, n, k)


def test_the_reported_ks() -> None:
    assert ks(1) == [1] and ks(2) == [1, 2] and ks(8) == [1, 2, 4, 8] and ks(10) == [1, 2, 4, 8, 10]


# maj@k


def test_maj_at_n_by_hand() -> None:
    def vote(answers: list[str | None], truth: str) -> float:
        return maj_at_k([answers], [[a == truth for a in answers]], len(answers))

    assert vote(["A", "B", "A"], "A") == 1.0
    assert vote(["A", "B", "A"], "B") == 0.0
    assert vote(["A", "B", None], "A") == 0.5  # of equals each has its share
    assert vote(["A", "B", "C", None, None, None], "C") == pytest.approx(1 / 3)
    assert vote([None, None, None, "A"], "A") == 1.0  # a missing answer votes for nothing
    assert vote([None, None], "A") == 0.0
    assert vote(["", "A"], "A") == 1.0


def test_forms_of_the_same_answer_are_counted_together() -> None:
    answers = [["two  Apples", "Two apples", "three"]]
    assert maj_at_k(answers, [[True, True, False]], 3) == 1.0
    # The judge contradicts itself: the answer is right as often as it was judged so.
    assert maj_at_k(answers, [[True, False, False]], 3) == 0.5


def test_maj_at_k_below_n_by_hand() -> None:
    # A A B C, truth A, k = 2: AA wins (1 of 6 pairs), AB and AC tie (4 of 6), BC loses (1 of 6).
    answers: list[str | None] = ["A", "A", "B", "C"]
    assert maj_at_k([answers], [[True, True, False, False]], 2) == pytest.approx(1 / 6 + 4 / 6 / 2)
    # Missing answers are drawn, but do not vote: A - -, k = 2: with A (2 of 3 pairs) it wins.
    assert maj_at_k([["A", None, None]], [[True, False, False]], 2) == pytest.approx(2 / 3)
    assert maj_at_k([answers, answers], [[True, True, False, False], [False] * 4], 1) == pytest.approx(0.25)


def test_maj_at_k_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(0)
    for _ in range(150):
        n = rng.randint(1, 8)
        answers = [rng.choice(["A", "A", "B", "C", "D", None]) for _ in range(n)]
        truth = rng.choice("ABCD")
        k = rng.randint(1, n)
        shares = []
        for subset in itertools.combinations(answers, k):
            counts = Counter(a for a in subset if a is not None)
            top = [a for a, count in counts.items() if count == max(counts.values())]
            shares.append((truth in top) / len(top) if top else 0.0)
        assert maj_at_k([answers], [[a == truth for a in answers]], k) == pytest.approx(np.mean(shares))


def test_maj_at_k_knows_no_order_of_samples() -> None:
    rng = random.Random(1)
    answers = [rng.choice("ABCDE") for _ in range(16)]
    values = set()
    for _ in range(5):
        rng.shuffle(answers)
        values.add(maj_at_k([list(answers)], [[a == "A" for a in answers]], 8))
    assert len(values) == 1


def test_maj_at_k_of_many_samples_draws_no_subsets() -> None:
    """There are 1.8e18 of them."""
    rng = random.Random(2)
    answers = [[str(min(rng.randint(0, 40), 20)) for _ in range(64)] for _ in range(20)]
    value = maj_at_k(answers, [[a == "20" for a in item] for item in answers], 32)
    assert value == pytest.approx(1.0, abs=1e-3)


def test_k_beyond_the_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 3, but an item has 2 samples"):
        maj_at_k([["A", "B"]], [[True, False]], 3)


# The form of responses


@pytest.mark.parametrize(
    ("response", "count"),
    [
        ("", 0),
        ("no step", 0),
        ("**Step 1:** look.\n**Step 2:** add **both**.", 3),
        ("**open only", 0),
        ("**one** and **open only", 1),
        ("2 ** 3", 0),
        ("**line\nbreak**", 0),
        ("****", 0),
        ("** **", 0),
        ("***very bold***", 1),
        ("*italic* text", 0),
        ("- **Angle:** 30\r\n- **Side:** 4\r\n", 2),
    ],
)
def test_bolded_steps(response: str, count: int) -> None:
    assert bolded_steps(response) == count


def test_bolded_steps_is_linear() -> None:
    """In quadratic time these would take an hour."""
    assert bolded_steps("**a " * 2_000_000) == 1_000_000
    assert bolded_steps("*" * 4_000_000) == 0


def test_format() -> None:
    assert keeps_format(r"<think>3 + 5</think> \boxed{8}")
    assert not keeps_format(r"\boxed{8}")
    assert not keeps_format(r"<think>3 + 5</think> 8")
    assert not keeps_format(r"<think>\boxed{8}")
