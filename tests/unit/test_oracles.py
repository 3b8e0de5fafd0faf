"""mssr against verl 0.9.1 and TRL 1.16, on numbers that those computed (scripts/oracles/).

24 random ragged batches each, and two more with extremes from verl. Agreement is to 1e-6, relative and
absolute, in float32. Where a definition differs, the reason stands at the test, which then checks how
the two follow from each other. Neither library has single-rollout advantages (MSSR, MVSR, SPO).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mssr.algorithms import KLController, create, losses
from mssr.algorithms.correction import rollout_correction
from mssr.models.head import Head, token_log_probs_and_entropy

pytestmark = pytest.mark.unit

FIXTURES = Path(__file__).parents[1] / "fixtures"
BATCHES = 24
CONSTANT_LENGTH = 16
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "constant_length",
}


class Batch:
    """One batch: its arrays by name, and the arguments that functions of mssr take."""

    def __init__(self, arrays: dict[str, np.ndarray], number: int) -> None:
        self.number = number
        self._arrays = arrays
        self.lengths = self["in/lengths"]

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self[f"in/{name}"])

    @property
    def scores(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Prompt ids, rewards, lengths."""
        return [f"prompt-{group}" for group in self["in/groups"]], self["in/rewards"], self.lengths


def read(library: str, first: int = 0) -> Iterator[Batch]:
    """The batches from ``first`` on; those from `BATCHES` on are the extreme ones."""
    with np.load(FIXTURES / f"oracles_{library}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "version"}
    sequences, lengths = arrays["in/sequences"], arrays["in/lengths"]
    by_sequence = np.repeat(np.arange(len(sequences)), sequences)
    by_token = np.repeat(by_sequence, lengths)
    batch_of = {len(index): index for index in (np.arange(len(sequences)), by_sequence, by_token)}
    assert len(batch_of) == 3, "the three kinds of arrays are told apart by their lengths"
    for number in range(first, len(sequences)):
        yield Batch({key: a[batch_of[len(a)] == number] for key, a in arrays.items()}, number)


def normal(library: str) -> list[Batch]:
    batches = [batch for batch in read(library) if batch.number < BATCHES]
    assert len(batches) == BATCHES
    return batches


def close(actual: Any, expected: Any, what: object = "") -> None:
    """Within 1e-6; the absolute part is smaller for an array whose largest entry is below 1."""
    expected = np.asarray(expected)
    atol = 1e-6 * min(1.0, float(np.abs(expected).max(initial=0.0))) if expected.ndim else 1e-6
    if torch.is_tensor(actual):
        actual = actual.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=atol, err_msg=str(what))


# --- advantages ----------------------------------------------------------------------------------

VERL_ADVANTAGES = {
    "grpo": "grpo",
    "grpo_vectorized": "grpo",
    "dr_grpo": "dr_grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "reinforce_pp": "reinforce_pp",
    "reinforce_pp_baseline": "reinforce_pp_baseline",
}


@pytest.mark.parametrize("theirs", VERL_ADVANTAGES)
def test_advantages_are_those_of_verl(theirs: str) -> None:
    method = create(VERL_ADVANTAGES[theirs])
    for batch in read("verl"):
        advantages, _ = method.advantages(*batch.scores)
        assert advantages.dtype == np.float32
        close(np.repeat(advantages, batch.lengths), batch[f"out/advantages/{theirs}"], batch.number)


@pytest.mark.parametrize("kind", ["kl", "low_var_kl"])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_advantages_with_kl_in_the_reward_are_those_of_verl(name: str, kind: str) -> None:
    method = create(name)
    for batch in normal("verl"):
        advantages, _ = method.token_advantages(*batch.scores, batch[f"in/penalties_{kind}"])
        close(advantages, batch[f"out/advantages_{kind}/{name}"], batch.number)


@pytest.mark.parametrize("kind", ["kl", "low_var_kl"])
def test_reinforce_pp_baseline_with_kl_in_the_reward(kind: str) -> None:
    # verl takes a response's penalties off its score, centres that, and gives all its tokens the same.
    # Ours is the method's own: the score is centred, the penalties go into the return of each token.
    method = create("reinforce_pp_baseline")
    for batch in normal("verl"):
        ids, rewards, lengths = batch.scores
        penalties = batch[f"in/penalties_{kind}"].astype(np.float64)
        response = np.repeat(np.arange(len(lengths)), lengths)
        penalised = rewards - np.bincount(response, penalties, len(lengths))
        close(
            np.repeat(method.advantages(ids, penalised, lengths)[0], lengths),
            batch[f"out/advantages_{kind}/reinforce_pp_baseline"],
            batch.number,
        )
        groups = batch["in/groups"]
        centred = rewards - (np.bincount(groups, rewards) / np.bincount(groups))[groups]
        returns = np.array(
            [
                centred[response[t]] - penalties[t:][response[t:] == response[t]].sum()
                for t in range(len(response))
            ]
        )
        closed_form = (returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8)
        close(method.token_advantages(ids, rewards, lengths, penalties)[0], closed_form, batch.number)


