"""The gradient of the whole loss, through a tiny model in float64, against finite differences."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mssr.algorithms.objective import MicroBatchLoss, Objective, TokenBatch
from mssr.algorithms.shaping import entropy_bonus
from mssr.data.prompt_source import PromptSource
from mssr.models.head import Head, token_log_probs_and_entropy, token_loss
from mssr.models.loading import load_model
from mssr.models.packing import PackedBatch, PackItem, pack
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit

EVERYTHING = Objective(
    loss="ppo",
    loss_options={"clip_low": 0.05, "clip_high": 0.08, "dual_clip": 1.2},
    aggregation="sequence_mean",
    shaping=True,
    shaping_coef=0.05,
    shaping_divisor=2.0,
    entropy_coef=0.3,
    anchor_coef=0.2,
    correction={"weight": "token", "max_weight": 1.1, "mask": "geometric"},
)
KL_COEF = 0.7


class Lab:
    """A tiny Qwen2.5-VL in float64 with a packed batch of text, one and two images."""

    def __init__(self, workspace: Workspace) -> None:
        config = load_config(workspace.config)
        self.policy = PolicyModel(load_model(config.model, torch.float32).double(), temperature=0.7)
        source = PromptSource(config)
        generator = torch.Generator().manual_seed(0)
        items = []
        for prompt_id, length in (("t0", 5), ("t1", 3), ("t2", 6)):
            prompt = source.encoder.encode(source.row(prompt_id))
            response = torch.randint(0, 250, (length,), generator=generator)
            items.append(PackItem(prompt, self.policy.rope_positions(prompt), response))
        packed = pack(items, self.policy.merge_size)
        assert packed.pixels is not None
        self.packed: PackedBatch = packed
        self.lengths = torch.tensor([len(item.response) for item in items])
        self.parameters = list(self.policy.parameters())
        with torch.no_grad():
            log_probs, self.entropy = self.policy(self.packed)

        def near(scale: float) -> torch.Tensor:
            return log_probs + scale * torch.randn(len(log_probs), generator=generator).double()

        self.fixed = TokenBatch(
            old_log_probs=near(0.1),
            engine_log_probs=near(0.1),
            advantages=torch.randn(3, generator=generator).double().repeat_interleave(self.lengths),
            lengths=self.lengths,
            reference_log_probs=near(0.3),
            anchor_log_probs=near(0.3),
            has_image=torch.tensor([True, True, False]).repeat_interleave(self.lengths),
        )

    def loss(self, objective: Objective, **changes: torch.Tensor) -> torch.Tensor:
        return self.loss_of(objective, dataclasses.replace(self.fixed, **changes))(*self.policy(self.packed))

    def loss_of(self, objective: Objective, tokens: TokenBatch) -> MicroBatchLoss:
        return MicroBatchLoss(objective, tokens, objective.denominator(self.lengths), KL_COEF)

    def known(self, old_known: bool) -> TokenBatch:
        return self.fixed if old_known else dataclasses.replace(self.fixed, old_log_probs=None)

    def gradient(self, objective: Objective) -> list[torch.Tensor]:
        return list(torch.autograd.grad(self.loss(objective), self.parameters))


@pytest.fixture(scope="module")
def lab(workspace: Workspace) -> Lab:
    return Lab(workspace)


@pytest.mark.parametrize("loss", ["ppo", "sapo"])
def test_the_gradient_is_that_of_the_loss(lab: Lab, loss: str) -> None:
    objective = EVERYTHING
    if loss != "ppo":
        objective = dataclasses.replace(EVERYTHING, loss=loss, loss_options={})
    gradient = lab.gradient(objective)
    # Shaping is a constant for the gradient. So the finite difference is of the loss with the shaped
    # advantages of the starting point; if shaping leaked a gradient, the two would differ.
    fixed = lab.fixed
    shaped = fixed.advantages + entropy_bonus(
        fixed.advantages, lab.entropy, coef=objective.shaping_coef, divisor=objective.shaping_divisor
    )
    assert not torch.equal(shaped, fixed.advantages)
    unshaped = dataclasses.replace(objective, shaping=False)
    # Along the gradient itself and along its parts of random halves of the tensors: there the loss changes
    # most, far above the float32 that transformers' norms keep inside a float64 model.
    generator = torch.Generator().manual_seed(1)
    subsets = [torch.ones(len(gradient)), *(torch.rand(4, len(gradient), generator=generator) < 0.5)]
    step = 1e-4
    for subset in subsets:
        part = [g * float(on) for g, on in zip(gradient, subset, strict=True)]
        norm = float(torch.sqrt(sum((g**2).sum() for g in part)))  # type: ignore[arg-type]
        values = []
        for sign in (1, -1):
            _move(lab.parameters, part, sign * step / norm)
            with torch.no_grad():
                values.append(float(lab.loss(unshaped, advantages=shaped)))
            _move(lab.parameters, part, -sign * step / norm)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm, rel=5e-4)


def _move(parameters: list[torch.Tensor], direction: list[torch.Tensor], scale: float) -> None:
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p += scale * d


@pytest.mark.parametrize(
    "change",
    [
        {"shaping": False},
        {"entropy_coef": 0.0},
        {"anchor_coef": 0.0},
        {"correction": {}},
        {"aggregation": "token_mean"},
        {"kl_estimator": "k2"},
        {"loss_options": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_loss_is_in_the_gradient(lab: Lab, change: dict) -> None:
    whole, other = lab.gradient(EVERYTHING), lab.gradient(dataclasses.replace(EVERYTHING, **change))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, other, strict=True)) > 1e-6


def test_the_anchor_leaves_prompts_without_image_alone(lab: Lab) -> None:
    loss_of = lab.loss_of(Objective(anchor_coef=0.5), lab.fixed)
    loss_of(*lab.policy(lab.packed))
    assert (loss_of.metrics["policy/kl_anchor"] > 0).tolist() == lab.fixed.has_image.tolist()


def test_metrics_carry_no_gradient_and_one_value_a_token(lab: Lab) -> None:
    loss_of = lab.loss_of(EVERYTHING, lab.fixed)
    loss_of(*lab.policy(lab.packed))
    metrics = loss_of.metrics
    expected = {
        *("policy/entropy", "policy/kl_ref", "policy/kl_anchor", "loss", "policy/clip_fraction"),
        *("shaping/mean", "shaping/entropy_branch_fraction", "shaping/sign_flip_fraction"),
        *("rollout/mismatch_kl", "correction/weight", "correction/masked"),
    }
    assert expected <= set(metrics)
    for value in metrics.values():
        assert value.shape == lab.entropy.shape and not value.requires_grad


CORRECTIONS = {
    "none": {},
    "token": {"weight": "token", "max_weight": 1.05, "mask": "token", "mask_low": 0.95},
    "sequence": {"weight": "sequence", "max_weight": 1.1},
    "geometric": {"weight": "token", "max_weight": 1.1, "mask": "geometric", "mask_low": 0.99},
}
TOKEN_WISE = {
    f"{name}-{aggregation}-{correction}": dataclasses.replace(
        EVERYTHING,
        loss=name,
        loss_options=EVERYTHING.loss_options if name == "ppo" else {},
        aggregation=aggregation,
        constant_length=9 if aggregation == "constant_length" else None,
        correction=CORRECTIONS[correction],
    )
    for name, aggregation, correction in [
        ("ppo", "sequence_mean", "geometric"),
        ("ppo", "token_mean", "sequence"),
        ("ppo", "constant_length", "token"),
        ("cispo", "sequence_mean", "token"),
        ("sapo", "token_mean", "none"),
        ("dis", "sequence_mean", "none"),
    ]
} | {
    f"{option}={value}": dataclasses.replace(
        EVERYTHING,
        correction=CORRECTIONS["token"],
        **{option: value},  # type: ignore[arg-type]
    )
    for option, value in [
        ("entropy_coef", 0.0),
        ("shaping", False),
        ("shaping_entropy", "sampled"),
        ("kl_estimator", "k1"),
        ("kl_estimator", "k2"),
        ("anchor_coef", 0.0),
        ("negative_fraction", 0.4),
    ]
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "old_known"),
    [
        (name, old)
        for name, objective in TOKEN_WISE.items()
        for old in (True, False)
        if objective.token_wise(old)
    ],
)
def test_parts_of_sequences_give_the_gradient_and_metrics_of_the_whole(
    lab: Lab, name: str, old_known: bool, dtype: torch.dtype
) -> None:
    """Through the head alone, where every gradient begins; the model is in the test after this one."""
    objective = TOKEN_WISE[name]
    generator = torch.Generator().manual_seed(2)
    head = lab.policy.model.lm_head.weight.detach().to(dtype)
    hidden = (3 * torch.randn(len(lab.packed.targets), head.shape[1], generator=generator)).to(dtype)
    inputs = [hidden.requires_grad_(), head.clone().requires_grad_()]
    known = _cast(lab.known(old_known), dtype)
    log_probs, entropy = token_log_probs_and_entropy(*inputs, lab.packed.targets)
    whole, parts = lab.loss_of(objective, known), lab.loss_of(objective, known)
    loss = whole(log_probs, entropy)
    expected = loss, *torch.autograd.grad(loss, inputs)
    # Sequences have 5, 3 and 6 tokens: a chunk of 4 ends within the first, and spans the second and third.
    loss, part_log_probs, part_entropy = token_loss(*inputs, lab.packed.targets, parts, Head(chunk=4))
    actual = loss, *torch.autograd.grad(loss, inputs)
    tolerance = 1e-10 if dtype == torch.float64 else 5e-6  # rounding differs from processor to processor
    for a, e in zip(actual, expected, strict=True):
        size = max(float(e.detach().abs().max()), 0.0 if e.dim() else 1.0)  # terms of the loss may cancel
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * size)
    torch.testing.assert_close((part_log_probs, part_entropy), (log_probs.detach(), entropy.detach()))
    assert parts.metrics.keys() == whole.metrics.keys()
    for key, value in whole.metrics.items():
        # Log-probs agree to rounding, which k3 with its exponential magnifies.
        close = {"rtol": 1e-5, "atol": 1e-5} if value.dtype == torch.float32 else {}
        torch.testing.assert_close(
            parts.metrics[key], value, **close, msg=lambda text, key=key: f"{key}: {text}"
        )


def _cast(known: TokenBatch, dtype: torch.dtype) -> TokenBatch:
    values = {f.name: getattr(known, f.name) for f in dataclasses.fields(known)}
    floats = {k: v.to(dtype) for k, v in values.items() if v is not None and v.is_floating_point()}
    return dataclasses.replace(known, **floats)


def test_the_model_has_one_gradient_whichever_way_it_is_taken(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.policy, "head_chunk", 4)
    loss, *_ = lab.policy(lab.packed, loss=lab.loss_of(EVERYTHING, lab.fixed))
    actual, expected = torch.autograd.grad(loss, lab.parameters), lab.gradient(EVERYTHING)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-10 * float(e.abs().max()))


def test_what_needs_whole_sequences_is_not_taken_in_parts() -> None:
    assert Objective().token_wise(old_known=False)
    assert not Objective(loss="gspo").token_wise(old_known=True)
    for level in ("sequence", "geometric"):
        by_sequence = Objective(correction={"mask": level})
        # The correction is of the old log-probs, which on policy are those that the pass gives.
        assert by_sequence.token_wise(old_known=True) and not by_sequence.token_wise(old_known=False)
    assert Objective(correction={"weight": "token"}).token_wise(old_known=False)
