"""`mssr.integrations.verl`, in an environment with verl: scripts/test_plugins.sh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("verl")

import ray
import torch
import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from mssr import algorithms
from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.shaping import entropy_bonus
from mssr.integrations.base import load_state
from mssr.integrations.verl.settings import read
from tests.plugins import verl_lab as lab

REPO = Path(__file__).resolve().parents[2]
EXAMPLE = REPO / "examples" / "verl" / "geometry3k.sh"


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray, TransferQueue and the ranks, for all tests."""
    os.environ["VERL_FILE_LOGGER_PATH"] = str(tmp_path_factory.mktemp("log") / "metrics.jsonl")
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        tq.init(lab.config(Path("unused")).transfer_queue)
        yield lab.make_actor()
        tq.close()
    finally:
        ray.shutdown()


def fit(trainer: Any, rollouts: Any) -> list[dict[str, float]]:
    """verl's own loop to its end; the metrics of its steps."""
    trainer.fit(rollouts)
    lines = Path(os.environ["VERL_FILE_LOGGER_PATH"]).read_text().splitlines()
    return [json.loads(line)["data"] for line in lines]


def told(actor: Any) -> tuple[list[list[int]], list[dict[int, Any]]]:
    """What the ranks scored after each update, and trained on, of all of them: by a row's first token."""
    scored, trained = zip(*actor.told(), strict=True)
    return (
        [[token for part in parts for token in part] for parts in zip(*scored, strict=True)],
        [{k: v for part in parts for k, v in part.items()} for parts in zip(*trained, strict=True)],
    )


def policy(function: Any, tokens: list[int], updates: int) -> torch.Tensor:
    """Log-probs or entropies of a response, of the tokens of the row."""
    row = torch.nested.as_nested_tensor([torch.tensor(tokens)], layout=torch.jagged)
    return function(row, updates).values()[2:-1]  # a prompt has 3 tokens


def prompt_id(index: int) -> str:
    return f"{'odd' if index % 2 else 'even'!r} {index // 2}"


def by_value(
    method: Any, step: int, rows: dict[int, Any], probed: list[int]
) -> tuple[dict, dict[str, float]]:
    """What a step must give, of `mssr.algorithms` alone: token advantages by index, and metrics."""
    ids, rewards = [prompt_id(i) for i in rows], [reward for reward, _ in rows.values()]
    lengths = [len(tokens) - 3 for _, tokens in rows.values()]
    advantages, metrics = method.advantages(ids, rewards, lengths)
    shaped, bonuses = {}, []
    for a, (i, (_, tokens)) in zip(advantages, rows.items(), strict=True):
        entropy = policy(lab.uncertainty, tokens, step)
        bonuses.append(entropy_bonus(torch.full_like(entropy, float(a)), entropy))
        shaped[i] = a + bonuses[-1]
    metrics["shaping/mean"] = torch.cat(bonuses).double().mean().item()
    kls = [
        kl_penalty(*(policy(lab.score, rows[token - 20][1], step + k) for k in (0, 1)))
        for token in probed
        if token  # of the padding
    ]
    metrics["policy/kl_update"] = torch.cat(kls).double().mean().item()
    method.observe(ids, rewards, metrics["policy/kl_update"])
    return shaped, {**metrics, **method.metrics()}


def test_five_steps_with_a_resume_give_what_the_algorithms_give(actor: Any, tmp_path: Path) -> None:
    told(actor)
    first = lab.make_trainer(lab.config(tmp_path), actor, steps=3)
    rollouts = [lab.Rollouts(), lab.Rollouts()]
    logged = fit(first, rollouts[0])
    scored, trained = told(actor)  # the ranks forget what they have learned

    second = lab.make_trainer(lab.config(tmp_path), actor, steps=5)
    assert second.global_steps == 3 and type(second.replay_buffer) is ReplayBuffer
    logged += fit(second, rollouts[1])
    for all_of_it, rest in zip((scored, trained), told(actor), strict=True):
        all_of_it += rest

    method = algorithms.create("mssr", kl_target=0.05)
    steps = [*rollouts[0].steps, *rollouts[1].steps]
    assert len(steps) == len(trained) == len(logged) == 5
    for step, (rows, given, metrics) in enumerate(zip(steps, trained, logged, strict=True)):
        advantages, expected = by_value(method, step, rows, scored[step])
        assert set(given) == {i + 20 for i in rows} | {0}
        assert given.pop(0) == ([0.0], [0.0])  # the padding that verl has added
        for token, (of_tokens, returns) in given.items():
            np.testing.assert_allclose(of_tokens, advantages[token - 20], rtol=1e-5, atol=1e-6)
            assert returns == [rows[token - 20][0]] * len(of_tokens)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
        assert metrics["baseline/eta"] < 0.96
        assert metrics["shaping/sign_flip_fraction"] == 0 < metrics["shaping/entropy_branch_fraction"]
    state = load_state(tmp_path / "global_step_5" / "mssr.npz")
    np.testing.assert_allclose(state["discount"]["kls"], method.state_dict()["discount"]["kls"], rtol=1e-4)
    assert not (tmp_path / "global_step_5" / "transfer_queue").exists()  # as in verl's mode "sync"
    ids = [prompt_id(i) for i in range(12)]
    np.testing.assert_allclose(second.method.baseline.values(ids), method.baseline.values(ids), rtol=1e-5)


