"""The shipped configs: valid, with the paper's numbers, and different only where they are meant to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mssr.config import flatten, to_dict
from mssr.errors import UserError
from mssr.runs.config import advice, load_config
from mssr.tools.cli import main

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PAPER = ROOT / "configs/paper"
CONFIGS = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")])
CONFIGS = [path for path in CONFIGS if path.parent.name != "cluster"]  # which are for Kubernetes and the like
SMALL, LARGE = PAPER / "qwen2_5_vl_3b", PAPER / "qwen2_5_vl_7b"
OTHERS = {LARGE: "7b", PAPER / "qwen3_vl_4b": "qwen3-4b", PAPER / "qwen3_vl_8b": "qwen3-8b"}
"""Directories of the same recipes for other models, with what their experiments are called."""
NAME = {"experiment_name", "algorithm.name"}
DIFFERENCES = {
    ("mssr", "mvsr"): NAME,
    ("mssr", "reinforce_pp"): NAME,
    ("mssr", "grpo"): NAME | {"rollout.n"},
    ("grpo", "rloo"): NAME,
    ("mvsr", "mvsr_entropy_loss"): {"experiment_name", "algorithm.loss.entropy_coef"},
    ("mvsr", "mvsr_text_anchor"): {"experiment_name", "algorithm.loss.text_anchor_coef"},
    ("mssr", "published_code"): {
        "experiment_name",
        "algorithm.baseline.init_rollouts",
        "algorithm.baseline.init_strength",
        "algorithm.baseline.init_smoothing",
        "algorithm.baseline.prior_mean",
        "algorithm.discount.eta_rule",
        "algorithm.discount.kl_source",
        "algorithm.discount.window",
        "algorithm.shaping.entropy",
    },
}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # plug-ins are named relative to the working directory


def flat(path: Path) -> dict[str, Any]:
    return flatten(to_dict(load_config(path)))


def differences(a: Path, b: Path) -> set[str]:
    left, right = flat(a), flat(b)
    return {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("pair", DIFFERENCES, ids="-".join)
def test_a_recipe_differs_from_its_neighbour_only_where_it_should(pair: tuple[str, str]) -> None:
    a, b = pair
    assert differences(SMALL / f"{a}.yaml", SMALL / f"{b}.yaml") == DIFFERENCES[pair]


@pytest.mark.parametrize("directory", OTHERS, ids=lambda path: path.name)
def test_every_recipe_exists_for_every_model_and_differs_by_it(directory: Path) -> None:
    names = {p.stem for p in SMALL.glob("*.yaml")}
    assert names == {name for pair in DIFFERENCES for name in pair}
    assert names == {p.stem for p in directory.glob("*.yaml")}
    for name in names:
        small, other = SMALL / f"{name}.yaml", directory / f"{name}.yaml"
        assert differences(small, other) == {"experiment_name", "model.path"}
        assert load_config(other).experiment_name == f"paper-{OTHERS[directory]}-{name}"
        assert load_config(small).experiment_name == f"paper-3b-{name}"


def test_the_papers_numbers() -> None:
    mssr = load_config(LARGE / "mssr.yaml")
    discount = mssr.algorithm.discount
    assert (discount.eta_min, discount.eta_max, discount.kl_target, discount.window) == (
        0.875,
        0.96,
        0.01,
        20,
    )
    assert (mssr.rollout.rollouts_per_step, mssr.trainer.steps, mssr.actor.lr) == (2048, 120, 1e-6)
    assert (mssr.algorithm.kl.coef, mssr.kl_source, mssr.shapes_entropy) == (0.01, "update", True)
    anchored = load_config(LARGE / "mvsr_text_anchor.yaml").algorithm
    assert (anchored.kl.coef, anchored.loss.text_anchor_coef) == (0.01, 0.01)  # on top of the reference
    for name in ("grpo", "rloo"):
        config = load_config(LARGE / f"{name}.yaml")
        assert (config.responses_per_prompt, config.prompts_per_step) == (8, 256)
        assert config.actor.updates_per_step == mssr.actor.updates_per_step
    published = load_config(SMALL / "published_code.yaml")
    assert published.estimator_options["eta_rule"] == "published_code"
    assert (published.kl_source, published.init_rollouts) == ("reference", 1)


def test_every_value_of_a_paper_recipe_names_its_source() -> None:
    for path in PAPER.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            setting = re.match(r"\s*(\w+): \S", line)
            if setting and setting[1] not in ("base", "experiment_name", "name"):
                assert re.search(r"# (P|C|E|us)\b", line), f"{path}: {line}"


def test_a_config_may_be_based_on_another(tmp_path: Path) -> None:
    digits = ROOT / "configs/digits/mssr.yaml"
    (tmp_path / "middle.yaml").write_text(f"base: {digits}\nactor: {{lr: 1.0e-4}}\ntrainer: {{steps: 7}}\n")
    (tmp_path / "top.yaml").write_text("base: middle.yaml\ntrainer: {steps: 8}\n")
    assert differences(digits, tmp_path / "top.yaml") == {"actor.lr", "trainer.steps"}
    assert load_config(tmp_path / "top.yaml", ["trainer.steps=9"]).trainer.steps == 9


def test_a_wrong_base_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost, loop = tmp_path / "lost.yaml", tmp_path / "loop.yaml"
    lost.write_text("base: nowhere.yaml\n")
    loop.write_text("base: loop.yaml\n")
    for path, words in ((lost, "nowhere.yaml does not exist (base of"), (loop, "based on itself")):
        assert main(["train", str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_the_literal_paper_is_allowed_and_its_signs_are_explained() -> None:
    recipe = SMALL / "mssr.yaml"
    assert advice(load_config(recipe)) == []
    literal = load_config(recipe, ["algorithm.shaping.coef=2.0", "algorithm.shaping.divisor=0.4"])
    [line] = advice(literal)
    assert "algorithm.shaping.divisor=0.4" in line and "sign_flip_fraction" in line
    assert any("k1" in x for x in advice(load_config(recipe, ["algorithm.kl.estimator=k1"])))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.name=grpo", "sampler.name=uncertainty"], "sampler.name=uncertainty"),
        (["sampler.dynamic=true"], "one response per prompt"),
        (["algorithm.kl.placement=reward"], "algorithm.kl.placement=reward: the Beta baseline"),
        (["algorithm.name=rloo", "algorithm.kl.placement=reward", "algorithm.kl.coef=0"], "does nothing"),
        (["algorithm.discount.eta_rule=half_life"], "last_visit"),
        (
            ["algorithm.discount.eta=0.9", "algorithm.discount.window=3"],
            "algorithm.discount.window=3 is read",
        ),
        (["algorithm.discount.half_life=0.1"], "algorithm.discount.half_life=0.1 is read by nothing"),
        (["algorithm.baseline.init_strength=3"], "algorithm.baseline.init_rollouts=0"),
        (["algorithm.loss.tau_positive=2"], "algorithm.loss.tau_positive=2.0 is read by nothing"),
        (["algorithm.loss.name=dis", "algorithm.correction.weight=token"], "algorithm.loss.name=dis does it"),
        (["algorithm.loss.name=dis", "algorithm.correction.mask=token"], "algorithm.loss.name=dis does it"),
        (["algorithm.loss.max_kl=0.1"], "algorithm.loss.name=ppo (as null means here)"),
        (["algorithm.shaping.visual_fraction=0.5"], "algorithm.shaping.visual=none"),
        (["algorithm.entropy_control.integral=1"], "algorithm.entropy_control.target=null"),
        (["algorithm.name=grpo", "algorithm.shaping.coef=0.1"], "algorithm.shaping.enabled=false"),
        (["algorithm.loss.name=sapo", "algorithm.loss.clip_low=0.1"], "algorithm.loss.name=sapo"),
        (["algorithm.loss.name=pppo"], "did you mean 'ppo'"),
        (["algorithm.loss.constant_length=9"], "algorithm.loss.aggregation=token_mean"),
        (["algorithm.kl.horizon=9"], "algorithm.kl.target=null"),
        (["algorithm.correction.max_weight=3"], "algorithm.correction.weight=none"),
        (["algorithm.correction.mask=token", "algorithm.correction.mask_low=7"], "mask_low"),
        (["algorithm.loss.clip_low=1.5"], "clip_low"),
        (["algorithm.loss.dual_clip=0.5"], "dual_clip"),
        (["sampler.max_draws=3"], "sampler.dynamic=false"),
        (["sampler.uncertainty_eps=3"], "sampler.name=epochs"),
        (["algorithm.options.decay=0.5"], "algorithm.options is for a method or loss from a file"),
        (["algorithm.loss.options.decay=0.5"], "algorithm.loss.options is for"),
        (["algorithm.clip_low=0.1"], "did you mean algorithm.loss.clip_low?"),
        (["algorithm.name=nowhere.py:Method"], "nowhere.py"),
        (["algorithm.loss.name=nowhere.py:loss"], "nowhere.py"),
    ],
)
def test_a_contradiction_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load_config(ROOT / "configs/digits/mssr.yaml", overrides)
    assert "\n" not in str(error.value)


def test_a_plug_in_with_an_option_it_does_not_take_is_refused() -> None:
    config = ROOT / "examples/custom_estimator/digits.yaml"
    with pytest.raises(UserError, match=r"no option 'decoy'.*did you mean 'decay'"):
        load_config(config, ["algorithm.options.decoy=0.5"])
