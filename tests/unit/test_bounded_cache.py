"""What is asked for stays, up to the memory given."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from mssr.models.bounded_cache import BoundedCache

pytestmark = pytest.mark.unit


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_the_oldest_go_first_and_the_memory_is_kept_to() -> None:
    cache: BoundedCache[str, int] = BoundedCache(30)
    for k in range(3):
        cache.put(str(k), k, 10)
    assert cache.get("0") == 0
    cache.put("3", 3, 10)
    assert cache.get("1") is None  # 0 was asked for since
    assert [cache.get(key) for key in "023"] == [0, 2, 3]
    cache.put("4", 4, 31)  # more than all the memory
    assert cache.get("4") is None and cache.get("0") == 0
    cache.put("5", 5, 20)
    assert [cache.get(key) for key in "0235"] == [0, None, None, 5]


def test_a_new_value_takes_the_place_and_the_memory_of_the_old_one() -> None:
    cache: BoundedCache[str, int] = BoundedCache(30)
    cache.put("a", 1, 10)
    cache.put("b", 1, 10)
    cache.put("a", 2, 20)
    assert cache.get("a") == 2 and cache.get("b") == 1
    cache.put("a", 3, 31)
    assert cache.get("a") is None  # not the value of before


def test_what_is_popped_is_gone_and_gives_its_memory_back() -> None:
    cache: BoundedCache[str, int] = BoundedCache(20)
    cache.put("a", 1, 20)
    assert cache.pop("a") == 1 and cache.pop("a") is None and cache.get("a") is None
    cache.put("b", 1, 10)
    cache.put("c", 1, 10)
    assert cache.get("b") == cache.get("c") == 1


def test_nothing_is_kept_without_memory() -> None:
    cache: BoundedCache[str, int] = BoundedCache(0)
    cache.put("a", 1, 1)
    assert cache.get("a") is None


def test_threads_may_share_one(frequent_switches: None) -> None:
    cache: BoundedCache[int, int] = BoundedCache(10)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for k in range(3000):
                cache.put((seed + k) % 17, k, 1)
                cache.get((seed + 3 * k) % 17)
                cache.pop((seed + 5 * k) % 17)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
