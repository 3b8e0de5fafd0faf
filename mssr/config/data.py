"""The sections of a config that say where prompts come from and how responses are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mssr.algorithms.plugins import is_spec
from mssr.config.options import FREE, LISTED, UNREAD, option

PAPER_INSTRUCTION = (
    "First think about the reasoning process inside <think> </think> tags, "
    "then give the final answer inside \\boxed{}."
)


@dataclass
class DataConfig:
    """Where the prompts come from and how a row becomes one."""

    train: Any = option("", required=True, own_keys=True, evaluation="--benchmarks")
    """A source: parquet, JSON, JSONL, CSV or TSV file, a directory of a saved dataset, a folder with such
    files, or hub/name@split. Or a list of sources; one of them may be {path: ..., weight: 2.0}, its share of
    the prompts that are drawn (without weights every prompt counts the same)."""
    val: Any = option(None, own_keys=True, resume=LISTED, evaluation="--benchmarks", first_values=False)
    """The same for validation; null to train without. Or several sets by name, each with path or benchmark,
    and with every, limit, n and temperature of its own: see mssr/data/validation_sets.py."""
    id_column: str | None = option(None)
    """Column with a stable id; null takes a hash of question, images and answer."""
    images_column: str | None = option("images")
    """Column with a list of images (or one); a row may have none. An image is encoded bytes, base64 text,
    a path, or a dict that holds one of these. null for prompts without the images that a table has."""
    problem_column: str = option("problem")
    """Column with the question, text or a list of messages; each <image> in it stands for the next image."""
    image_marks: str = option("strict", choices="strict, literal")
    """strict: <image> in a text stands for an image, and a row has as many marks as images, or none.
    literal: <image> is text like any other wherever it stands; images are where parts of messages say, or
    before the user's first turn."""
    answer_column: str = option("answer")
    """Column with the ground truth; <answer></answer> around it is taken off. column.key is a key of the
    dicts in a column (reward_model.ground_truth); of a list of messages the assistant's turn is taken."""
    image_dir: str | None = option(None)
    """Directory that relative image paths start from; null is the working directory."""
    system_prompt: str | None = option(None)
    """Put before the question as the system turn, in place of the row's own; text or a file that holds it;
    null leaves it to the row and the chat template."""
    instruction: str = option(PAPER_INSTRUCTION)
    """Appended to every question; empty for none. Read without prompt_template."""
    prompt_template: str | None = option(None)
    """Jinja template of the user turn, text or a .jinja file; its variable `content` is the question."""
    chat_template: str | None = option(None)
    """Jinja chat template in place of the model's own, text or a file."""
    chat_template_kwargs: dict[str, Any] = option({})
    """Variables that the chat template reads: {enable_thinking: false} and Qwen3 answers without thinking."""
    min_pixels: int = option(262144, "> 0")
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = option(4194304, "> 0")
    """Larger images are shrunk to this many pixels."""
    max_prompt_length: int = option(2048, "> 0")
    """Longest prompt in tokens, vision placeholders included; longer ones are dropped with a count."""
    max_bad_fraction: float = option(0.0, "[0, 1]", resume=FREE, evaluation=UNREAD, first_values=False)
    """Go on if at most this fraction of the rows is unusable; they are listed in bad_rows.jsonl."""
    shuffle: bool = option(True, evaluation=UNREAD, first_values=False)
    """New random order in every epoch; false keeps the order of the file."""
    image_cache_gib: float = option(4.0, ">= 0", resume=FREE, first_values=False)
    """A worker's host memory for encoded prompts and images (tokens, and pixels cut into patches, a byte for
    each of three colours), so that later epochs need not encode again; the least recently used give way."""
    cache_dir: str | None = option(None, resume=FREE)
    """Where the checked lengths and ids of data sets are kept; null is $MSSR_CACHE or ~/.cache/mssr."""

    @property
    def image_cache_bytes(self) -> int:
        return int(self.image_cache_gib * 2**30)

    @property
    def pixel_bounds(self) -> dict[str, int]:
        """In the form in which image processors take them."""
        return {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}


@dataclass
class RewardConfig:
    """Which function turns a response into a score, and what is taken off it."""

    name: str = option("exact_match")
    """exact_match, math, choice, number, or path/to/file.py:function."""
    options: dict[str, Any] = option({})
    """Keyword arguments of the function, for example {tolerance: 0.01} of number."""
    format: str = option("gate", choices="gate, weighted, none", read_if="name names no file")
    """What <think></think> and one box are worth (the named rules only): gate (no credit without), weighted
    ((1 - format_weight) * accuracy + format_weight * format), or none."""
    format_weight: float = option(0.1, "[0, 1]", read_if="format = weighted")
    """Share of the format in a weighted score."""
    length_penalty: float = option(0.0, ">= 0")
    """Taken off a score for a response of rollout.max_response_length tokens, in proportion for a shorter."""
    repetition_penalty: float = option(0.0, ">= 0")
    """Taken off a score for a response whose n-grams are all repeated, in proportion to their fraction."""
    repetition_ngram: int = option(20, "> 0", read_if="repetition_penalty != 0")
    """Words of such an n-gram."""
    overlong_buffer: int = option(0, ">= 0")
    """Over the last so many tokens before rollout.max_response_length the score falls by up to
    overlong_penalty (soft overlong punishment, arXiv 2503.14476); 0 for none."""
    overlong_penalty: float = option(1.0, ">= 0", read_if="overlong_buffer != 0")
    """How far it falls there."""
    time_limit_s: float = option(10.0, "> 0", resume=LISTED)
    """Seconds of CPU time for one response; one that takes more scores 0 and counts in reward/errors. One
    that sleeps or waits, for a network or a core, has ten times as many seconds by the clock."""
    workers: int | None = option(None, "> 0", resume=FREE, first_values=False)
    """Processes that score; null takes the machine's cores, at most 8."""

    @property
    def rule(self) -> str:
        """Name of the rule that compares texts; empty for a function of the user."""
        return "" if is_spec(self.name) else self.name
