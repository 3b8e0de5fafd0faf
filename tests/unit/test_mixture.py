"""The shares of a mixture are its weights, over any stretch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mssr.data.sampler import EpochSampler, MixtureSampler

pytestmark = pytest.mark.unit


def mixture(weights: dict[str, float], sizes: dict[str, int] | None = None) -> MixtureSampler:
    samplers = {
        label: EpochSampler([f"{label}/{i}" for i in range((sizes or {}).get(label, 10))], seed=k)
        for k, label in enumerate(weights)
    }
    return MixtureSampler(samplers, weights)


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    st.lists(st.integers(1, 17), min_size=1, max_size=20),
)
def test_shares_hold_at_every_moment(weights: list[float], counts: list[int]) -> None:
    named = {str(k): w for k, w in enumerate(weights)}
    sampler, drawn, total = mixture(named), Counter[str](), 0
    for count in counts:
        ids = sampler.next(count)
        assert len(ids) == count
        drawn.update(i.split("/")[0] for i in ids)
        total += count
        for label, weight in named.items():
            assert abs(drawn[label] - total * weight / sum(weights)) <= len(weights) - 1 + 1e-6


def test_exact_for_whole_ratios() -> None:
    sampler = mixture({"a": 3, "b": 1, "c": 2})
    for _ in range(50):
        assert Counter(i[0] for i in sampler.next(6)) == {"a": 3, "b": 1, "c": 2}


def test_every_source_is_walked_whole() -> None:
    sampler = mixture({"a": 1, "b": 1}, {"a": 4, "b": 8})
    ids = sampler.next(16)
    assert Counter(i for i in ids if i[0] == "a") == {f"a/{i}": 2 for i in range(4)}
    assert Counter(i for i in ids if i[0] == "b") == {f"b/{i}": 1 for i in range(8)}
    assert sampler.epoch == pytest.approx(1.5)


def test_order_does_not_depend_on_the_size_of_the_step() -> None:
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    one, other = mixture(weights), mixture(weights)
    assert one.next(60) == [i for _ in range(12) for i in other.next(5)]


def test_goes_on_from_its_state() -> None:
    weights = {"a": 0.7, "b": 0.3}
    first, second = mixture(weights), mixture(weights)
    first.next(13)
    second.load_state_dict(first.state_dict())
    assert first.next(40) == second.next(40)
    with pytest.raises(ValueError, match="shares"):
        mixture({"a": 0.7, "b": 0.4}).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="prompts"):
        mixture(weights, {"a": 3}).load_state_dict(first.state_dict())


def test_wrong_weights() -> None:
    with pytest.raises(ValueError, match="sources"):
        MixtureSampler({}, {})
    with pytest.raises(ValueError, match="above 0"):
        mixture({"a": 0.0})
