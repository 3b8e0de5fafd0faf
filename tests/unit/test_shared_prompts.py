"""Prompts that engines have encoded: ranks get them, and do without where they are lost."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from mssr.actor.prompts import PromptCache
from mssr.cluster.ray_workers import RayRolloutWorker
from mssr.cluster.shared_prompts import (
    TOGETHER,
    PromptOutbox,
    PromptShelf,
    SharedPrompts,
    share,
)
from mssr.data.prompt_source import PromptSource
from mssr.models.cost import home
from mssr.models.encoded import EncodedPrompt
from mssr.runs.config import load_config
from mssr.types import TrainBatch
from tests.conftest import Workspace
from tests.unit.test_prompts import assert_equal

pytestmark = pytest.mark.unit


class Store:
    """Stands for Ray's object store; references are numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.objects: list[Any] = []
        self.lost: set[int] = set()
        self.fetched: list[int] = []
        monkeypatch.setattr(ray, "put", self._put)
        monkeypatch.setattr(ray, "get", self._get)

    def _put(self, value: Any) -> int:
        self.objects.append(value)
        return len(self.objects) - 1

    def _get(self, reference: int, timeout: float) -> Any:
        self.fetched.append(reference)
        if reference in self.lost:
            raise ray.exceptions.GetTimeoutError("the engine died")
        return self.objects[reference]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


@pytest.fixture
def source(workspace: Workspace) -> PromptSource:
    return PromptSource(load_config(workspace.config))


class NoModel:
    def rope_positions(self, prompt: EncodedPrompt) -> torch.Tensor:
        return torch.arange(len(prompt.token_ids)).expand(3, -1)


def batch_of(source: PromptSource, prompt_ids: list[str]) -> TrainBatch:
    """A response of one token to each."""
    prompts = [p.token_ids.numpy() for p in source.get(prompt_ids)]
    lengths = np.array([len(p) for p in prompts])
    return TrainBatch(
        prompt_ids=tuple(prompt_ids),
        tokens=np.concatenate([np.append(p, 7) for p in prompts]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths + 1)]),
        prompt_lengths=lengths,
        advantages=np.zeros(len(prompts), np.float32),
        engine_log_probs=np.zeros(len(prompts), np.float32),
    )


def shared(source: PromptSource, prompt_ids: list[str]) -> SharedPrompts:
    source.get(prompt_ids)
    return share(source.take_new(prompt_ids))


def test_a_rank_gets_each_object_once_and_only_those_that_it_needs(
    store: Store, source: PromptSource
) -> None:
    shelf = PromptShelf(2**30)
    for ids in (["t0", "t1"], ["t2", "t3"], ["t4"]):
        shelf.add(shared(source, ids))
    fetch = shelf.fetcher(["t0", "t1", "t2", "t4", "t0", "t9"])
    assert store.fetched == []
    found = fetch(["t0", "t2", "t9"])
    assert list(found) == ["t0", "t2"]
    for prompt_id, prompt in (found | fetch(["t1"])).items():
        assert_equal(prompt, source.get([prompt_id])[0])
    assert store.fetched == [0, 1]
    assert fetch(["t3"]) == {}  # not of this batch


def test_prompts_leave_the_shelf_after_their_update_or_for_newer_ones(
    store: Store, source: PromptSource
) -> None:
    sizes = {i: p.nbytes for i, p in zip(("t0", "t1", "t3"), source.get(["t0", "t1", "t3"]), strict=True)}
    shelf = PromptShelf(sizes["t1"] + sizes["t3"])
    for prompt_id in sizes:
        shelf.add(shared(source, [prompt_id]))
    assert sorted(shelf.fetcher(sizes)(list(sizes))) == ["t1", "t3"]
    shelf.drop(["t1", "t9"])
    assert sorted(shelf.fetcher(sizes)(list(sizes))) == ["t3"]


def test_prompts_go_together_by_machine_and_none_is_kept_back(store: Store, source: PromptSource) -> None:
    [prompt] = source.get(["t0"])
    outbox = PromptOutbox(ranks=16)
    ids = [f"p{k}" for k in range(400)]
    shared = [s for k in range(0, 400, 4) for s in outbox.share(dict.fromkeys(ids[k : k + 4], prompt), False)]
    assert len(shared) == len(store.objects) >= 4
    assert all(TOGETHER <= len(s.sizes) < TOGETHER + 4 for s in shared)
    shared += outbox.share({}, everything=True)
    assert sorted(i for s in shared for i in s.sizes) == sorted(ids)
    assert all(len({home(i) % 16 // 8 for i in s.sizes}) == 1 for s in shared)
    assert outbox.share({}, everything=True) == []
    evaluation = PromptOutbox(ranks=0)
    assert evaluation.share({"p0": prompt}, everything=True) == []


def test_an_engine_that_prepares_prompts_has_them_and_the_others_run_first(
    source: PromptSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And shares them with the ranks as those that it encodes when it needs them."""
    worker = RayRolloutWorker.__new__(RayRolloutWorker)
    worker._engine = SimpleNamespace(prompts=source)  # type: ignore[assignment]
    ids = [f"t{k}" for k in range(8)] + ["t0"]
    priorities = []

    def prepare() -> None:
        worker.prepare(ids)
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=prepare)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread.start()
    thread.join()
    monkeypatch.setattr(source.encoder, "encode_all", lambda rows, _: pytest.fail("again") if rows else [])
    assert len(source.get(ids)) == 9
    assert sorted(source.take_new(ids)) == sorted(set(ids))
    if sys.platform == "linux":
        assert priorities == [19]
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_prompts_that_cannot_be_prepared_are_told_in_the_log_and_not_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ray would print what nobody asks for over the console of the driver."""

    class Broken:
        def get(self, prompt_ids: Sequence[str]) -> None:
            raise OSError("the disk is gone")

    worker = RayRolloutWorker.__new__(RayRolloutWorker)
    worker._engine = SimpleNamespace(prompts=Broken())  # type: ignore[assignment]
    thread = threading.Thread(target=worker.prepare, args=(["t0"],))  # whose priority it takes
    thread.start()
    thread.join()
    [record] = caplog.records
    assert record.exc_info is not None and "the disk is gone" in str(record.exc_info[1])


def test_ranks_encode_what_is_lost_or_was_never_shared(store: Store, source: PromptSource) -> None:
    ids = ["t0", "t1", "t3", "t4"]
    shelf = PromptShelf(2**30)
    shelf.add(shared(source, ["t0", "t1"]))
    shelf.add(shared(source, ["t3"]))
    store.lost = {0}
    batch = batch_of(source, [*ids, "t0"])
    cache = PromptCache(source, NoModel())  # type: ignore[arg-type]
    with cache.using(shelf.fetcher(batch.prompt_ids)):
        items = cache.items(batch, range(5))
    for item, prompt_id in zip(items, batch.prompt_ids, strict=True):
        assert_equal(item.prompt, source.get([prompt_id])[0])
        assert item.response.tolist() == [7]
    assert cache.encoded == 3  # all but t3
    assert store.fetched == [0, 1]
    cache.items(batch, [0, 2, 4])
    assert cache.encoded == 3 and store.fetched == [0, 1]  # they are kept
