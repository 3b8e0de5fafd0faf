"""What several files of unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.judge_server import Server, serving


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    """A small server, and its address."""
    with serving() as pair:
        yield pair


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this machine's environment, and no proxy to a server on it."""
    for name in ("MSSR_JUDGE_API_KEY", "OPENAI_API_KEY", "MSSR_REWARD_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
