"""The study's choice of learning rates and its statistics, by handmade records with known answers."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.study import records as study
from scripts.study.records import Runs, own_best_lr

pytestmark = pytest.mark.unit


def record(
    label: str = "mssr", lr: float = 3e-4, seed: int = 0, accuracy: Any = 0.5, **other: Any
) -> dict[str, Any]:
    """A run of 20 steps, whose accuracy is a number or a curve; part, val, careful and others as given."""
    accuracy = accuracy if isinstance(accuracy, list) else [accuracy] * 20
    part, steps = other.pop("part", "grid"), len(accuracy)
    curves = {"accuracy": accuracy, "entropy": [0.5] * steps, "careful": [other.pop("careful", 0.0)] * steps}
    curves["val"] = {"steps": [0, 10, 20], "accuracy": other.pop("val", [0.1, 0.2, 0.3])}
    found = {
        "job": f"{part}/{label}/{lr:.0e}/{seed}", "part": part, "setting": "stress", "base": "habit",
        "method": label, "label": label, "lr": lr, "seed": seed, "overrides": {}, "steps": steps, "rollouts": 128,
        "updates": 4, "commit": "c0ffee", "machine": "a box, 2 cores", "versions": {"torch": "1"}, "wall_s": 30.0,
        "curves": curves, "final": {"val": 0.3, "sampled": 0.3, "pass@8": 0.6, "bold": 1.0, "careful": 0.0},
    }  # fmt: skip
    return found | other


def test_the_rate_is_chosen_by_the_selection_seed_of_the_grid_and_nothing_else() -> None:
    records = [
        record(lr=1e-4, seed=100, val=[0.1, 0.9, 0.5]),
        record(lr=2e-4, seed=100, val=[0.1, 0.6, 0.9]),  # the highest mean, not the highest value or end
        record(lr=3e-4, seed=100, val=[0.1, 0.2, 0.95]),
        record(lr=3e-4, seed=0, val=[1.0, 1.0, 1.0]),
        record(lr=3e-4, seed=100, val=[1.0, 1.0, 1.0], part="escape"),
        record("mssr_decay", lr=3e-4, seed=100, val=[1.0, 1.0, 1.0], method="mssr"),
    ]
    assert own_best_lr(records, "mssr") == 2e-4
    assert own_best_lr(records, "grpo") is None
    equal = [record(lr=lr, seed=100) for lr in (3e-4, 1e-4, 2e-4)]
    assert own_best_lr(equal, "mssr") == 1e-4
