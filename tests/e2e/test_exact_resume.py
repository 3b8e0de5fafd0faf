"""A run that was stopped and goes on equals one that was not, for every method and sampler."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from mssr.models.families import FAMILIES
from tests.conftest import Workspace
from tests.e2e.run_states import SMALL, STEPS, read_run, train_each

pytestmark = pytest.mark.e2e

# 6 prompts or 2 a step of 8: most steps end in the middle of an epoch.
VARIANTS: dict[str, tuple[int | None, list[str]]] = {
    "mssr": (1, ["algorithm.name=mssr", "algorithm.shaping.visual=vppo"]),
    # With the errors of the control of entropy so far.
    "mvsr": (
        2,
        [
            "algorithm.name=mvsr",
            "algorithm.entropy_control.target=3",
            "algorithm.entropy_control.proportional=0.1",
            "algorithm.entropy_control.confident=0.001",
            "algorithm.shaping.negative_fraction=0.5",
        ],
    ),
    "grpo": (3, ["algorithm.name=grpo", "rollout.n=3"]),
    "rloo_adaptive_kl": (1, ["algorithm.name=rloo", "rollout.n=3", "algorithm.kl.target=0.01"]),
    "reinforce_pp": (2, ["algorithm.name=reinforce_pp", "algorithm.loss.name=flash_reinforce"]),
    # Draws uncertain prompts first, and remembers first values and the last response of each.
    "spo": (
        3,
        [
            "algorithm.name=spo",
            "sampler.name=uncertainty",
            "algorithm.baseline.init_rollouts=2",
            "algorithm.kl.target=0.001",
            "algorithm.kl.horizon=20",
        ],
    ),
    # Groups that are drawn again, and an adaptive weight of rewards for each token.
    "dynamic": (
        2,
        [
            "algorithm.name=reinforce_pp_baseline",
            "algorithm.kl.placement=reward",
            "algorithm.kl.target=0.01",
            "rollout.n=3",
            "sampler.dynamic=true",
            "sampler.max_draws=50",
        ],
    ),
}
"""Name -> (step after which it is stopped, overrides)."""


def test_stopped_and_resumed_equals_straight_bitwise(
    workspace: Workspace, workspace_of: Callable[[str], Workspace], tmp_path: Path
) -> None:
    """Every method and sampler, and every family, on one rank with the transformers engine."""
    common, variants = [*SMALL, "cluster.launcher=local"], {}
    pairs = zip(itertools.cycle(VARIANTS.items()), itertools.cycle(FAMILIES))
    for (name, (at, own)), family in itertools.islice(pairs, max(len(VARIANTS), len(FAMILIES))):
        variants[f"{name}-{family}"] = at, [*common, *workspace_of(family).instead, *own]
    train_each(workspace.config, tmp_path, variants)
    for name, (at, _) in variants.items():
        straight, stopped = (read_run(tmp_path / f"{name}-{kind}") for kind in ("straight", "stopped"))
        assert (tmp_path / f"{name}-stopped/checkpoints/step-{at:06d}").is_dir(), name
        for key in straight:
            assert straight[key] == stopped[key], f"{name}: {key}"
        steps = straight["metrics"][1:]
        if name.startswith("dynamic"):
            assert any(r["sampler/draws"] > 1 for r in steps)
        if name.startswith("mvsr"):
            assert len({r["shaping/entropy_alpha"] for r in steps}) == STEPS
        if name.startswith("spo"):
            assert len({r["policy/kl_coef"] for r in steps}) == STEPS  # it adapts
