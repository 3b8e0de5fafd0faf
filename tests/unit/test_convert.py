"""`mssr convert`: public examples of EasyR1 and verl by value, every key told, scripts as in a shell."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mssr.config import Config, flatten
from mssr.config.options import describe
from mssr.errors import UserError
from mssr.runs.config import load_config, merge_layers
from mssr.tools import convert_keys
from mssr.tools.cli import main
from mssr.tools.convert import Conversion
from mssr.tools.convert_keys import FACTS, SYSTEMS
from mssr.tools.convert_sources import read

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests/fixtures/convert"
EXAMPLES = yaml.safe_load((FIXTURES / "examples.yaml").read_text())
CASES = [(system, name) for system, held in EXAMPLES.items() for name in held["examples"]]
REWARDS = {
    "examples/reward_function/math.py": "def compute_score(reward_inputs, format_weight=0.1): ...",
    "examples/reward_function/r1v.py": "def compute_score(reward_input, format_weight=0.5): ...",
    "examples/reward_function/android_gui.py": "def compute_score(reward_inputs): ...",
    "verl/utils/reward_score/openr1mm.py": "def compute_score(data_source, solution_str, ground_truth): ...",
}

COLUMNS = (
    "algorithm.name",
    "rollout.rollouts_per_step",
    "rollout.n",
    "actor.updates_per_step",
    "algorithm.loss.name",
    "algorithm.loss.clip_low",
    "algorithm.loss.clip_high",
    "algorithm.loss.aggregation",
    "algorithm.kl.coef",
    "algorithm.kl.estimator",
    "algorithm.kl.placement",
    "data.max_prompt_length",
    "rollout.max_response_length",
    "actor.lr",
    "actor.num_ranks",
    "rollout.workers",
    "actor.micro_batch_tokens",
    "reward.name",
)
MATH, SUM = "./examples/reward_function/math.py:compute_score", "token_mean"
PPO, VPPO, KL = ("ppo", 0.2, 0.3, SUM), ("ppo", 0.2, 0.2, SUM), (0.01, "k3", "loss")
EXPECTED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("EasyR1", "3b_grpo"): ("grpo", 2560, 5, 4, *PPO, *KL, 2048, 2048, 1e-6, 2, 1, 4096, MATH),
    ("EasyR1", "cispo"): (
        *("grpo", 2560, 5, 4, "cispo", 1e-9, 4, SUM),
        *(*KL, 2048, 2048, 1e-6, 8, 4, 4096, MATH),
    ),
    ("EasyR1", "dapo"): (
        *("grpo", 2560, 5, 4, "ppo", 0.2, 0.28, SUM),
        *(0, None, None, 2048, 2048, 1e-6, 8, 4, 4096, MATH),
    ),
    ("EasyR1", "gspo"): (
        *("grpo", 2560, 5, 4, "gspo", 3e-4, 4e-4, "sequence_mean"),
        *(0, None, None, 2048, 2048, 1e-6, 8, 4, 4096, MATH),
    ),
    ("EasyR1", "reinforce"): (
        *("reinforce_pp", 2560, 5, 4, *PPO),
        *(0.001, "k1", "reward", 2048, 2048, 1e-6, 8, 4, 4096, MATH),
    ),
    ("EasyR1", "sapo"): (
        *("grpo", 2560, 5, 4, "sapo", None, None, SUM),
        *(0, None, None, 2048, 2048, 1e-6, 8, 4, 4096, MATH),
    ),
    ("EasyR1", "multi_image"): ("grpo", 1280, 5, 2, *PPO, *KL, 2048, 2048, 1e-6, 8, 4, 4096, MATH),
    ("EasyR1", "gui"): (
        *("grpo", 256, 8, 1, *PPO, 0.04, "k3", "loss", 3072, 64, 1e-5, 2, 2, 3136),
        "examples/reward_function/android_gui.py:compute_score",
    ),
    ("EasyR1", "32b"): ("grpo", 2560, 5, 4, *PPO, *KL, 2048, 2048, 1e-6, 8, 1, 4096, MATH),
    ("EasyR1", "lora"): ("grpo", 2560, 5, 4, *PPO, *KL, 2048, 2048, 1e-5, 2, 1, 4096, MATH),
    ("EasyR1", "clevr"): (
        *("grpo", 2560, 5, 4, *PPO, *KL, 2048, 2048, 1e-6, 2, 2, 4096),
        "./examples/reward_function/r1v.py:compute_score",
    ),
    ("verl", "7b"): ("grpo", 2560, 5, 4, *VPPO, *KL, 1024, 2048, 1e-6, 8, 4, 30720, "math"),
    ("verl", "freeze"): ("grpo", 2560, 5, 4, *VPPO, *KL, 1024, 2048, 1e-6, 8, 4, 30720, "math"),
    ("verl", "lora"): ("grpo", 2560, 5, 4, *VPPO, *KL, 1024, 2048, 3e-6, 8, 4, 30720, "math"),
    ("verl", "balance"): ("grpo", 2560, 5, 4, *VPPO, *KL, 1024, 2048, 1e-6, 8, 4, 6144, "math"),
    ("verl", "32b_npu"): ("grpo", 2560, 5, 16, *VPPO, *KL, 1024, 2048, 1e-6, 32, 4, 3072, "math"),
    ("verl", "megatron"): ("grpo", 2560, 5, 4, *VPPO, *KL, 1024, 2048, 1e-6, 8, 8, 5120, "math"),
    ("verl", "7b_fsdp"): ("grpo", 2560, 5, 4, *VPPO, *KL, 1024, 2048, 1e-6, 8, 4, 24576, "math"),
    ("verl", "minicpm"): (
        *("grpo", 1024, 8, 4, *VPPO, 0.001, "k3", "loss", 1024, 2048, 1e-6, 8, 4, 49152),
        "math",
    ),
    ("verl", "openr1"): (
        *("grpo", 320, 5, 4, *VPPO, 0.02, "k3", "loss", 2048, 1536, 5e-7, 8, 2, 3584),
        "verl/utils/reward_score/openr1mm.py:compute_score",
    ),
}
"""What each example trains with, read from its source by hand."""
FURTHER: dict[tuple[str, str], dict[str, Any]] = {
    ("EasyR1", "3b_grpo"): {
        "trainer.epochs": 15,
        "trainer.val_every": 5,
        "trainer.keep_checkpoints": 3,
        "data.val": {"val": {"path": "hiyouga/geometry3k@test", "n": 1, "temperature": 0.6}},
        "data.prompt_template": "./examples/format_prompt/math.jinja",
        "actor.offload": "optimizer",
        "actor.offload_reference": True,
        "seed": 1,
    },
    ("EasyR1", "dapo"): {"sampler.dynamic": True, "sampler.max_draws": 20},
    ("EasyR1", "gui"): {"rollout.temperature": 0.9, "actor.max_grad_norm": 0.1, "seed": 42},
    ("EasyR1", "32b"): {"actor.master_dtype": "bfloat16", "actor.rounding": "kahan"},
    ("EasyR1", "lora"): {"actor.lora.rank": 64, "actor.lora.alpha": 64, "actor.lora.targets": []},
    ("verl", "7b"): {
        "data.val": "/home/user/data/geo3k/test.parquet",  # greedy, as there
        "data.problem_column": "prompt",
        "data.answer_column": "reward_model.ground_truth",
        "data.instruction": "",
        "data.min_pixels": 3136,
        "reward.format": "weighted",
        "reward.format_weight": 0.1,
        "algorithm.loss.dual_clip": 3.0,
        "rollout.tensor_parallel": 2,
        "trainer.val_every": 5,
        "actor.offload_reference": True,
    },
    ("verl", "freeze"): {"model.freeze_vision": True},
    ("verl", "lora"): {"actor.lora.rank": 64, "actor.lora.alpha": 32, "actor.lora.targets": []},
    ("verl", "32b_npu"): {"trainer.val_every": 0, "trainer.save_every": 0, "trainer.loggers": []},
    ("verl", "openr1"): {"actor.offload": "all", "data.shuffle": False, "data.max_pixels": 16777216},
}
OTHERWISE = {("EasyR1", "dapo"), ("EasyR1", "gui"), ("verl", "minicpm")}
"""Examples that ask for what is not possible here: exit code 2."""


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with the reward files, as in a clone of theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which a reward file's directory is added
    for name, text in REWARDS.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def script_of(system: str, name: str) -> Path:
    """An example as a script: EasyR1's over a YAML file, verl's all on the command line."""
    common = flatten(EXAMPLES[system]["common"])
    own = flatten(EXAMPLES[system]["examples"][name])
    common = {key: value for key, value in common.items() if own.get(key) != "-"}
    own = {key: value for key, value in own.items() if value != "-"}
    if system == "EasyR1":
        Path("examples/config.yaml").write_text(yaml.safe_dump(nested(common)))
        words, command = own, "python3 -m verl.trainer.main \\\n    config=examples/config.yaml"
    else:
        words, command = common | own, "python3 -m verl.trainer.main_ppo"
    settings = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in words.items()
    ]
    lines = " \\\n    ".join([command, *map(shlex.quote, settings), '"$@"'])
    path = Path(f"{name}.sh")
    path.write_text(f"#!/bin/bash\nset -x\n\n{lines}\n")
    return path


def test_the_table_is_of_all_examples() -> None:
    assert list(EXPECTED) == CASES
    assert (
        len({name for system, name in CASES if system == "EasyR1"}) >= 6 <= len(EXAMPLES["verl"]["examples"])
    )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_public_example_trains_as_there(case: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    script = script_of(*case)
    assert main(["convert", str(script), "--out", "ours.yaml"]) == (2 if case in OTHERWISE else 0)
    config = load_config("ours.yaml")  # as mssr train would, reward function included
    written = flatten(yaml.safe_load(Path("ours.yaml").read_text()))
    assert dict(zip(COLUMNS, (written.get(key) for key in COLUMNS), strict=True)) == dict(
        zip(COLUMNS, EXPECTED[case], strict=True)
    )
    tree = yaml.safe_load(Path("ours.yaml").read_text())
    for key, value in FURTHER.get(case, {}).items():
        node = tree
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    assert (
        config.trainer.epochs == written["trainer.epochs"]
        and config.responses_per_prompt == written["rollout.n"]
    )
    lines = "".join(capsys.readouterr())
    for key, value in flatten(EXAMPLES[case[0]]["examples"][case[1]]).items():
        holders = [
            key.rsplit(".", above)[0] for above in range(4)
        ]  # or what it lies in, with all that it holds
        assert value == "-" or any(f": {holder}=" in lines for holder in holders), f"nothing is said of {key}"


def keys_of(system: str) -> list[str]:
    lines = (FIXTURES / f"{system.lower()}_keys.txt").read_text().splitlines()[1:]
    found = []
    for line in lines:
        section, _, names = line.partition(": ")
        found += [f"{section}.{name}".lstrip(".") for name in names.split()]
    return found


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_key_of_theirs_has_an_entry(system: str) -> None:
    tree = {"worker": {}} if system == "EasyR1" else {"actor_rollout_ref": {}}
    conversion = Conversion(tree)
    keys = keys_of(system)
    assert len(keys) > 150
    assert [key for key in keys if conversion.about(key) is None] == []
    # And the other way round: what an entry sets there is, as an option or in the arithmetic.
    for key, about in SYSTEMS[system].items():
        targets = FACTS.get(about.to, about.to).split(", ") if about.to else []
        assert all(target in describe(Config) for target in targets), key
        assert about.to or about.note, key


def small(**changes: Any) -> dict[str, Any]:
    """The least of a verl config."""
    flat = {
        "actor_rollout_ref.model.path": "m",
        "actor_rollout_ref.rollout.n": 4,
        "data.train_files": "/d/geo3k/train.parquet",
        "data.train_batch_size": 256,
        "algorithm.adv_estimator": "grpo",
    }
    return nested(flat | {key.replace("__", "."): value for key, value in changes.items()})


def easyr1(**changes: Any) -> dict[str, Any]:
    flat = {
        "worker.actor.model.model_path": "m",
        "worker.rollout.n": 4,
        "worker.reward.reward_function": MATH,
        "data.train_files": "d.parquet",
    }
    return nested(flat | {key.replace("__", "."): value for key, value in changes.items()})


def test_defaults_of_theirs_that_differ_are_written() -> None:
    verl, theirs = Conversion(small()).options, Conversion(easyr1()).options
    assert (verl["algorithm.loss.clip_high"], theirs["algorithm.loss.clip_high"]) == (0.2, 0.3)
    assert (verl["algorithm.kl.coef"], verl["actor.activation_checkpointing"]) == (0.0, True)
    # EasyR1 has KL in the reward by default, and validates and saves at the end in any case.
    kl = {key.rpartition(".")[2]: value for key, value in theirs.items() if key.startswith("algorithm.kl.")}
    assert kl == {"coef": 0.001, "placement": "reward", "estimator": "k1"}
    assert theirs["trainer.save_every"] == theirs["trainer.val_every"] == 1_000_000
    assert (verl["trainer.save_every"], verl["trainer.epochs"], theirs["trainer.epochs"]) == (0, 30, 15)
    assert (verl["rollout.n"], theirs["data.problem_column"], theirs["data.answer_column"]) == (
        4,
        "prompt",
        "answer",
    )


AR = "actor_rollout_ref__"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (easyr1(worker__actor__ppo_epochs=2), "worker.actor.ppo_epochs=2"),
        (easyr1(worker__rollout__top_p=0.9), "worker.rollout.top_p=0.9"),
        (easyr1(algorithm__adv_estimator="gae"), "algorithm.adv_estimator=gae"),
        (easyr1(algorithm__adv_estimator="remax"), "set algorithm.name to mssr"),
        (easyr1(algorithm__kl_penalty="abs"), "algorithm.kl_penalty=abs"),
        (easyr1(worker__rollout__n=1), "grpo with 1 response"),
        (easyr1(worker__actor__global_batch_size=100), "512 prompts a step in updates of 100"),
        (easyr1(worker__actor__optim__lr_warmup_ratio=0.1), "set actor.warmup_steps"),
        (easyr1(worker__actor__optim__strategy="adamw_bf16"), "optimizer adamw_bf16 of float32"),
        (easyr1(worker__actor__model__lora__rank=8), "adapters of the vision tower"),
        (easyr1(worker__reward__reward_function=None), "the reward"),
        (easyr1(trainer__critic_warmup=5), "trainer.critic_warmup=5"),
        (easyr1(trainer__load_checkpoint_path="c/global_step_3"), "trainer.load_checkpoint_path"),
        (small(algorithm__use_kl_in_reward=True, **{f"{AR}actor__use_kl_loss": True}), "in the reward"),
        (small(**{f"{AR}actor__loss_agg_mode": "token-sum"}), "loss_agg_mode=token-sum"),
        (small(**{f"{AR}actor__policy_loss__loss_mode": "clip_cov"}), "loss_mode=clip_cov"),
        (small(**{f"{AR}actor__grad_clip": 0.5}), "set actor.max_grad_norm"),
        (small(**{f"{AR}rollout__multi_turn__enable": True}), "no tools, turns or agents"),
        ({"actor_rollout_ref": {}}, "algorithm.adv_estimator=gae, the default"),
        (small(data__truncation="left"), "data.truncation=left"),
        (small(data__train_batch_size="many"), "data.train_batch_size=many: set rollout.rollouts_per_step"),
        (small(data__train_files="/d/gsm8k/train.parquet"), "the reward"),
        (small(reward_model__enable=True), "reward.name=judge"),
        (small(trainer__v1__trainer_mode="separate_async"), "trainer.v1.trainer_mode"),
        (
            small(algorithm__filter_groups__enable=True, algorithm__filter_groups__metric="acc"),
            "filter by acc",
        ),
    ],
)
def test_what_would_train_otherwise_is_not_possible(tree: dict[str, Any], words: str) -> None:
    conversion = Conversion(tree)
    assert not conversion.same
    assert any(words in line for line in conversion.lines("not possible")), conversion.told


@pytest.mark.parametrize(
    "tree",
    [
        easyr1(worker__actor__ulysses_size=2),
        small(**{f"{AR}rollout__engine_kwargs__vllm__limit": 3}),
        small(**{f"{AR}rollout__val_kwargs__top_p": 0.7}),
    ],
)
def test_what_changes_memory_or_validation_only_is_told_and_no_error(tree: dict[str, Any]) -> None:
    conversion = Conversion(tree)
    assert conversion.same and len(conversion.lines("not possible")) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"trainer.logger": 0},
        {"data.val_files": 1.5},
        {"actor_rollout_ref.actor.ppo_mini_batch_size": 0},
        {"reward_model.overlong_buffer": True},
    ],
)
def test_a_value_of_another_kind_is_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a value is not of the kind that its key has: "):
        Conversion(nested(flatten(small()) | change))


def test_an_unknown_key_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.yaml").write_text(yaml.safe_dump(easyr1(data__max_prompt_len=3)))
    assert main(["convert", "theirs.yaml", "trainer.total_epoch=3"]) == 2
    told = capsys.readouterr()
    assert "unknown: data.max_prompt_len=3" in told.err and "unknown: trainer.total_epoch=3" in told.err
    assert "did you mean 'trainer.total_epochs'?" in told.err
    assert "# unknown: data.max_prompt_len=3" in told.out  # in the file, too


def test_units_and_forms() -> None:
    options = Conversion(
        small(
            **{
                f"{AR}actor__optim__lr_warmup_steps_ratio": 0.1,
                f"{AR}actor__loss_agg_mode": "seq-mean-token-sum",
                f"{AR}actor__policy_loss__loss_mode": "gspo",
                f"{AR}rollout__val_kwargs__n": 4,
                f"{AR}rollout__val_kwargs__temperature": 0.7,
                "trainer__total_training_steps": 50,
                "algorithm__norm_adv_by_std_in_grpo": False,
                "data__val_files": ["a.parquet", "b.parquet"],
                "reward_model__overlong_buffer": {"enable": True, "len": 100, "penalty_factor": 0.5},
            }
        )
    ).options
    assert (options["trainer.steps"], options["actor.warmup_steps"]) == (50, 5)
    assert "trainer.epochs" not in options
    # The mean over sequences of sums over tokens is a constant length of one token.
    assert (options["algorithm.loss.aggregation"], options["algorithm.loss.constant_length"]) == (
        "constant_length",
        1,
    )
    assert "algorithm.loss.dual_clip" not in options  # gspo has none, nor has verl's
    assert options["algorithm.name"] == "dr_grpo"
    assert options["data.val"] == {"val": {"path": ["a.parquet", "b.parquet"], "n": 4, "temperature": 0.7}}
    assert (options["reward.overlong_buffer"], options["reward.overlong_penalty"]) == (100, 0.5)
    adaptive = Conversion(easyr1(algorithm__kl_type="adaptive")).options
    assert (adaptive["algorithm.kl.target"], adaptive["algorithm.kl.horizon"]) == (0.1, 10000)
    assert (
        "algorithm.kl.target"
        not in Conversion(easyr1(algorithm__kl_type="adaptive", algorithm__use_kl_loss=True)).options
    )  # theirs is fixed in the loss


def test_verls_reward_is_that_of_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"data_source": ["lighteval/MATH"] * 3}), file)
    conversion = Conversion(small(data__train_files=str(file)))
    assert conversion.same and conversion.options["reward.format"] == "none"
    assert any("data_source=lighteval/MATH" in line for line in conversion.lines("read"))
    pq.write_table(pa.table({"data_source": ["lighteval/MATH", "hiyouga/geometry3k"]}), file)
    mixed = Conversion(small(data__train_files=str(file)))
    assert not mixed.same and any("rewards by data_source" in line for line in mixed.lines("not possible"))


SCRIPT = """#!/usr/bin/env bash
# A comment with 'quotes" and \\
set -xeuo pipefail
TP=${TP:-2}; MODEL="${BASE_DIR:-"${HOME}/models"}/vl"   # where it is
steps=${STEPS:-}
steps=${steps:-40}
DEVICE=${DEVICE:-$(python3 -c 'import x' && echo (a) || echo b)}
case "${DEVICE}" in
    npu)
        TP=8
        EXTRA+=(trainer.nnodes=2)
        ;;
