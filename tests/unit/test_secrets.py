"""Secrets stay out of configs and of what is written; code that a user did not ask for is not run."""

from __future__ import annotations

import ast
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import mssr
from mssr.config import Config, ModelConfig, to_dict
from mssr.config.loading import config_yaml
from mssr.config.secrets import environment_variable, is_secret_name, named_secrets, redact
from mssr.errors import UserError
from mssr.runs.config import load_config
from mssr.runs.console import Console
from mssr.tools.cli import main

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs/digits/mssr.yaml"
SHIPPED = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")])
SHIPPED = [file for file in SHIPPED if file.parent.name != "cluster"]  # which are no configs of ours
HF = "hf_" + "aBcD" * 8
LOOKS = [
    HF,
    "sk-proj-" + "a1B2" * 6,
    "ghp_" + "a1B2" * 9,
    "AKIA" + "ABCD" * 4,
    "https://me:hunter22@host/data",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJlLW9mLWl0",
]


@pytest.mark.parametrize(
    "name",
    "api_key apiKey hf_token token auth_token access_token secret client_secret password db_passwd "
    "credentials aws_secret_access_key access_key private_key wandb_api_key Authorization".split(),
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert named_secrets({"reward": {"options": {name: "value"}}}) == [f"reward.options.{name}"]
    assert named_secrets({name: ""}) == named_secrets({name: None}) == named_secrets({name: True}) == []
    assert named_secrets({name: "${oc.env:SOMEWHERE}"}) == []


@pytest.mark.parametrize(
    "name",
    "max_tokens tokens tokenizer tokenizer_mode pad_token eos_token image_token stop_token per_token key "
    "answer_key prompt_key password_file token_env api_key_env secretary monkey keys num_tokens".split(),
)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)
    assert redact({name: "value"}) == {name: "value"}


def test_a_marker_of_a_users_vocabulary_is_no_secret() -> None:
    assert named_secrets({"answer_token": "<answer>"}) == []
    assert named_secrets({"judge_token": "a1b2c3"}) == ["judge_token"]


@pytest.mark.parametrize("value", LOOKS)
def test_values_that_look_like_secrets(value: str) -> None:
    tree = {"a": {"b": [1, value]}, "c": "plain"}
    hidden = redact(tree)
    assert hidden["a"]["b"][0] == 1 and "***" in hidden["a"]["b"][1]
    assert value not in str(hidden) and hidden["c"] == "plain"
    assert value not in redact(f"note: {value} was given") and "***" in redact(f"note: {value} was given")
    assert redact(hidden) == hidden


def test_text_hides_what_follows_a_name() -> None:
    assert redact("override 'reward.options.api_key=abc1'") == "override 'reward.options.api_key=***'"
    assert redact('{"password": "two words", "n": 1}') == '{"password": ***, "n": 1}'
    plain = "step 3: rollout.n=8, max_tokens=12 and https://host:80/a@b; data.answer_key: gt"
    assert redact(plain) == plain
    assert "hunter22" not in redact(LOOKS[4]) and "host/data" in redact(LOOKS[4])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_shipped_config_is_suspected(file: Path) -> None:
    assert named_secrets(yaml.safe_load(file.read_text())) == []
    tree = to_dict(load_config(file))
    assert named_secrets(tree) == [] and redact(tree) == tree


def test_there_are_shipped_configs_and_the_defaults_are_clean() -> None:
    assert len(SHIPPED) > 10
    assert redact(to_dict(Config())) == to_dict(Config())


