"""Configs: what is refused, in which words, and what one flag changes."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mssr import algorithms
from mssr.config import Config, reference, to_dict
from mssr.config.loading import from_dict
from mssr.config.options import check_read, check_values, describe
from mssr.errors import UserError
from mssr.runs.config import advice, load_config
from mssr.tools.cli import main

pytestmark = pytest.mark.unit
DIGITS = Path(__file__).parents[2] / "configs/digits/mssr.yaml"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor.learning_rate=1", "actor.learning_rate"),
        ("actr.lr=1", "did you mean actor.lr?"),
        ("trainer.steps=many", "trainer.steps"),
        ("rollout.n=1.5", "rollout.n"),
        ("actor=3", "actor"),
        ("actor.lr.x=1", "unknown key actor.lr.x, did you mean actor.lr?"),
        ("trainer.loggers={}", "has the wrong type"),
        ("trainer.steps=0", "trainer.steps=0 must be greater than 0"),
        ("rollout.engine=sglang", "rollout.engine=sglang must be one of vllm, hf"),
        ("algorithm.name=mssrr", "did you mean 'mssr'"),
        ("rollout.engine_options.mm_processor_cache_gb=8", "data.image_cache_gib"),
        ("rollout.engine_options.mm_processor_kwargs={size: 1}", "data.min_pixels"),
        ("rollout.engine_options.mm_device_do_normalize=true", "ready from our encoder"),
        ("rollout.engine_options.tensor_parallel_size=2", "set rollout.tensor_parallel"),
        ("rollout.engine_options.distributed_executor_backend=ray", "set rollout.tensor_parallel"),
        ("rollout.engine_options.pipeline_parallel_size=2", "set rollout.tensor_parallel"),
        ("rollout.engine_options.data_parallel_size=2", "set rollout.workers"),
        ("rollout.engine_options.enable_sleep_mode=true", "set cluster.placement=colocated"),
        ("rollout.engine_options.weight_transfer_config={}", "set cluster.weight_transfer"),
        ("rollout.engine_options.worker_extension_cls=x", "a worker of ours"),
        ("rollout.engine_options.max_num_seqs=8", "set rollout.max_num_seqs"),
        ("rollout.engine_options.gpu_memory_utilization=0.5", "set rollout.gpu_memory_utilization"),
        ("rollout.engine_options.max_model_len=8", "data.max_prompt_length + rollout.max_response_length"),
        ("rollout.rollouts_per_step=255", "actor.updates_per_step=4 does not divide"),
        ("data.min_pixels=99999", "data.max_pixels"),
        ("cluster.launcher=local", "actor.num_ranks=1"),
        ("algorithm.discount.eta_min=0.99", "algorithm.discount"),
        ("trainer.loggers=[comet]", "trainer.loggers"),
        ("model.attn_implementation=flash", "must be one of auto, varlen, sdpa, eager, flash_attention_2"),
        ("actor.vision_cache_gib=2", "read by nothing with model.freeze_vision=false"),
        ("actor.lora.alpha=8", "read by nothing with actor.lora.rank=0"),
        ("actor.lora.rank=-1", "actor.lora.rank=-1 must not be negative"),
        ("actor.rounding=kahan", "read by nothing with actor.master_dtype=float32"),
        ("actor.optimizer=sgd", "actor.optimizer=sgd must be one of adamw, adamw_8bit"),
        ("actor.offload=disk", "actor.offload=disk must be one of none, optimizer, all"),
        ("nonsense", "must look like key=value"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_key(
    override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(DIGITS), override]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("actor.optimizer=adamw_8bit actor.master_dtype=bfloat16", "set actor.master_dtype=float32"),
        ("actor.optimizer=adamw_8bit actor.offload=all", "actor.offload=all runs the optimizer on the host"),
        ("actor.offload=all actor.keep_gathered=true", "actor.keep_gathered=true holds whole parameters"),
        ("actor.num_ranks=8 actor.shard_size=3", "actor.shard_size=3 does not divide actor.num_ranks=8"),
        ("actor.num_ranks=2 actor.shard_size=4", "actor.shard_size=4 does not divide actor.num_ranks=2"),
        ("actor.keep_gathered=true actor.offload_reference=true algorithm.kl.coef=0.1", "set one of the two"),
        ("actor.offload_reference=true algorithm.kl.coef=0", "read by nothing with algorithm.kl.coef=0"),
        (
            "actor.offload_reference=true algorithm.kl.coef=0.1 actor.lora.rank=4",
            "read by nothing with actor.lora.rank=4",
        ),
        (
            "actor.offload_reference=true algorithm.kl.coef=0.1 actor.offload=all",
            "read by nothing with actor.offload=all",
        ),
        ("actor.lora.rank=4 actor.lora.dropout=1", "actor.lora.dropout=1.0 must be below 1"),
    ],
)
def test_memory_options_that_contradict_each_other_are_refused(overrides: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(DIGITS, ["actor.keep_gathered=false", *overrides.split()])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_ranks_make_as_many_copies_as_their_shards_are_enough_for() -> None:
    eight = [f"actor.num_ranks=8 {x}".split() for x in ("", "actor.shard_size=8", "actor.shard_size=2")]
    assert [load_config(DIGITS, options).replicas for options in eight] == [1, 1, 4]
    following = ["algorithm.name=reinforce_pp", "algorithm.kl.coef=0.1", "actor.keep_gathered=false"]
    assert load_config(DIGITS, [*following, "actor.offload_reference=true"]).actor.offload_reference


@pytest.mark.parametrize(
    ("override", "package", "extra"),
    [("actor.lora.rank=4", "peft", "lora"), ("actor.optimizer=adamw_8bit", "torchao", "int8")],
)
def test_a_package_that_is_missing_is_named(
    override: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_config(DIGITS, [override])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find_spec(n))
    with pytest.raises(UserError, match=rf"needs the package {package}; install mssr\[{extra}\]"):
        load_config(DIGITS, [override])


def test_with_adapters_features_are_kept_and_a_rate_for_full_training_is_told() -> None:
    config = load_config(DIGITS, ["actor.lora.rank=4", "actor.vision_cache_gib=2", "actor.lr=1e-6"])
    assert not config.trains_vision
    assert any("actor.lr=1e-06 is a rate for full training" in line for line in advice(config))


def test_grpo_with_one_response_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(DIGITS), "algorithm.name=grpo", "rollout.n=1"]) == 2
    assert "rollout.n=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.shaping.coef=0.5",
        "algorithm.baseline.prior_strength=2",
        "algorithm.discount.window=5",
    ],
)
def test_an_option_that_nothing_reads_is_refused(override: str) -> None:
    load_config(DIGITS, [override])  # mssr reads all of them
    with pytest.raises(UserError, match="read by nothing"):
        load_config(DIGITS, [override, "algorithm.name=rloo"])


def test_only_eps_of_methods_that_divide_is_read() -> None:
    assert load_config(DIGITS, ["algorithm.eps=0.1"]).estimator_options["eps"] == 0.1
    with pytest.raises(UserError, match=r"algorithm\.eps"):
        load_config(DIGITS, ["algorithm.eps=0.1", "algorithm.name=rloo"])


def test_swapping_the_method_keeps_the_rollout_budget_and_the_updates() -> None:
    responses = dict.fromkeys(("mssr", "mvsr", "spo", "reinforce_pp", "flash_reinforce"), 1)
    responses |= dict.fromkeys(
        ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "lite_ppo", "maxrl", "dbb"), 8
    )
    assert set(responses) == set(algorithms.names())
    for name, n in responses.items():
        updates = 1 if name == "flash_reinforce" else 4  # it is defined for one
        own = [] if updates == 4 else ["actor.updates_per_step=1"]
        config = load_config(DIGITS, [f"algorithm.name={name}", *own])
        assert config.responses_per_prompt == n
        assert config.prompts_per_step * n == 256
        assert config.actor.updates_per_step == updates
        assert config.shapes_entropy == (name == "mssr")


def test_a_config_survives_its_own_yaml() -> None:
    config = load_config(DIGITS, ["rollout.engine_options.swap_space=1"])
    assert config.rollout.engine_options == {"swap_space": 1}
    assert from_dict(to_dict(config)) == config


def test_a_bare_off_is_not_a_truth_value() -> None:
    assert load_config(DIGITS, ["trainer.progress=off"]).trainer.progress == "off"
    with pytest.raises(UserError, match="progress=True must be one of"):
        load_config(DIGITS, ["trainer.progress=on"])


def test_missing_and_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert main(["train", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml is not valid YAML" in capsys.readouterr().err


def test_steps_or_epochs(tmp_path: Path) -> None:
    """Of several layers the later says how long; one that says both contradicts itself."""

    def length(*overrides: str, **trainer: int) -> tuple[int, int | None]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"base": str(DIGITS), "trainer": trainer}))
        config = load_config(path, overrides).trainer
        return config.steps, config.epochs

    assert length() == (load_config(DIGITS).trainer.steps, None)
    assert length(epochs=2) == (0, 2)
    assert length("trainer.steps=9", epochs=2) == (9, None)
    assert length("trainer.epochs=4", steps=7) == (0, 4)
    assert length(steps=0, epochs=2) == (0, 2)  # as config.yaml of a run has it
    for overrides, trainer in (
        ([], {"steps": 5, "epochs": 2}),
        (["trainer.steps=5", "trainer.epochs=2"], {}),
    ):
        with pytest.raises(UserError, match=r"trainer\.steps.* and trainer\.epochs.* both say"):
            length(*overrides, **trainer)
    with pytest.raises(UserError, match=r"trainer\.epochs=0 must be greater than 0"):
        length(epochs=0)


def test_the_reference_is_what_the_fields_say() -> None:
    """Every option with its meaning, default, range, readers and what a resume thinks of a change."""
    page = (DIGITS.parents[2] / "docs/config.md").read_text()
    assert page == reference.reference(), "run python -m mssr.config.reference > docs/config.md"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(not option.section for option in describe(Config).values())
    [window] = [row for row in rows if "`algorithm.discount.window`" in row]
    assert window == (
        "| `algorithm.discount.window` | `20` | `> 0` | Steps over which the KL is averaged. | "
        "`algorithm.name takes it and algorithm.discount.eta = null and kl_source != last_visit` | refused | "
        "unread |"
    )


def test_the_defaults_of_every_method_are_in_range_and_read() -> None:
    """So no condition names a key that is not there."""
    for key, option in describe(Config).items():
        for condition in option.read_if.replace(" or ", " and ").split(" and "):
            setting, section = condition.split(" ")[0], key.rpartition(".")[0]
            assert not condition or {setting, f"{section}.{setting}"} & describe(Config).keys(), key
    for name in algorithms.names():
        config = load_config(DIGITS, [f"algorithm.name={name}"])
        check_values(config)
        check_read(config, meant=config.meant)


@pytest.mark.parametrize(
    ("key", "taken", "refused"),
    [
        ("actor.lora.dropout", (0.0, 0.5), {-0.1: "not be negative", 1.0: "be below 1", math.nan: "not be"}),
        ("algorithm.eps", (None, 1e-9), {0.0: "be greater than 0", math.nan: "be greater than 0"}),
        ("actor.kl_probe_fraction", (None, 1.0), {0.0: r"lie in \(0, 1\]", 1.1: r"lie in \(0, 1\]"}),
        ("algorithm.discount.eta", (0.0, 1.0), {-0.1: r"lie in \[0, 1\]", math.inf: r"lie in \[0, 1\]"}),
        ("algorithm.discount.eta_max", (0.9,), {1.0: r"lie in \(0, 1\)", 0.0: r"lie in \(0, 1\)"}),
        ("watch.length_growth", (1.5, None), {1.0: "be greater than 1, or be null$"}),
        ("trainer.val_max_prompts", (1, None), {0: "be greater than 0", -5: "be greater than 0"}),
        ("rollout.lag", (0, 1), {2: "be 0 or 1", -1: "be 0 or 1"}),
        ("algorithm.kl.estimator", ("k1", "k3"), {"k4": "be one of k1, k2, k3"}),
        ("actor.betas", ([0.0, 0.9],), {(0.9, 1.0): r"lie in \[0, 1\)"}),
    ],
)
def test_the_edges_of_a_range(key: str, taken: tuple[Any, ...], refused: dict[Any, str]) -> None:
    def check(value: Any) -> None:
        config = load_config(DIGITS)
        *sections, name = key.split(".")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, list(value) if isinstance(value, tuple) else value)
        check_values(config)

    for value in taken:
        check(value)
    for value, words in refused.items():
        with pytest.raises(UserError, match=rf"^{re.escape(key)}[=:].* must {words}"):
            check(value)


def test_what_null_means_is_told_with_an_option_that_nothing_reads() -> None:
    with pytest.raises(UserError) as error:
        load_config(DIGITS, ["algorithm.name=rloo", "algorithm.shaping.coef=0.5"])
    assert str(error.value) == (
        "algorithm.shaping.coef=0.5 is read by nothing with algorithm.shaping.enabled=false (as null means "
        "here); change that or remove it"
    )
