"""Rewards and log-probs of responses that have ended, while others are still being generated."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from mssr.cluster.base import join_log_probs
from mssr.data_config import RewardConfig
from mssr.errors import StopRequestedError, TrainingError
from mssr.rewards import RewardInput, RewardResult, ScoredBatch, Scorer, ScoringStream
from mssr.rewards.batch import Outcome
from mssr.trainer.early_scores import PARTS, EarlyScores
from mssr.trainer.response_lengths import ResponseLengths
from mssr.types import RankLogProbs, Rollout, TokenLogProbs, TrainBatch

pytestmark = pytest.mark.unit
BOX = "<think>so</think>\\boxed{%s}"


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    with Scorer(RewardConfig(name="exact_match", workers=1), 100) as scorer:
        yield scorer


def inputs(count: int) -> list[RewardInput]:
    return [RewardInput(BOX % (i if i % 3 else "no"), str(i), 5) for i in range(count)]


def test_a_batch_that_comes_in_pieces_scores_as_a_whole(scorer: Scorer) -> None:
    items = inputs(40)
    whole = scorer.score(items)
    order = np.random.default_rng(0).permutation(40)
    with ScoringStream(scorer) as stream:
        for i in order:
            stream.add(int(i), items[i])
        streamed = stream.result()
    np.testing.assert_array_equal(streamed.scores, whole.scores)
    assert streamed.parts.keys() == whole.parts.keys() and 0 < whole.scores.sum() < 40
    for name, values in whole.parts.items():
        np.testing.assert_array_equal(streamed.parts[name], values)


class Recorded(Scorer):
    """Scores nothing; the first part waits until it is let go."""

    def __init__(self) -> None:
        self.parts: list[int] = []
        self.began, self.go = threading.Event(), threading.Event()

    def outcomes(self, items: Sequence[RewardInput]) -> list[Outcome]:
        self.parts.append(len(items))
        self.began.set()
        assert self.go.wait(10)
        if items[0].response == "bad":
            raise TrainingError("the processes that score rewards keep dying")
        return [RewardResult(float(item.answer)) for item in items]

    def combine(self, inputs: Sequence[RewardInput], outcomes: Sequence[Outcome]) -> ScoredBatch:
        scores = [o.score for o in outcomes if isinstance(o, RewardResult)]
        return ScoredBatch(np.array(scores, np.float32), {}, 0)


def test_scoring_begins_before_the_last_response_and_takes_what_has_come() -> None:
    scorer = Recorded()
    items = inputs(5)
    with ScoringStream(scorer) as stream:
        stream.add(0, items[0])
        assert scorer.began.wait(10)  # though 4 are missing
        for i in range(1, 5):
            stream.add(i, items[i])
        scorer.go.set()
        assert stream.result().scores.tolist() == [0, 1, 2, 3, 4]
    assert scorer.parts == [1, 4]


def test_an_error_in_the_thread_is_raised_and_an_abandoned_batch_ends() -> None:
    scorer = Recorded()
    scorer.go.set()
    with pytest.raises(TrainingError, match="keep dying"), ScoringStream(scorer) as stream:
        stream.add(0, RewardInput("bad", "", 1))
        stream.result()
    held = Recorded()
    with pytest.raises(StopRequestedError), ScoringStream(held) as stream:
        stream.add(0, inputs(1)[0])
        assert held.began.wait(10)
        for i in range(1, 4):
            stream.add(i, inputs(1)[0])
        threading.Timer(0.2, held.go.set).start()
        raise StopRequestedError
    assert held.parts == [1] and not stream._thread.is_alive()


def test_who_is_in_a_hurry_does_not_wait_for_a_response_that_hangs() -> None:
    hanging = Recorded()
    with pytest.raises(KeyboardInterrupt), ScoringStream(hanging) as stream:
        stream.add(0, inputs(1)[0])
        assert hanging.began.wait(10)
        raise KeyboardInterrupt
    assert stream._thread.is_alive() and stream._thread.daemon
    hanging.go.set()


def rollout(index: int, length: int) -> Rollout:
    tokens = np.full(length, index, np.int32)
    return Rollout(
        f"p{index}", 0, np.arange(3, dtype=np.int32), tokens, np.zeros(length, np.float32), "stop", 0, ""
    )


class Ranks:
    """Score a token by its prompt and by how many sequences were in the batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, ...]] = []

    def log_probs(self, batch: TrainBatch, reference: bool) -> TokenLogProbs:
        self.batches.append(batch.prompt_ids)
        ends = batch.offsets[1:-1] - 3 * np.arange(1, len(batch))
        tokens = [batch.tokens[a + 3 : b] for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]
        assert len(ends) == len(batch) - 1
        policy = np.concatenate(tokens).astype(np.float32) + len(batch) / 100
        return TokenLogProbs(policy, -policy if reference else None)


