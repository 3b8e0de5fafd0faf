"""Resident memory of a process."""

from __future__ import annotations

import psutil


def rss_gib(pid: int) -> float:
    """Resident set of a process in GiB, pages that it shares with others included."""
    return float(psutil.Process(pid).memory_info().rss) / 2**30