@pytest.mark.parametrize(
    ("scale", "name", "options"),
    [
        ("group", "grpo", {"eps": 1e-4}),
        ("batch", "lite_ppo", {"eps": 1e-4, "weighting": "sequence"}),
        ("none", "dr_grpo", {}),
    ],
)
def test_advantages_are_those_of_trl(scale: str, name: str, options: dict[str, Any]) -> None:
    for batch in normal("trl"):
        advantages, _ = create(name, **options).advantages(*batch.scores)
        expected = batch[f"out/advantages/{scale}"]
        # Where all rewards of a group are equal, TRL divides the rounding error of their mean by 1e-4,
        # up to 6e-4 here. Ours are 0.
        groups, rewards = batch["in/groups"], batch["in/rewards"]
        equal = np.array([np.ptp(rewards[groups == group]) == 0 for group in groups])
        assert equal.any() and not advantages[equal].any() and np.abs(expected[equal]).max() < 1e-3
        close(advantages[~equal], expected[~equal], batch.number)


# --- losses --------------------------------------------------------------------------------------

VERL_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}),
    "ppo_narrow": ("ppo", {"clip_low": 0.1, "clip_high": 0.05, "dual_clip": 1.25}),
    "gspo": ("gspo", {"clip_low": 0.05, "clip_high": 0.08}),
    "gspo_paper": ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "cispo": ("cispo", {"clip_low": 10.0, "clip_high": 0.2}),
    "cispo_two_sided": ("cispo", {"clip_low": 0.2, "clip_high": 0.28}),
    "sapo": ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
    "sapo_sharp": ("sapo", {"tau_positive": 2.0, "tau_negative": 3.5}),
}
TRL_LOSSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("sequence_mean", "ppo", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}),
    "grpo_kl": ("sequence_mean", "ppo", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}),
    "grpo_delta": ("sequence_mean", "ppo", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.4}),
    "bnpo": ("token_mean", "ppo", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}),
    "dapo": ("token_mean", "ppo", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}),
    "dr_grpo": ("constant_length", "ppo", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}),
    # TRL has the largest weight itself, here 1.2, and no smallest one.
    "cispo": ("token_mean", "cispo", {"clip_low": 1.0, "clip_high": 0.2}),
    "sapo": ("sequence_mean", "sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
    "gspo": ("sequence_mean", "gspo", {"clip_low": 0.05, "clip_high": 0.08}),
    "gspo_paper": ("sequence_mean", "gspo", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "corrected": ("sequence_mean", "ppo", {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}),
}


def aggregated(per_token: torch.Tensor, batch: Batch, mode: str) -> torch.Tensor:
    lengths = torch.from_numpy(batch.lengths).long()
    weights = losses.aggregation_weights(lengths, mode)
    denominator = losses.aggregation_denominator(lengths, mode, CONSTANT_LENGTH)
    return losses.aggregate(per_token, denominator, weights)


def counted(batch: Batch, mode: str) -> float:
    """Factor from a loss of verl to ours.

    Over a constant length L, ours divides by the number of all responses times L, as TRL does; verl
    leaves responses without a token (only in the extreme batches) out of the number.
    """
    return float((batch.lengths > 0).mean()) if mode == "constant_length" else 1.0


def ours(batch: Batch, mode: str, name: str, options: dict[str, Any], trl: str = "") -> tuple[Any, Any, Any]:
    """The loss, its gradient by the log-probs, and the tensors that the policy loss reports."""
    log_probs = batch.tensor("log_probs").requires_grad_()
    old = batch.tensor("old_log_probs")
    lengths = torch.from_numpy(batch.lengths).long()
    per_token, info = losses.policy_loss(
        log_probs, old, batch.tensor("advantages"), lengths, name=name, **options
    )
    if trl == "corrected":
        factor, _ = rollout_correction(old, batch.tensor("engine_log_probs"), lengths, weight="token")
        per_token = factor * per_token
    if trl == "grpo_kl":
        kl = losses.kl_penalty(log_probs, batch.tensor("reference_log_probs"), "k3")
        per_token = per_token + 0.04 * kl
    loss = aggregated(per_token, batch, mode)
    (grad,) = torch.autograd.grad(loss, log_probs)
    return loss, grad, info


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("theirs", VERL_LOSSES)
def test_losses_and_gradients_are_those_of_verl(theirs: str, mode: str) -> None:
    name, options = VERL_LOSSES[theirs]
    # verl's sapo is a sequence mean whatever it is asked for.
    our_mode = "sequence_mean" if name == "sapo" else AGGREGATIONS[mode]
    seen: dict[str, list[float]] = {}
    for batch in read("verl"):
        if name == "gspo" and batch.number >= BATCHES:
            continue  # see test_gspo_beyond_the_clamp
        loss, grad, info = ours(batch, our_mode, name, options)
        factor = counted(batch, our_mode)
        close(loss, factor * batch[f"out/loss/{theirs}/{mode}/loss"][0], batch.number)
        close(grad, factor * batch[f"out/loss/{theirs}/{mode}/grad"], batch.number)
        for key, values in info.items():
            seen.setdefault(key, []).append(values.mean().item())
    for key, values in seen.items():
        if key != "ratio":
            assert 0 < np.mean(values) < 1, f"{theirs}: {key} is the same at every token, a poor test"


def test_gspo_beyond_the_clamp() -> None:
    # verl clamps the mean log-ratio of a sequence from above, at 10; ours clamps each token's, at +-20,
    # as all our losses do, so one absurd token does not decide for its whole sequence. The sequences
    # without such a token agree.
    name, options = VERL_LOSSES["gspo"]
    for batch in read("verl", first=BATCHES):
        d = batch["in/log_probs"] - batch["in/old_log_probs"]
        response = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
        far = np.isin(response, response[np.abs(d) > 20])
        assert far.any() and not far.all()
        _, grad, info = ours(batch, "token_mean", name, options)
        close(grad[torch.from_numpy(~far)], batch["out/loss/gspo/token-mean/grad"][~far])
        clamped = np.clip(d.astype(np.float64), -20, 20)
        mean = np.bincount(response, clamped, len(batch.lengths)) / np.maximum(batch.lengths, 1)
        close(info["ratio"], np.exp(mean)[response])


@pytest.mark.parametrize("theirs", TRL_LOSSES)
def test_losses_and_gradients_are_those_of_trl(theirs: str) -> None:
    mode, name, options = TRL_LOSSES[theirs]
    for batch in normal("trl"):
        loss, grad, _ = ours(batch, mode, name, options, trl=theirs)
        close(loss, batch[f"out/loss/{theirs}/loss"][0], batch.number)
        if name == "gspo":
            # TRL takes the gradient of the sequence's ratio, which spreads the sum evenly over its
            # tokens. Ours and verl's is GSPO-token, in which a token's own advantage decides: the
            # same where the tokens of a sequence have one advantage (even batches), else in the mean.
            response = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
            means = np.bincount(response, grad) / batch.lengths
            if batch.number % 2 == 0:
                close(grad, means[response], batch.number)
            grad = means[response]
        close(grad, batch[f"out/loss/{theirs}/grad"], batch.number)


@pytest.mark.parametrize(("theirs", "kind"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_kl_penalties_are_those_of_verl(theirs: str, kind: Any) -> None:
    for batch in read("verl"):
        log_probs = batch.tensor("log_probs").requires_grad_()
        kl = losses.kl_penalty(log_probs, batch.tensor("reference_log_probs"), kind)
        (grad,) = torch.autograd.grad(kl.sum(), log_probs)
        d = batch["in/reference_log_probs"] - batch["in/log_probs"]
        same = np.ones(len(d), bool)
        if kind == "k3":
            # verl cuts the value, too, at 10, and with it the gradient of the tokens that have moved
            # furthest. Ours keeps it up to |d| = 20.
            same = kl.detach().numpy() < 10
            close(np.minimum(kl.detach().numpy(), 10), batch[f"out/kl/{theirs}/value"], batch.number)
        else:
            # verl clamps k3 only; ours has |d| <= 20 in all three.
            same = np.abs(d) < 20
        close(kl[torch.from_numpy(same)], batch[f"out/kl/{theirs}/value"][same], batch.number)
        close(grad[torch.from_numpy(same)], batch[f"out/kl/{theirs}/grad"][same], batch.number)
        c = np.clip(d.astype(np.float64), -20, 20)
        closed_form = {"k1": -c, "k2": c**2 / 2, "k3": np.exp(c) - c - 1}[kind]
        close(kl, closed_form, batch.number)


def test_aggregations_are_those_of_verl() -> None:
    for batch in read("verl"):
        lengths = torch.from_numpy(batch.lengths).long()
        live = float((lengths > 0).sum())
        for theirs in (*AGGREGATIONS, "token-sum", "seq-mean-token-sum"):
            x = batch.tensor("advantages").requires_grad_()
            if theirs == "token-sum":
                loss = losses.aggregate(x, 1.0)
            elif theirs == "seq-mean-token-sum":
                loss = losses.aggregate(x, live)
            else:
                loss = aggregated(x, batch, AGGREGATIONS[theirs])
            (grad,) = torch.autograd.grad(loss, x)
            factor = counted(batch, AGGREGATIONS.get(theirs, ""))
            close(loss, factor * batch[f"out/aggregation/{theirs}/loss"][0], (theirs, batch.number))
            close(grad, factor * batch[f"out/aggregation/{theirs}/grad"], (theirs, batch.number))


# --- rollout correction --------------------------------------------------------------------------

CORRECTIONS: dict[str, dict[str, Any]] = {
    "token": {"weight": "token", "max_weight": 2.0},
    "sequence": {"weight": "sequence", "max_weight": 2.0},
    "icepop_token": {"weight": "token", "max_weight": 5.0, "mask": "token"},
    "icepop_sequence": {"weight": "sequence", "max_weight": 5.0, "mask": "sequence"},
    "mask_token": {"mask": "token"},
    "mask_sequence": {"mask": "sequence"},
    "mask_geometric": {"mask": "geometric", "mask_low": 0.8, "mask_high": 1.25},
    "both": {"weight": "token", "max_weight": 1.5, "mask": "geometric", "mask_low": 0.8, "mask_high": 1.25},
}
TRL_CORRECTIONS = ("token", "sequence", "icepop_token", "icepop_sequence")


def our_factor(batch: Batch, name: str) -> np.ndarray:
    old, engine = batch.tensor("old_log_probs"), batch.tensor("engine_log_probs")
    lengths = torch.from_numpy(batch.lengths).long()
    return rollout_correction(old, engine, lengths, **CORRECTIONS[name])[0].numpy()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_rollout_correction_is_that_of_verl(name: str) -> None:
    factors = []
    for batch in read("verl"):
        factors.append(our_factor(batch, name))
        close(factors[-1], batch[f"out/correction/{name}"], batch.number)
    assert len(np.unique(np.concatenate(factors))) > 1


@pytest.mark.parametrize("name", TRL_CORRECTIONS)
def test_rollout_correction_is_that_of_trl(name: str) -> None:
    for batch in normal("trl"):
        close(our_factor(batch, name), batch[f"out/correction/{name}"], batch.number)


def test_mismatch_is_that_of_verl() -> None:
    for batch in normal("verl"):
        k3 = losses.kl_penalty(batch.tensor("engine_log_probs"), batch.tensor("old_log_probs"), "k3")
        close(k3.mean(), batch["out/correction/mismatch_k3"][0], batch.number)


# --- KL controller, entropy ----------------------------------------------------------------------


def test_kl_controller_is_that_of_verl() -> None:
    for batch in read("verl"):
        coef, target, horizon = batch["in/controller/setting"][0].tolist()
        controller = KLController(coef, target, horizon)
        for kl, rollouts, expected in zip(
            batch["in/controller/kl"][0],
            batch["in/controller/rollouts"][0],
            batch["out/controller/coefs"][0],
            strict=True,
        ):
            controller.observe(float(kl), int(rollouts))
            assert controller.coef == pytest.approx(expected, rel=1e-12)
        # With more rollouts than the horizon verl moves by more than a fifth. Ours does not.
        before = controller.coef
        controller.observe(2 * target, int(3 * horizon))
        assert controller.coef == pytest.approx(1.2 * before, rel=1e-12)


def test_log_probs_and_entropy_are_those_of_verl() -> None:
    for batch in read("verl"):
        # Both in float64, then rounded: in float32 either has errors of 1e-5 in the entropy of a
        # peaked distribution.
        hidden = torch.from_numpy(batch["in/head/hidden"][0]).double().requires_grad_()
        weight = torch.from_numpy(batch["in/head/weight"][0]).double()
        targets = torch.from_numpy(batch["in/head/targets"][0]).long()
        log_probs, entropy = token_log_probs_and_entropy(hidden, weight, targets, Head(chunk=5))
        (by_log_probs,) = torch.autograd.grad(log_probs.sum(), hidden, retain_graph=True)
        (by_entropy,) = torch.autograd.grad(entropy.sum(), hidden)
        close(log_probs, batch["out/head/log_probs"][0], batch.number)
        close(entropy, batch["out/head/entropy"][0], batch.number)
        close(by_log_probs, batch["out/head/grad_log_probs"][0], batch.number)
        close(by_entropy, batch["out/head/grad_entropy"][0], batch.number)
