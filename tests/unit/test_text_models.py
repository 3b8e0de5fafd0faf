"""Models that take text only: what is asked of them that they cannot do ends in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mssr.config import ModelConfig
from mssr.data.encoder import PromptEncoder
from mssr.data.images import ImageSource
from mssr.data.rows import Row
from mssr.errors import UserError
from mssr.models.loading import load_processor
from mssr.runs.config import load_config
from mssr.tools.cli import main
from tests.conftest import Workspace

pytestmark = pytest.mark.unit
Of = Callable[[str], Workspace]

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's."""


def test_thinking_is_turned_off_by_a_variable_of_the_template(workspace_of: Of) -> None:
    config = load_config(workspace_of("qwen3").config)
    config.data.chat_template = THINKING
    processor, row = load_processor(config.model), Row("a", "What is it?", "8", (), "")
    plain = PromptEncoder(processor, config.data)
    text = plain.chat_text(row)
    assert text.endswith("user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")
    assert plain.response_prefix == ""
    config.data.chat_template_kwargs = {"enable_thinking": False}
    brief = PromptEncoder(processor, config.data)
    # The named rules see the tags, as those of a response.
    assert brief.chat_text(row) == text + brief.response_prefix
    assert brief.response_prefix == "<think>\n\n</think>\n\n"
    config.data.chat_template_kwargs = {"enable_thinkin": False}
    with pytest.raises(UserError, match=r"kwargs.enable_thinkin: data.chat_template does not read it"):
        PromptEncoder(processor, config.data)


def test_rows_with_images_are_refused(workspace_of: Of) -> None:
    config = load_config(workspace_of("qwen2").config)
    encoder = PromptEncoder(load_processor(config.model), config.data)
    with pytest.raises(ValueError, match=r"2 images, and the model takes text only .*images_column=null"):
        encoder.chat_text(Row("a", "What?", "8", (ImageSource(b"", None),) * 2, ""))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["data.train={vision}"], "train.parquet row 0: 1 image, and the model takes text only"),
        (["model.freeze_vision=true"], "model.freeze_vision=true is for models that see images, and"),
        (["algorithm.loss.text_anchor_coef=0.1"], "algorithm.loss.text_anchor_coef=0.1 is for models"),
        (["algorithm.shaping.visual=vppo"], "algorithm.shaping.visual=vppo is for models"),
        (
            ["actor.lora.rank=4", "actor.lr=1e-4", "actor.vision_cache_gib=2"],
            "actor.vision_cache_gib=2.0 is for models that see images",
        ),
    ],
)
def test_nothing_starts_that_needs_eyes(
    workspace: Workspace,
    workspace_of: Of,
    tmp_path: Path,
    given: list[str],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [one.format(vision=workspace.path / "train.parquet") for one in given]
    config = str(workspace_of("qwen2").config)
    capfd.readouterr()  # of the making of it
    for command in ("data", "train"):
        assert main([command, config, f"trainer.run_dir={tmp_path / command}", *given]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and words in error


@pytest.mark.parametrize("missing", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_model_without_its_tokenizer_is_refused(
    workspace_of: Of, tmp_path: Path, missing: list[str]
) -> None:
    shutil.copytree(workspace_of("qwen2").path / "model", tmp_path / "model")
    for name in missing:
        (tmp_path / "model" / name).unlink()
    with pytest.raises(UserError, match="has no tokenizer of the model's"):
        load_processor(ModelConfig(path=str(tmp_path / "model")))
