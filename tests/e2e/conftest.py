"""What several files of end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Workspace
from tests.e2e.ranks import RunRanks, rank_processes


@pytest.fixture(scope="session")
def run_ranks(workspace: Workspace) -> Iterator[RunRanks]:
    """See `rank_processes`."""
    with rank_processes(workspace) as run:
        yield run
