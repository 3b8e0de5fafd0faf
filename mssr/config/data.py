"""The sections of a config that say where prompts come from and how responses are scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mssr.algorithms.plugins import is_spec
from mssr.config.options import FREE, LISTED, UNREAD, option, section

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


JUDGE, REMOTE = "judge", "remote"
"""The rewards that ask a server."""


@dataclass
class JudgeConfig:
    """A language model that says whether a response is right, where ``reward.name`` has judge."""

    model: str = option("")
    """MODEL@http://host:8000/v1, any server with OpenAI's chat completions, or MODEL at OpenAI's address. The
    key is read from MSSR_JUDGE_API_KEY or OPENAI_API_KEY in the environment."""
    prompt_template: str | None = option(None)
    """Jinja template of the request, text or a file, with the variables `question`, `answer` and `response`;
    the reply's last "Verdict: correct" or "Verdict: incorrect" counts. null: as of `mssr eval --judge`."""
    cache: str | None = option(None, resume=FREE, first_values=False)
    """File of verdicts that are not asked for again; null is judge.jsonl in the run directory."""


@dataclass
class ServerConfig:
    """How the rewards judge and remote ask their server."""

    concurrency: int = option(16, "> 0")
    """Requests at the same time."""
    time_limit_s: float = option(60.0, "> 0")
    """Seconds for a request with its reply."""
    attempts: int = option(3, "> 0")
    """How often a request is sent where it fails for a reason that may pass (no connection, time-out, status
    408, 409, 429, 5xx), with a pause between that doubles. Then its responses have no score."""
    max_requests: int | None = option(None, "> 0")
    """Requests that a reward may send, attempts and the verdicts that the judge's cache begins with included;
    when they are spent, the run stops. null: any number."""


@dataclass
class RewardConfig:
    """Which functions turn a response into a score, and what is taken off it."""

    name: Any = option("exact_match")
    """exact_match, math, choice, number, path/to/file.py:function, judge (a language model) or remote (a
    server of rewards). Or a list of these, whose scores are added up."""
    weights: list[float] | None = option(None, read_if="name has several")
    """Of the names, in their order; null is 1 for each."""
    options: dict[str, Any] = option({})
    """Keyword arguments of the function, for example {tolerance: 0.01} of number. Of several names a section
    for each, called like the name or, of a file, its function: {number: {tolerance: 0.01}}."""
    url: str | None = option(None, read_if="name has remote")
    """Where the remote reward is asked, in OpenRLHF's form: docs/rewards.md has request and reply. The key is
    read from MSSR_REWARD_API_KEY in the environment."""
    batch_size: int = option(32, "> 0", read_if="name has remote")
    """Responses of one such request at most."""
    judge: JudgeConfig = section(JudgeConfig, read_if="reward.name has judge")
    server: ServerConfig = section(
        ServerConfig,
        read_if="reward.name has judge or reward.name has remote",
        resume=FREE,
        first_values=False,
    )
    format: str = option("gate", choices="gate, weighted, none", read_if="name has rule")
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
    def names(self) -> list[str]:
        return list(map(str, self.name)) if isinstance(self.name, list) else [str(self.name)]

    @property
    def labels(self) -> list[str]:
        """What the names are called in metrics and options: path/to/file.py:function like the function."""
        return [name.rpartition(":")[2] if is_spec(name) else name for name in self.names]

    @property
    def rule(self) -> str:
        """The first name that compares texts, a rule's or the judge; empty if none does."""
        return next((name for name in self.names if not is_spec(name) and name != REMOTE), "")

    @property
    def takes_cells(self) -> bool:
        """Whether some reward gets answers as the data has them, and not as text."""
        return any(is_spec(name) or name == REMOTE for name in self.names)

    def each(self) -> list[RewardConfig]:
        """The section of every reward, with a name and options of its own."""
        if not isinstance(self.name, list):
            return [self]
        options = [self.options.get(label, {}) for label in self.labels]
        return [replace(self, name=n, options=o) for n, o in zip(self.names, options, strict=True)]
