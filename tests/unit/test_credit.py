"""Factors of the advantages by hand: negative-token filtering, VPPO, VEPO; and the control of entropy."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.distributed import ReduceOp

from mssr.actor import visual
from mssr.actor.planning import MicroBatch
from mssr.algorithms.credit import negative_filter, vepo_factors, visual_kl, vppo_factors
from mssr.algorithms.entropy_control import EntropyController
from mssr.algorithms.objective import TokenBatch
from mssr.algorithms.shaping import entropy_balance
from mssr.config.algorithm import ShapingConfig

pytestmark = pytest.mark.unit
LENGTHS = torch.tensor([4, 0, 3])


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_visual_kl_is_k3_and_bounded() -> None:
    seen, blind = column(-1.0, -1.0, -8.0, -0.1), column(-1.0, -3.0, -0.1, -20.0)
    expected = column(
        0.0, math.exp(-2) + 2 - 1, 10.0, 10.0
    )  # exp(7.9) - 8.9 is 2688, and k3 of -19.9 is 18.9
    torch.testing.assert_close(visual_kl(seen, blind), expected)


def test_negative_filter_by_hand() -> None:
    log_probs = column(-1.0, -3.0, -2.0, -0.5, -0.1, -0.2, -0.2)
    wrong, right = column(*[-1.0] * 7), column(*[-1.0] * 4, 0.0, 2.0, 2.0)
    kept = negative_filter(wrong, log_probs, LENGTHS, 0.5)
    assert kept.tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert negative_filter(wrong, log_probs, LENGTHS, 0.25).tolist() == [
        0,
        1,
        0,
        0,
        0,
        1,
        0,
    ]
    assert negative_filter(right, log_probs, LENGTHS, 0.1).tolist() == [0, 1, 0, 0, 1, 1, 1]
    assert negative_filter(wrong, log_probs, LENGTHS, 1.0).tolist() == [1] * 7
    many = -torch.arange(100, dtype=torch.float64)
    assert negative_filter(many - 1, many, torch.tensor([100]), 0.07).sum() == 7  # .07 * 100 is above 7


def test_vppo_by_hand() -> None:
    kl = column(0.1, 0.5, 0.0, 0.2, 0.9, 0.0, 0.3)  # means .2 and .4
    factors = vppo_factors(kl, LENGTHS, least=0.2, mean=0.3, fraction=0.4, floor=0.9)
    torch.testing.assert_close(factors, column(0, 0.9, 0, 0.9, 1.1, 0, 1.1))  # 1 on average
    same = vppo_factors(kl, LENGTHS, least=0.3, mean=0.3, fraction=1.0, floor=0.5)
    torch.testing.assert_close(same, torch.ones_like(kl))


def test_vepo_by_hand() -> None:
    kl = column(0.0, 2.0, 1.0, 0.0, 0.3, 0.3, 0.3)
    entropy = column(1.0, 1.0, 3.0, 2.0, 1.0, 2.0, 3.0)
    blind = column(1.0, 2.0, 5.0, 2.0, 1.0, 0.0, 6.0)  # gaps 0 1 2 0 and 0 2 3
    # Scaled: kl 0 1 .5 0, gap 0 .5 1 0, entropy 0 0 1 .5. Scores of the first: 0 0 1 0. Of the second, whose
    # kl says nothing: (1 - (1 - gap)^.5) * h, gap 0 2/3 1, h 0 .5 1.
    factors = vepo_factors(kl, entropy, blind, LENGTHS, fraction=0.5, mix=0.5)
    assert factors.tolist() == [2, 0, 2, 0, 0, 1.5, 1.5]  # of the equals in the first response the earlier
    entropy[3] = 2.5
    kl[3] = 0.4
    factors = vepo_factors(kl, entropy, blind, LENGTHS, fraction=0.5, mix=0.5)
    assert factors.tolist() == [0, 0, 2, 2, 0, 1.5, 1.5]
    by_gap = vepo_factors(column(0, 1, 0), column(2, 2, 1), column(2, 2, 9), torch.tensor([3]), 0.3, mix=1.0)
    assert by_gap.tolist() == [0, 3, 0]


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.0001, math.nan])
def test_a_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="the fraction of the tokens"):
        negative_filter(column(-1.0), column(-1.0), torch.tensor([1]), fraction)


def test_entropy_balance_by_hand() -> None:
    a, log_probs = column(2.0, -2.0, 2.0, -2.0), column(0.96, 0.96, 0.95, 0.1).log()
    assert entropy_balance(a, log_probs, -0.5, 0.95).tolist() == [1, -3, 2, -2]  # entropy is too low
    assert entropy_balance(a, log_probs, 0.5, 0.95).tolist() == [3, -1, 2, -2]


def test_the_controller_by_hand_and_its_state() -> None:
    controller = EntropyController(0.5, proportional=2.0, integral=0.1)
    assert controller.alpha == 0
    controller.observe(0.4)
    assert controller.alpha == pytest.approx(2 * -0.1 + 0.1 * -0.1)
    controller.observe(0.7)
    assert controller.alpha == pytest.approx(2 * 0.2 + 0.1 * 0.1)
    controller.observe(math.nan)  # no update was made
    again = EntropyController(0.5, proportional=2.0, integral=0.1)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again == controller
    for c in (controller, again):
        c.observe(0.3)
        assert c.alpha == pytest.approx(2 * -0.2 + 0.1 * -0.1)
        c.observe(9.0)
        assert c.alpha == 1.0
    off = EntropyController()
    off.observe(3.0)
    assert off.alpha == 0
    with pytest.raises(ValueError, match="target"):
        EntropyController(0.0)


def test_visual_credit_is_the_same_however_responses_are_spread_over_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Least and mean are those of the responses with images of all ranks, each counted once."""
    kls = {0: [0.1, 0.5], 1: [], 2: [0.9], 3: [3.0, 3.0], 4: [0.3, 0.0, 0.0]}  # 3 has no image

    def passes(*of: tuple[tuple[int, ...], float]) -> list[visual.Seen]:
        seen: list[visual.Seen] = []
        for sequences, weight in of:
            kl = torch.tensor([x for s in sequences for x in kls[s]])
            has_image = torch.tensor([s != 3 for s in sequences for _ in kls[s]])
            tokens = TokenBatch(
                old_log_probs=kl,
                engine_log_probs=kl,
                advantages=kl,
                lengths=torch.tensor([len(kls[s]) for s in sequences]),
                anchor_log_probs=kl,
                has_image=has_image,
            )
            seen.append((MicroBatch(sequences, weight, True), tokens, kl, kl))
        return seen

    calls: list[dict[str, float]] = []

    def alone(values: dict[str, torch.Tensor], op: object = ReduceOp.SUM) -> dict[str, float]:
        calls.append({key: float(value) for key, value in values.items()})
        return calls[-1]

    def together(values: dict[str, torch.Tensor], op: object = ReduceOp.SUM) -> dict[str, float]:
        of = max if op == ReduceOp.MAX else sum
        return {key: of(call[key] for call in calls if key in call) for key in values}

    def factors(*of: tuple[tuple[int, ...], float]) -> dict[int, list[float]]:
        found = {}
        for micro, values in visual.visual_factors(ShapingConfig(visual="vppo"), passes(*of)):
            parts = torch.split(values, [len(kls[s]) for s in micro.sequences])
            found |= {s: part.tolist() for s, part in zip(micro.sequences, parts, strict=True)}
        return found

    monkeypatch.setattr(visual, "visual_kl", lambda old, blind: old)
    monkeypatch.setattr(visual, "all_reduce", alone)
    whole = factors(((0, 1, 2, 3, 4), 1.0))
    # Means of the responses .3, .9 and .1: least .1, mean 13/30.
    above = [0.9 + 0.1 * (s - 0.1) / (13 / 30 - 0.1) for s in (0.3, 0.9, 0.1)]
    expected = {0: [0, above[0]], 1: [], 2: [above[1]], 3: [1, 1], 4: [above[2], above[2], 0]}
    assert {s: pytest.approx(x) for s, x in expected.items()} == whole
    ranks = (((0, 1), 1.0), ((3,), 1.0)), (((2, 4), 1.0), ((2, 4), 0.0))  # the second runs along once
    calls.clear()
    for rank in ranks:
        factors(*rank)
    monkeypatch.setattr(visual, "all_reduce", together)
    assert {s: pytest.approx(x) for s, x in whole.items()} == factors(*ranks[0]) | factors(*ranks[1])
