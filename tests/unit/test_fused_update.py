"""The update step takes the gradient in the forward pass where it may, and it is the same update."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mssr.algorithms.objective import Objective
from mssr.models import policy
from tests.conftest import Workspace
from tests.unit.step_lab import StepLab, open_lab
from tests.unit.test_nonfinite import state_of

pytestmark = pytest.mark.unit
# The batch's engine is made up, and a mask at its usual bounds leaves nothing to learn from.
KEEP_ALL = ["algorithm.correction.mask_low=1e-9", "algorithm.correction.mask_high=1e9"]


@pytest.fixture(scope="module")
def lab(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepLab]:
    with open_lab(workspace, tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def train(lab: StepLab, run_dir: Path, *overrides: str) -> tuple[dict[str, float], list[torch.Tensor]]:
    updater = lab.updater(run_dir, "actor.lr=0.1", "actor.warmup_steps=0", *overrides)
    updater.optimizer = torch.optim.SGD(lab.policy.parameters())
    return updater.step(lab.batch, 0), state_of(updater)


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        ([], True),
        (["algorithm.loss.entropy_coef=0.01", "algorithm.loss.aggregation=sequence_mean"], True),
        (["algorithm.loss.text_anchor_coef=0.1", "algorithm.correction.weight=token"], True),
        (["algorithm.loss.name=gspo"], False),
        (["algorithm.shaping.visual=vepo", "algorithm.loss.name=dis", "algorithm.loss.clip_low=1"], True),
        (["actor.updates_per_step=1", "algorithm.correction.mask=geometric", *KEEP_ALL], False),
    ],
    ids=["default", "entropy", "anchor", "gspo", "visual", "geometric_on_policy"],
)
def test_both_ways_make_the_same_update(
    lab: StepLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], fused: bool
) -> None:
    calls = []
    token_loss = policy.token_loss
    monkeypatch.setattr(policy, "token_loss", lambda *a, **k: calls.append(1) or token_loss(*a, **k))
    metrics, parameters = train(lab, tmp_path, *overrides)
    assert bool(calls) == fused
    calls.clear()
    monkeypatch.setattr(Objective, "token_wise", lambda self, old_known: False)
    expected_metrics, expected = train(lab, tmp_path, *overrides)
    assert not calls
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)
    for a, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
    start = lab.start["lm_head.weight"]
    assert (lab.policy.model.lm_head.weight - start).abs().max() > 1e-3
