"""The workers of scripts/bench/driver_scale.py: they have the real ones' interface, and are light."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fake_workers
import numpy as np
import pytest
from fake_workers import OPTIONS, FakeEngine, FakePolicyWorker, FakeRolloutWorker

from mssr.cluster.base import join_log_probs
from mssr.cluster.ray_workers import RayPolicyWorker, RayRolloutWorker
from mssr.cluster.shared_prompts import PromptFetcher
from mssr.config import Config
from mssr.rollout.queue import RequestQueue
from mssr.types import RolloutRequest, SamplingParams, TrainBatch

pytestmark = pytest.mark.unit


@pytest.fixture
def config() -> Config:
    config = Config()
    config.rollout.max_response_length, config.actor.num_ranks = 20, 2
    config.rollout.engine_options = {OPTIONS: {"generate_s": 0.3, "update_s": 0.0}}
    return config


def test_every_request_is_answered_once_in_full_length(config: Config) -> None:
    config.rollout.max_num_seqs = 2
    requests = [(k, RolloutRequest(f"p{k}", 0, seed=101 * k)) for k in range(5)]
    queue = RequestQueue(requests[:3], open=True)
    threading.Timer(0.1, lambda: (queue.put(requests[3:]), queue.close())).start()
    engine = FakeEngine(config)
    engine.load_weights(None, 7)
    ended = dict(pair for part in engine.generate(queue, SamplingParams(1.0, 20)) for pair in part)
    assert sorted(ended) == list(range(5))
    assert all(ended[k].prompt_id == f"p{k}" and ended[k].policy_version == 7 for k in ended)
    assert all(len(r.response_token_ids) == len(r.log_probs) == 20 for r in ended.values())
    assert len({r.response_token_ids.tobytes() for r in ended.values()}) == 5


def test_ranks_score_a_batch_between_them(config: Config) -> None:
    batch = TrainBatch(
        prompt_ids=("a", "b", "c"),
        tokens=np.zeros(12, np.int32),
        offsets=np.array([0, 3, 7, 12]),
        prompt_lengths=np.array([1, 1, 1]),
        advantages=np.zeros(3, np.float32),
        engine_log_probs=np.zeros(9, np.float32),
    )
    shares = []
    for rank in range(2):
        worker = FakePolicyWorker.__new__(FakePolicyWorker)
        worker._config = config
        worker.start(rank, "", "cpu", colocated=False)
        shares.append(worker.log_probs((batch, PromptFetcher({})), reference=True))
    joined = join_log_probs(shares, batch)
    assert joined.policy.shape == joined.reference.shape == (9,)


def arguments(method: Any) -> list[str]:
    # Ray adds one of its own to methods of classes that it has made actors of, as other tests may have.
    return [name for name in inspect.signature(method).parameters if name != "_ray_trace_ctx"]


def test_methods_have_the_arguments_of_the_real_ones() -> None:
    for fake, real in ((FakePolicyWorker, RayPolicyWorker), (FakeRolloutWorker, RayRolloutWorker)):
        for name in vars(fake):
            if not name.startswith("_"):
                assert arguments(getattr(fake, name)) == arguments(getattr(real, name)), name


def test_they_import_no_torch() -> None:
    program = "import sys, fake_workers; print('torch' in sys.modules)"
    where = Path(fake_workers.__file__).parent
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=where)
    assert result.stdout.strip() == "False"
