"""Lines of items.jsonl, made for the tests."""

from __future__ import annotations

from typing import Any


def a_record(item: str, status: str = "right", **changes: Any) -> dict[str, Any]:
    """Of MMK12, with a verdict and whatever else a test is about."""
    row: dict[str, Any] = {
        "benchmark": "mmk12",
        "id": item,
        "sample": 0,
        "question": "How many?",
        "answer": "8",
        "response": "It is 8.",
        "response_tokens": 10,
        "finish_reason": "stop",
        "extracted": "8",
        "status": status,
        "correct": status == "right",
        "rule": "choice",
        "tags": {"subject": "physics"},
    }
    return row | changes