@pytest.mark.parametrize("reference", [True, False])
def test_parts_are_scored_as_soon_as_they_are_complete_and_do_not_depend_on_time(reference: bool) -> None:
    rng = np.random.default_rng(0)
    rollouts = [rollout(i, int(rng.integers(1, 6))) for i in range(50)]
    order = rng.permutation(50).tolist()
    results = []
    for seed in (1, 2):
        ranks = Ranks()
        with EarlyScores(ranks, order, reference) as early:  # type: ignore[arg-type]
            arrival = np.random.default_rng(seed).permutation(50).tolist()
            for i in arrival[:-1]:
                early.add(i, rollouts[i])
            early._results[next(iter(early._results))].result(timeout=10)  # before the last one came
            early.add(arrival[-1], rollouts[arrival[-1]])
            results.append(early.result())
        assert len(ranks.batches) == PARTS
        assert sorted(sum(ranks.batches, ())) == sorted(f"p{i}" for i in range(50))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert len(a.policy) == len(rollouts[i].response_token_ids) and int(a.policy[0]) == i
        np.testing.assert_array_equal(a.policy, b.policy)
        assert (a.reference is not None) == reference


def test_long_responses_are_expected_of_prompts_that_had_them() -> None:
    lengths = ResponseLengths()
    assert lengths.expected(["a", "b"]).tolist() == [0, 0]
    a, b = rollout(0, 4), rollout(1, 10)
    lengths.observe([a, a, b])
    lengths.observe([rollout(0, 2), rollout(0, 4)])  # the newest count, in their mean
    assert lengths.expected(["p1", "p0", "new"]).tolist() == [10, 3, 6.5]
    again = ResponseLengths()
    again.load_state_dict(lengths.state_dict())
    again.observe([rollout(7, 1)])
    assert again.expected(["p1", "p0", "p7"]).tolist() == [10, 3, 1]
    assert lengths.expected(["p7"]).tolist() == [6.5]


def test_what_ranks_scored_is_put_in_the_order_of_the_batch() -> None:
    lengths, prompts = np.array([2, 3, 1, 4]), np.array([1, 2, 3, 1])
    batch = TrainBatch(
        prompt_ids=("a", "b", "c", "d"),
        tokens=np.zeros(17, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths + prompts)]),
        prompt_lengths=prompts,
        advantages=np.zeros(4, np.float32),
        engine_log_probs=np.zeros(10, np.float32),
    )
    values = np.arange(10, dtype=np.float32)
    starts = batch.response_offsets

    def share(*own: int) -> RankLogProbs:
        policy = np.concatenate([values[starts[s] : starts[s + 1]] for s in own])
        return RankLogProbs(np.array(own), policy, 10 * policy)

    for shares in ([share(2, 0), share(3, 1)], [share(3, 2, 1, 0)]):
        joined = join_log_probs(shares, batch)
        np.testing.assert_array_equal(joined.policy, values)
        np.testing.assert_array_equal(joined.reference, 10 * values)
    with pytest.raises(AssertionError, match="twice or not at all"):
        join_log_probs([share(0, 1), share(3)], batch)
