"""EasyR1's data section, pasted."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mssr.errors import UserError
from mssr.runs.config import load_config

pytestmark = pytest.mark.unit
PASTED = """
model: {path: some/model}
data:
  train_files: hiyouga/geometry3k@train
  val_files: hiyouga/geometry3k@test
  prompt_key: question
  answer_key: solution
  image_key: image
  video_key: videos
  image_dir: /pictures
  video_fps: 2.0
  max_prompt_length: 1024
  max_response_length: 512
  rollout_batch_size: 64
  mini_rollout_batch_size: null
  val_batch_size: 1024
  format_prompt: "{{ content | trim }} Think first."
  override_chat_template: null
  shuffle: true
  seed: 7
  min_pixels: 1000
  max_pixels: 2000
  filter_overlong_prompts: true
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_every_key_keeps_its_meaning(tmp_path: Path) -> None:
    notes: list[str] = []
    config = load_config(write(tmp_path, PASTED), ["algorithm.name=grpo", "rollout.n=4"], notes.append)
    data = config.data
    assert (data.train, data.val) == ("hiyouga/geometry3k@train", "hiyouga/geometry3k@test")
    assert (data.problem_column, data.answer_column, data.images_column) == ("question", "solution", "image")
    assert (data.image_dir, data.min_pixels, data.max_pixels) == ("/pictures", 1000, 2000)
    assert data.prompt_template == "{{ content | trim }} Think first." and data.chat_template is None
    assert (data.max_prompt_length, config.rollout.max_response_length, config.seed) == (1024, 512, 7)
    # rollout_batch_size counts prompts there; the override of n counts, though it comes later.
    assert (config.prompts_per_step, config.rollout.rollouts_per_step) == (64, 256)
    [note] = notes
    assert "train_files as data.train" in note and "val_batch_size not at all" in note


def test_a_later_setting_of_ours_wins(tmp_path: Path) -> None:
    path = write(tmp_path, PASTED)
    assert load_config(path, ["rollout.rollouts_per_step=32"]).rollout.rollouts_per_step == 32
    assert load_config(path, ["data.rollout_batch_size=16"]).rollout.rollouts_per_step == 16
    assert load_config(path, ["data.train_files=other.parquet"]).data.train == "other.parquet"


def test_without_format_prompt_the_question_is_bare(tmp_path: Path) -> None:
    tree = yaml.safe_load(PASTED)
    tree["data"]["format_prompt"] = None
    config = load_config(write(tmp_path, yaml.safe_dump(tree)))
    assert (config.data.prompt_template, config.data.instruction) == (None, "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"filter_overlong_prompts": False}, "data.filter_overlong_prompts=false"),
        ({"rollout_batch_size": "many"}, "data.rollout_batch_size=many"),
        ({"train": "x.parquet"}, "data.train_files is EasyR1's name of data.train"),
        ({"prompt_kay": "q"}, "unknown key data.prompt_kay"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    tree = yaml.safe_load(PASTED)
    tree["data"] |= change
    with pytest.raises(UserError, match=words) as error:
        load_config(write(tmp_path, yaml.safe_dump(tree)))
    assert "\n" not in str(error.value)


def test_a_whole_config_is_told_what_can_be_pasted() -> None:
    with pytest.raises(
        UserError, match=r"er1_whole.yaml is a whole config of EasyR1; its section data can be"
    ):
        load_config(Path(__file__).parents[1] / "fixtures" / "inputs" / "er1_whole.yaml")
