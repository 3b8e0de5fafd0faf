"""scripts/bench/fused_head.py measures versions that compute the same."""

from __future__ import annotations

import argparse

import fused_head
import pytest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_all_versions_have_the_same_gradients(entropy_coef: float) -> None:
    args = argparse.Namespace(device="cpu", dtype="float32", hidden=64, entropy_coef=entropy_coef)
    names = [name for name in fused_head.VERSIONS if not fused_head.available(name, "cpu", entropy_coef)]
    assert set(names) >= {"straightforward", "mssr, two passes", "mssr, gradient in forward"}
    assert all(error < 1e-5 for error in fused_head.errors(args, names).values())


def test_what_is_missing_is_told() -> None:
    assert fused_head.available("verl, kernel", "cpu", 0.0) == "verl's kernel needs a GPU"
    assert fused_head.available("Liger", "cpu", 0.1) == "Liger: takes no entropy loss"