def test_what_is_scored_again_is_random_and_the_same_in_every_run(actor: Any, tmp_path: Path) -> None:
    told(actor)
    runs = []
    for run in ("a", "b"):
        composed = lab.config(
            tmp_path / run,
            "data.seed=5",
            "trainer.save_freq=-1",
            "algorithm.mssr.kl_probe_fraction=0.2",
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=false",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        )
        rollouts = lab.Rollouts()
        fit(lab.make_trainer(composed, actor, steps=3), rollouts)
        places = []
        for rows, scored in zip(rollouts.steps, told(actor)[0], strict=True):
            assert len(scored) == 4 and 0 not in scored  # 2 ranks with micro-batches of 2; no padding
            order = sorted(rows, key=prompt_id)
            places.append(sorted(order.index(token - 20) for token in scored))
        runs.append(places)
    assert runs[0] == runs[1]  # although keys and order differ
    assert runs[0][0] != runs[0][1] != runs[0][2]


def test_all_rows_may_be_scored_again(actor: Any, tmp_path: Path) -> None:
    settings = ("trainer.save_freq=-1", "algorithm.mssr.kl_probe_fraction=1")
    rollouts = lab.Rollouts()
    told(actor)
    metrics = fit(lab.make_trainer(lab.config(tmp_path, *settings), actor, steps=1), rollouts)[0]
    scored, _ = told(actor)
    assert sorted(scored[0]) == sorted([0, *(i + 20 for i in rollouts.steps[0])])
    _, expected = by_value(algorithms.create("mssr"), 0, rollouts.steps[0], scored[0])
    assert metrics["policy/kl_update"] == pytest.approx(expected["policy/kl_update"], rel=1e-4)


def test_mvsr_gives_all_tokens_of_a_response_one_advantage(actor: Any, tmp_path: Path) -> None:
    told(actor)
    rollouts = lab.Rollouts()
    composed = lab.config(tmp_path, "algorithm.adv_estimator=mvsr", "trainer.save_freq=-1")
    metrics = fit(lab.make_trainer(composed, actor, steps=1), rollouts)[0]
    trained = told(actor)[1][0]
    rows = rollouts.steps[0]
    expected, _ = algorithms.create("mvsr").advantages(
        [prompt_id(i) for i in rows], [r for r, _ in rows.values()], [1] * len(rows)
    )
    for i, advantage in zip(rows, expected, strict=True):
        assert trained[i + 20][0] == pytest.approx([advantage] * (len(rows[i][1]) - 3))
    assert not any(name.startswith("shaping") for name in metrics)


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        (lab.Rollouts({"extra_info": {"split": "train"}}), "has no extra_info.index"),
        (lab.Rollouts({"extra_info": {"index": 0}}), "two prompts have data_source '(odd|even)' and"),
        (lab.Rollouts(responses=2), "a prompt has several responses"),
        (lab.Rollouts({"rm_scores": torch.tensor([2.0])}), r"reward of prompt .* must be in \[0, 1\], not 2"),
    ],
)
def test_rows_that_a_method_cannot_use_are_refused(
    actor: Any, tmp_path: Path, rollouts: Any, message: str
) -> None:
    trainer = lab.make_trainer(lab.config(tmp_path), actor, steps=1)
    try:
        with pytest.raises(ValueError, match=message):
            fit(trainer, rollouts)
    finally:
        tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
    assert len(trainer.method.baseline) == 0


def test_a_checkpoint_of_another_trainer_is_not_resumed(actor: Any, tmp_path: Path) -> None:
    fit(lab.make_trainer(lab.config(tmp_path), actor, steps=1), lab.Rollouts())
    (tmp_path / "global_step_1" / "mssr.npz").unlink()
    with pytest.raises(ValueError, match=r"global_step_1/mssr.npz is missing: only what mssr_sync has saved"):
        lab.make_trainer(lab.config(tmp_path), actor, steps=2)


