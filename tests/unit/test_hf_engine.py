"""The transformers engine: seeded, exact sampling, and log-probs that are the actor's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mssr.actor.prompts import PromptCache
from mssr.data.prompt_source import PromptSource
from mssr.models.families import FAMILIES
from mssr.models.loading import load_model
from mssr.models.packing import pack
from mssr.models.policy import PolicyModel
from mssr.rollout.hf_engine import HfEngine
from mssr.rollout.queue import RequestQueue
from mssr.rollout.weights import InMemory
from mssr.runs.config import load_config
from mssr.types import Rollout, RolloutRequest, SamplingParams, TrainBatch
from tests.conftest import Workspace

pytestmark = pytest.mark.unit
PARAMS = SamplingParams(temperature=0.8, max_tokens=10)


@pytest.fixture(scope="module")
def engine(workspace: Workspace) -> HfEngine:
    return HfEngine(load_config(workspace.config), "cpu")


@pytest.fixture(scope="module")
def policy(workspace: Workspace) -> PolicyModel:
    return PolicyModel(load_model(load_config(workspace.config).model, torch.float32), temperature=0.8)


def requests(count: int) -> list[RolloutRequest]:
    return [RolloutRequest(f"t{i % 8}", i // 8, seed=1000 + i) for i in range(count)]


def tokens(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.response_token_ids.tolist() for r in rollouts]


def answers(engine: HfEngine, asked: list[RolloutRequest], params: SamplingParams) -> list[Rollout]:
    """The rollouts of these requests, in their order."""
    found = dict(pair for part in engine.generate(RequestQueue(enumerate(asked)), params) for pair in part)
    return [found[i] for i in range(len(asked))]


def test_what_is_sampled_depends_on_the_seed_alone(engine: HfEngine) -> None:
    both = requests(16)
    forward = tokens(answers(engine, both, PARAMS))
    backward = tokens(answers(engine, both[::-1], PARAMS))
    alone = [tokens(answers(engine, [r], PARAMS))[0] for r in both[:4]]
    assert forward == backward[::-1]
    assert forward[:4] == alone
    assert forward[0] != forward[8]  # the same prompt, another seed


@pytest.mark.parametrize("model_type", FAMILIES)
def test_log_probs_are_those_of_the_actor(workspace_of: Callable[[str], Workspace], model_type: str) -> None:
    """Prompts of two, one and no image in one batch."""
    config = load_config(workspace_of(model_type).config)
    policy = PolicyModel(load_model(config.model, torch.float32), temperature=0.8)
    rollouts = answers(HfEngine(config, "cpu"), requests(8), PARAMS)
    batch = TrainBatch.of(rollouts)
    cache = PromptCache(PromptSource(config), policy)
    with torch.no_grad():
        log_probs, _ = policy(pack(cache.items(batch, range(8)), policy.merge_size))
    np.testing.assert_allclose(log_probs.numpy(), batch.engine_log_probs, atol=1e-5)


def test_samples_follow_the_policy(engine: HfEngine, policy: PolicyModel, workspace: Workspace) -> None:
    """2,000 first tokens of one prompt against the exact distribution."""
    many = [RolloutRequest("t2", k, seed=k) for k in range(2000)]
    drawn = np.array([r.response_token_ids[0] for r in answers(engine, many, SamplingParams(0.8, 1))])
    source = PromptSource(load_config(workspace.config))
    ids = source.encoder.encode(source.row("t2")).token_ids
    with torch.no_grad():
        logits = policy.model(input_ids=ids[None], use_cache=False).logits[0, -1] / 0.8
    logits[policy.banned_ids] = float("-inf")
    probs = torch.softmax(logits, -1).numpy()
    observed = np.bincount(drawn, minlength=len(probs)) / len(drawn)
    # The expected distance of 2,000 exact draws is about half of sum sqrt(2 p (1 - p) / (pi n)).
    expected = 0.5 * np.sqrt(2 * probs * (1 - probs) / (np.pi * len(drawn))).sum()
    assert 0.5 * np.abs(observed - probs).sum() < 1.3 * expected


def test_limits_greedy_and_new_weights(engine: HfEngine, policy: PolicyModel) -> None:
    greedy = SamplingParams(1.0, 5, greedy=True)
    first = answers(engine, requests(8), greedy)
    assert all(len(r.response_token_ids) <= 5 for r in first)
    cut = [r for r in first if r.finish_reason == "length"]
    assert cut and all(len(r.response_token_ids) == 5 for r in cut)
    assert tokens(first) == tokens(answers(engine, [RolloutRequest(f"t{i}", 0, 5) for i in range(8)], greedy))
    changed = {k: v + 0.05 * torch.randn_like(v) for k, v in policy.model.state_dict().items()}
    engine.load_weights(InMemory(changed), version=7)
    second = answers(engine, requests(8), greedy)
    assert all(r.policy_version == 7 for r in second) and tokens(first) != tokens(second)
    engine.load_weights(InMemory(policy.model.state_dict()), version=0)
    assert tokens(answers(engine, requests(8), greedy)) == tokens(first)


def test_a_prompt_that_engine_and_actor_see_differently_is_named(
    engine: HfEngine, policy: PolicyModel, workspace: Workspace
) -> None:
    batch = TrainBatch.of(answers(engine, requests(2), PARAMS))
    batch.tokens[batch.offsets[1]] += 1
    cache = PromptCache(PromptSource(load_config(workspace.config)), policy)
    cache.items(batch, [0])
    with pytest.raises(RuntimeError, match=r"train.parquet row 1 \(id t1\): engine and actor tokenise"):
        cache.items(batch, [0, 1])
