"""Who may write to a run directory, and which changes of the config a run survives."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mssr.config import Config, flatten, to_dict
from mssr.errors import UserError
from mssr.runs.config import load_config
from mssr.runs.run_directory import compare_configs, prepare_run_directory

pytestmark = pytest.mark.unit
DIGITS = Path(__file__).parents[2] / "configs/digits/mssr.yaml"

HOLDER = """
import os, subprocess, sys, time
from mssr.runs.config import load_config
from mssr.runs.run_directory import prepare_run_directory
held = prepare_run_directory(load_config(sys.argv[1], ["trainer.run_dir=" + sys.argv[2]]))
held.__enter__()
# Children of both kinds, which stay when this process is killed.
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
forked = os.fork()
if not forked:
    time.sleep(600)
    os._exit(0)
print(sleeper.pid, forked, flush=True)
time.sleep(600)
"""


def config(run_dir: Path, *overrides: str) -> Config:
    return load_config(DIGITS, [f"trainer.run_dir={run_dir}", *overrides])


def prepare(run_dir: Path, *overrides: str) -> tuple[str, ...]:
    """Hold it and let go; what the user is told."""
    with prepare_run_directory(config(run_dir, *overrides)) as notes:
        return notes


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that holds ``tmp_path / "run"``, and the pids of its two children."""
    command = [sys.executable, "-c", HOLDER, str(DIGITS), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    yield process, children
    for pid in (process.pid, *children):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    process.stdout.close()


def test_a_second_driver_is_told_who_holds_the_directory(holder, tmp_path: Path) -> None:
    process, _ = holder
    before = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
        prepare(tmp_path / "run", "actor.lr=9")
    assert (tmp_path / "run/config.yaml").read_text() == before
    prepare(tmp_path / "other")


def test_a_killed_driver_leaves_no_lock_though_its_children_live(holder, tmp_path: Path) -> None:
    process, children = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in children:
        os.kill(pid, 0)  # still there
    with prepare_run_directory(config(tmp_path / "run")):
        assert (tmp_path / "run/.lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_a_fork_neither_holds_nor_frees_the_directory(tmp_path: Path) -> None:
    """As data loaders and user code may fork while a run goes on."""
    with prepare_run_directory(config(tmp_path)):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            prepare(tmp_path)
    prepare(tmp_path)


def test_a_refused_config_does_not_keep_the_directory(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="seed: 0 -> 1") as refused:
        prepare(tmp_path, "seed=1")
    prepare(tmp_path)
    assert refused.value  # with its traceback, and the frames in it


def test_where_there_are_no_locks_the_run_goes_on_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    (note,) = prepare(tmp_path)
    assert "cannot be locked (Operation not supported)" in note


def change(key: str, value: Any, **base: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The default config, with changes to both, before and after a change."""
    trees = []
    for settings in (base, {**base, key: value}):
        tree = to_dict(Config())
        for name, v in settings.items():
            *sections, leaf = name.split(".")
            part = tree
            for section in sections:
                part = part[section]
            part[leaf] = v
        trees.append(tree)
    return trees[0], trees[1]


@pytest.mark.parametrize(
    "key",
    "model.path model.freeze_vision data.train data.id_column data.max_prompt_length data.shuffle "
    "reward.name reward.options reward.format algorithm.name algorithm.baseline.prior_strength "
    "algorithm.discount.eta_min sampler.name seed rollout.n rollout.rollouts_per_step rollout.engine "
    "actor.lora.rank actor.lora.alpha actor.optimizer actor.master_dtype actor.rounding".split(),
)
def test_what_the_state_means_may_not_change(key: str) -> None:
    value = {"tolerance": 0.1} if key == "reward.options" else 7
    drift = compare_configs(*change(key, value))
    assert not drift.listed
    assert [line.split(":")[0] for line in drift.refused] == [key + ".tolerance" * (key == "reward.options")]
    assert drift.refused[0].endswith(" -> 0.1" if key == "reward.options" else " -> 7")


@pytest.mark.parametrize(
    "key",
    "actor.lr actor.lr_schedule actor.warmup_steps actor.weight_decay actor.max_grad_norm actor.betas "
    "actor.updates_per_step rollout.temperature rollout.max_response_length watch.patience data.val "
    "reward.time_limit_s actor.lora.dropout".split(),
)
def test_what_changes_the_course_is_listed(key: str) -> None:
    old = flatten(to_dict(Config()))[key]
    drift = compare_configs(*change(key, 77))
    assert (drift.refused, drift.listed) == ([], [f"{key}: {old} -> 77"])


@pytest.mark.parametrize(
    "key",
    "experiment_name trainer.run_dir trainer.steps trainer.resume_force cluster.launcher rollout.workers "
    "rollout.engine_options rollout.max_num_seqs actor.num_ranks actor.micro_batch_tokens data.cache_dir "
    "reward.workers actor.offload".split(),
)
def test_how_it_is_computed_may_change_silently(key: str) -> None:
    old, new = change(key, {"swap": 1} if key.endswith("options") else 77)
    assert old != new
    drift = compare_configs(old, new)
    assert (drift.refused, drift.listed) == ([], [])


def test_the_number_of_steps_is_listed_where_the_learning_rate_follows_it() -> None:
    drift = compare_configs(*change("trainer.steps", 99, **{"actor.lr_schedule": "cosine"}))
    assert drift.listed == ["trainer.steps: 120 -> 99"] and not drift.refused


def test_an_option_that_the_old_config_lacks_counts_as_its_default() -> None:
    old, new = to_dict(Config()), to_dict(Config())
    del old["watch"], old["actor"]["max_grad_norm"], old["algorithm"]["kl"]
    assert not compare_configs(old, new).listed and not compare_configs(old, new).refused
    new["actor"]["max_grad_norm"] = 5.0
    new["algorithm"]["kl"]["coef"] = 0.5
    drift = compare_configs(old, new)
    assert drift.listed == ["actor.max_grad_norm: 1.0 -> 5.0"]
    assert drift.refused == ["algorithm.kl.coef: 0.01 -> 0.5"]


def test_null_is_what_it_means() -> None:
    """A run of before algorithm.loss.name could be null goes on; and each config's null is its own."""
    old, new = change("algorithm.loss.name", None)
    old["algorithm"]["loss"]["name"] = "ppo"
    old["algorithm"]["correction"]["weight"] = "none"
    assert compare_configs(old, new) == compare_configs(new, old) == compare_configs(new, new)
    old["algorithm"]["loss"]["name"] = "gspo"
    assert compare_configs(old, new).refused == ["algorithm.loss.name: gspo -> None"]
    old["algorithm"]["loss"]["name"], new["rollout"]["lag"] = "ppo", 1  # so null is token
    drift = compare_configs(old, new)
    assert drift.refused == ["algorithm.correction.weight: none -> None"]
    assert drift.listed == ["rollout.lag: 0 -> 1"]


def test_secrets_are_neither_shown_nor_a_difference() -> None:
    secret = "hf_" + "a1" * 16
    old, new = change("reward.options", {"judge": secret})
    assert compare_configs(old, new).refused == ["reward.options.judge: None -> ***"]
    assert compare_configs({**new, "reward": {**new["reward"], "options": {"judge": "***"}}}, new) == (
        compare_configs(new, new)
    )


def test_every_option_survives_its_own_config_yaml(tmp_path: Path) -> None:
    """What is read back from config.yaml differs in nothing, or every resume would be refused."""
    prepare(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert prepare(tmp_path) == ()