def test_a_checkpoint_is_named_the_latest_only_when_it_holds_the_method(actor: Any, tmp_path: Path) -> None:
    trainer = lab.make_trainer(lab.config(tmp_path), actor, steps=1)
    trainer.train_dataloader = None  # whose state verl saves last
    with pytest.raises(AttributeError):
        fit(trainer, lab.Rollouts())
    assert (tmp_path / "global_step_1" / "mssr.npz").exists()
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


def test_ray_workers_have_the_plugin_and_do_not_import_the_trainer(actor: Any) -> None:
    assert actor.execute_rank_zero_sync("plugin") == (True, False, True)


def test_an_import_of_verl_is_not_slower_and_a_plugin_that_fails_is_heard_of() -> None:
    code = """
import sys
import verl
assert "mssr.integrations.verl" in sys.modules  # by the entry point
assert not {"verl.trainer.ppo.core_algos", "mssr.integrations.base"} & set(sys.modules)
sys.modules["mssr.integrations.verl.settings"] = None  # its import fails
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
assert "grpo" in ADV_ESTIMATOR_REGISTRY and "mssr" not in ADV_ESTIMATOR_REGISTRY
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mssr: no plugin for this verl: ModuleNotFoundError: " in done.stderr


def test_the_names_are_of_no_use_to_other_trainers() -> None:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    for name in ("mssr", "mvsr", "spo"):
        with pytest.raises(ValueError, match=r"need use_v1=true and v1.trainer_mode=mssr_sync"):
            get_adv_estimator_fn(name)(
                token_level_rewards=torch.ones(2, 3), response_mask=torch.ones(2, 3), config=None, index=None
            )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.use_v1=false", "trainer.use_v1=false"),
        ("algorithm.adv_estimator=grpo", "adv_estimator=grpo: mssr_sync is for mssr, mvsr, spo"),
        ("algorithm.adv_estimator=reinforce_pp", "adv_estimator=reinforce_pp"),
        ("actor_rollout_ref.rollout.n=2", "rollout.n=2: a prompt has one response here"),
        ("algorithm.use_kl_in_reward=true", "use_kl_in_reward=true: rewards must stay in"),
        ("algorithm.rollout_correction.bypass_mode=true", "bypass_mode=true: verl keeps no entropy"),
        ("algorithm.filter_groups.enable=true", "filter_groups.enable=true"),
        ("trainer.critic_warmup=5", "critic_warmup=5"),
        ("algorithm.adv_estimator=spo", "kl_source='last_visit': here eta follows the KL of the update"),
        ("algorithm.mssr.kl_source=reference", "algorithm.mssr: kl_source='reference'"),
        ("algorithm.mssr.init_rollouts=8", "algorithm.mssr: init_rollouts"),
        ("algorithm.mssr.kl_targt=0.1", "algorithm.mssr: .*kl_targt.*kl_target"),
        ("algorithm.mssr.eta_min=low", "algorithm.mssr: "),
        ("algorithm.mssr.kl_probe_fraction=1.5", r"algorithm.mssr: kl_probe_fraction must be in \[0, 1\]"),
        ("algorithm.mssr.kl_probe_fraction=0", "algorithm.mssr: kl_probe_fraction"),
        ("algorithm.mssr.shaping=soft", "algorithm.mssr: shaping must be true, false or null, not 'soft'"),
    ],
)
def test_settings_that_make_the_method_wrong_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(lab.config(Path("unused"), override), "0.9.1")
    assert "\n" not in str(caught.value)


def test_other_versions_of_verl_are_refused() -> None:
    with pytest.raises(ValueError, match=r"verl 0.10.0: this plugin is for verl 0.9.1"):
        read(lab.config(Path("unused")), "0.10.0")


def test_spo_goes_by_the_kl_of_the_update_where_that_is_asked_for() -> None:
    overrides = ("algorithm.adv_estimator=spo", "algorithm.mssr.kl_source=update")
    method, settings = read(
        lab.config(Path("unused"), *overrides, "algorithm.mssr.eta_rule=monotone"), "0.9.1"
    )
    assert (method.name, method.kl_source, method.init_rollouts) == ("spo", "update", 0)
    assert settings.shaping is None and not method.shapes_entropy


def test_the_example_is_a_command_that_verl_takes(tmp_path: Path) -> None:
    from verl.utils.config import validate_config

    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(EXAMPLE), "trainer.total_epochs=2"]
    shown = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    module, overrides = shown.stdout.splitlines()[1], shown.stdout.splitlines()[2:]
    assert module == "verl.trainer.main_ppo"
    composed = lab.compose_config(*overrides)
    validate_config(composed, use_reference_policy=True, use_critic=False)
    method, settings = read(composed, "0.9.1")
    assert method.name == "mssr" and composed.trainer.v1.trainer_mode == "mssr_sync"
    assert composed.trainer.total_epochs == 2
    assert settings.kl_probe_fraction == 0.25
