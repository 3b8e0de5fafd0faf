"""Rewards and log-probs of responses that have ended, while others are still being generated."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from mssr.cluster.base import join_log_probs
from mssr.config.data import RewardConfig
from mssr.errors import StopRequestedError
from mssr.rewards import RewardInput, Scorer, ScoringStream
from mssr.trainer.early_log_probs import PARTS, EarlyLogProbs
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


def test_scoring_begins_before_the_last_response_has_come(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def f(response, answer):\n    open(answer, 'w').close()\n    return 0.5\n")
    with Scorer(RewardConfig(name=f"{path}:f", workers=1), 100) as scorer, ScoringStream(scorer) as stream:
        stream.add(1, RewardInput("", str(tmp_path / "1"), 1))
        while not (tmp_path / "1").exists():  # or the test is ended
            time.sleep(0.01)
        stream.add(0, RewardInput("", str(tmp_path / "0"), 1))
        assert stream.result().scores.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("error", [StopRequestedError, KeyboardInterrupt])
def test_an_abandoned_batch_keeps_nobody_waiting(tmp_path: Path, error: type[BaseException]) -> None:
    """Neither who abandons it nor the batch that comes next waits for a response that hangs."""
    path = tmp_path / "reward.py"
    path.write_text("import time\ndef f(response, answer): return time.sleep(1e6) if response else 0.5\n")
    config = RewardConfig(name=f"{path}:f", workers=1, time_limit_s=1e5)
    with Scorer(config, 100) as scorer:
        with pytest.raises(error), ScoringStream(scorer) as stream:
            stream.add(0, RewardInput("hang", "", 1))
            future = scorer.pool.submit(RewardInput("hang", "", 1))
            raise error
        assert future.cancelled()
        assert scorer.score([RewardInput("", "", 1)]).scores.tolist() == [0.5]


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
        with EarlyLogProbs(ranks, order, reference) as early:  # type: ignore[arg-type]
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
        return RankLogProbs(policy, 10 * policy, np.array(own))

    for shares in ([share(2, 0), share(3, 1)], [share(3, 2, 1, 0)]):
        joined = join_log_probs(shares, batch)
        np.testing.assert_array_equal(joined.policy, values)
        np.testing.assert_array_equal(joined.reference, 10 * values)
    with pytest.raises(AssertionError, match="twice or not at all"):
        join_log_probs([share(0, 1), share(3)], batch)