esac
if [ "$TP" = 3 ] && { [ "$MODEL" = x ] || false; }; then LAUNCH=(uv run); fi
DATA=(
    algorithm.adv_estimator=grpo   # of groups
    data.train_files="['$HOME/geo3k/a.parquet', '$HOME/geo3k/b.parquet']"
)
DATA+=(data.train_batch_size=$((8 * 4)))
EXTRA=()
declare -a MORE=(data.shuffle=False) OTHER
EXTRA+=x; OTHER+=(y)
nohup python3 -m verl.trainer.main_ppo --config-name=ppo_trainer \\
    "${DATA[@]}" "${MORE[@]}" ${EXTRA[@]} \\
    actor_rollout_ref.model.path="$MODEL" \\
    ++actor_rollout_ref.rollout.n=4 ~data.seed \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=${TP} \\
    trainer.total_training_steps=$steps trainer.experiment_name='a $HOME b' \\
    trainer.logger=['console','wandb'] hydra.run.dir=x "$@" 2>&1 | tee "log.txt" &
"""


def test_a_script_is_read_as_a_shell_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP", "4")
    (tmp_path / "run.sh").write_text(SCRIPT)
    tree, notes = read("run.sh", ["trainer.nnodes=3"])
    flat = flatten(tree)
    assert flat == {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": ["/home/user/geo3k/a.parquet", "/home/user/geo3k/b.parquet"],
        "data.train_batch_size": "$((8 * 4))",
        "data.shuffle": False,
        "actor_rollout_ref.model.path": "/home/user/models/vl",
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
        "trainer.total_training_steps": 40,
        "trainer.experiment_name": "a $HOME b",
        "trainer.logger": ["console", "wandb"],
        "trainer.nnodes": 3,
    }
    [note] = notes
    assert "sets EXTRA, TP in an if" in note
    assert not Conversion({**tree, "data": {"train_batch_size": 32}}, notes).same  # EXTRA may say anything
    conversion = Conversion(tree, notes)
    assert not conversion.same
    assert any(
        "data.train_batch_size" in line and "running script" in line
        for line in conversion.lines("not possible")
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo nothing", "holds no commands"),
        ("a x.y=1\nb x.y=2", "holds 2 commands"),
        ("python3 -m verl.trainer.main config=nowhere.yaml data.seed=1", "nowhere.yaml, which is not here"),
        ("python3 -m m --config-path=conf --config-name=mine data.seed=1", "conf/mine.yaml"),
        ("python3 -m m data.seed=1", "neither a config of EasyR1"),
        ("python3 -m m data.seed='[1'", "cannot be read"),
    ],
)
def test_a_script_that_cannot_be_read_is_one_line(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.sh").write_text(text)
    assert main(["convert", "run.sh"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_comment_inside_a_command_ends_it() -> None:
    Path("run.sh").write_text(
        "python3 -m m actor_rollout_ref.rollout.n=4 \\\n  # more\n  data.seed=3 \\\n  x\n"
    )
    tree, [note] = read("run.sh", [])
    assert tree == {"actor_rollout_ref": {"rollout": {"n": 4}}}
    assert "data.seed=3 and what follows is cut off" in note


def test_hydras_yaml_over_what_it_names() -> None:
    Path("base.yaml").write_text("data: {train_batch_size: 64, val_batch_size: '???'}\n")
    Path("top.yaml").write_text(
        "hydra: {searchpath: [x]}\ndefaults: [ppo_trainer, base, {model: other}, _self_]\n"
        "data: {max_prompt_length: 7}\n"
        "actor_rollout_ref: {rollout: {n: 2, name: '${nowhere}', prompt_length: '${data.max_prompt_length}'}}"
    )
    Path("run.sh").write_text("python3 -m m --config-path=$(pwd) --config-name top data.seed=5")
    for name in ("top.yaml", "run.sh"):
        tree, notes = read(name, [])
        flat = flatten(tree)
        assert (flat["data.train_batch_size"], flat["data.max_prompt_length"]) == (64, 7)
        assert flat["actor_rollout_ref.rollout.prompt_length"] == 7
        assert flat["actor_rollout_ref.rollout.name"] == "${nowhere}"
        assert "data.val_batch_size" not in flat and "hydra" not in tree
        assert notes == ["defaults of top.yaml: model/other is not read, model/other.yaml is not beside it"]


def test_a_whole_config_that_was_refused_converts(capsys: pytest.CaptureFixture[str]) -> None:
    whole = ROOT / "tests/fixtures/inputs/er1_whole.yaml"
    with pytest.raises(UserError, match="mssr convert FILE"):
        load_config(whole)
    assert main(["convert", str(whole), "worker.rollout.n=8", "--out", "ours.yaml"]) == 0
    tree = yaml.safe_load(Path("ours.yaml").read_text())
    Path("er1.py").write_text("def compute_score(reward_inputs): ...")
    config = merge_layers([("ours.yaml", tree)], [])
    assert (config.rollout.rollouts_per_step, config.responses_per_prompt) == (128, 8)
    assert "read: worker.rollout.n=8: rollout.n=8, rollout.rollouts_per_step=128" in capsys.readouterr().out


def test_the_page_is_up_to_date() -> None:
    text = (ROOT / "docs/convert.md").read_text()
    assert text[text.index(convert_keys.MARK) :] == convert_keys.reference()