@pytest.mark.parametrize(
    ("override", "variable"),
    [
        ("reward.options.api_key=abcdefgh", "API_KEY"),
        ("rollout.engine_options.hf_token=abcdefgh", "HF_TOKEN"),
        ("wandb_api_key=abcdefgh", "WANDB_API_KEY"),
        ("reward.options.judge.password=abcdefgh", "PASSWORD"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_repeated(
    override: str, variable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(DIGITS), override]) == 2
    error = capsys.readouterr().err
    key = override.partition("=")[0]
    assert f"{key} looks like a secret" in error and f"put it in the environment ({variable})" in error
    assert "abcdefgh" not in error and error.count("\n") == 1
    assert environment_variable(key) == variable


def test_a_secret_in_a_file_is_refused(tmp_path: Path) -> None:
    tree = yaml.safe_load(DIGITS.read_text()) | {
        "reward": {"name": "exact_match", "options": {"api_key": HF}}
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"config\.yaml: reward\.options\.api_key looks like a secret"):
        load_config(tmp_path / "config.yaml")


def test_no_error_repeats_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    for override in (f"trainer.steps={HF}", f"no.such.key={HF}", HF, f"rollout.engine={HF}"):
        assert main(["train", str(DIGITS), override]) == 2
        assert HF not in capsys.readouterr().err


def test_secrets_do_not_reach_config_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment, or in the value of a key with an innocent name."""
    monkeypatch.setenv("JUDGE_KEY", "from-the-environment")
    overrides = [f"rollout.engine_options.download={HF}", "rollout.engine_options.swap_space=1"]
    overrides += ["rollout.engine_options.hf_token=${oc.env:JUDGE_KEY}"]
    config = load_config(DIGITS, overrides)
    assert config.rollout.engine_options["hf_token"] == "from-the-environment"  # where it is used
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    text = (tmp_path / "config.yaml").read_text()
    assert HF not in text and "from-the-environment" not in text
    saved = yaml.safe_load(text)
    assert saved["rollout"]["engine_options"] == {"download": "***", "swap_space": 1, "hf_token": "***"}
    assert saved["model"]["path"] == config.model.path


def test_secrets_do_not_reach_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mssr.runs.loggers import MetricsLog

    sent: dict[str, Any] = {}

    def init(**arguments: Any) -> SimpleNamespace:
        sent.update(arguments)
        return SimpleNamespace(id="run", finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    overrides = [f"rollout.engine_options.download={HF}", f"trainer.run_dir={tmp_path}"]
    MetricsLog(load_config(DIGITS, [*overrides, "trainer.loggers=[wandb]"]), None).close()
    assert sent["config"]["rollout"]["engine_options"] == {"download": "***"}
    assert HF not in str(sent)


def test_secrets_do_not_reach_the_console() -> None:
    stream = io.StringIO()
    Console(stream, "plain", 1).note(f"downloading with {HF}")
    assert stream.getvalue() == "downloading with ***\n"


# What may be run, and what may be read.


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, dotted name, call) of every call in the package."""
    for file in sorted(Path(mssr.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield str(file.relative_to(ROOT)), ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), "")


def unsafe(name: str, call: ast.Call) -> bool:
    module, _, function = name.rpartition(".")
    last = module.rpartition(".")[2]
    if name in ("eval", "exec", "os.system", "os.popen") or function in ("unsafe_load", "full_load"):
        return True
    if last in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "joblib", "shelve"):
        return function in ("load", "loads", "Unpickler", "open")
    if last == "torch" and function == "load":
        return keyword(call, "weights_only") != "True"
    if last == "yaml" and function in ("load", "load_all"):
        return "Safe" not in ast.unparse(call)
    return keyword(call, "allow_pickle") == "True" or keyword(call, "shell") == "True"


def test_nothing_that_is_read_is_run() -> None:
    found = {(file, name) for file, name, call in calls() if unsafe(name, call)}
    # A user's own file, named in the config: that is what plugins are.
    assert found == {("mssr/algorithms/plugins.py", "exec")}


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)",
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f, Loader=yaml.Loader)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_check_sees_unsafe_calls(code: str) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call) and unsafe(ast.unparse(call.func), call)


def test_remote_code_is_trusted_by_the_config_alone() -> None:
    found = []
    for file in sorted(Path(mssr.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                found.append((file.name, ast.unparse(node.value)))
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                found += [
                    (file.name, ast.unparse(v))
                    for k, v in pairs
                    if k and "trust_remote_code" in ast.unparse(k)
                ]
    assert {value for _, value in found} == {"config.trust_remote_code", "config.model.trust_remote_code"}
    assert {file for file, _ in found} == {"loading.py", "model.py", "vllm_engine.py"}
    assert ModelConfig().trust_remote_code is False
    with pytest.raises(UserError, match=r"set model\.trust_remote_code"):
        load_config(DIGITS, ["rollout.engine_options.trust_remote_code=true"])


@pytest.mark.parametrize("trust", [False, True])
def test_transformers_is_told_what_the_config_says(trust: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformers

    from mssr.models.loading import load_model, load_processor

    told = []

    def from_pretrained(path: str, **options: Any) -> Any:
        told.append(options["trust_remote_code"])
        tower = SimpleNamespace(patch_embed=SimpleNamespace())
        return SimpleNamespace(
            model_type="qwen2_5_vl",
            name_or_path=path,
            tokenizer="x",
            chat_template="x",
            image_token="x",
            image_token_id=1,
            image_processor=SimpleNamespace(patch_size=14, merge_size=2),
            get_submodule=lambda name: tower,
            eval=lambda: None,
        )

    for name in ("AutoProcessor", "AutoConfig", "AutoModelForImageTextToText"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", from_pretrained)
    config = ModelConfig(path="somewhere", trust_remote_code=trust, attn_implementation="sdpa")
    load_processor(config)
    load_model(config, torch.float32)
    assert told == [trust] * 4
