"""``mssr prepare digits``: the rows and the warm-started base model of the embedded task, cached."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mssr.config import ModelConfig
from mssr.data import prepared
from mssr.data.digits.rows import draw_examples, load_scans, write_parquet
from mssr.data.digits.warmstart import (
    Encoder,
    WarmStartSettings,
    corpus,
    examine,
    torch_threads,
    warm_start,
)
from mssr.data.prepared import MODEL_TYPE, say
from mssr.errors import UserError
from mssr.models.families import FAMILIES
from mssr.models.loading import load_processor
from mssr.models.tiny import TinySize, build_tiny, save_quietly

TASK_VERSION = 1
"""Raised whenever the same seed and settings would give other rows or another model."""

README = """# digits

Questions about two {digits} digits, made by `mssr prepare digits --model {model_type}` (seed {seed}).

- `train.parquet` ({train} rows), `val.parquet` ({val} rows): id, images, problem, answer, kind. {split}
- `model/`: a {model_type} model of {millions:.1f} million parameters. It was taught to read the digits, then
  to guess most of the time: sampled, it answers {sampled:.0%} of `val.parquet` correctly, and {careful:.0%}
  when it is kept from guessing. Reinforcement learning can close that gap.
- `prepare.json`: seed, settings, versions and these numbers. Running the command again with the same seed and
  model returns at once; delete this folder to start over.
"""
SCANNED = "The scans are\n  scikit-learn's; no scan is in both files."
IN_WORDS = "There\n  are no images: the digits are in words. No question in the same words is in both files."


@dataclass(frozen=True, slots=True)
class DigitsSettings:
    """The size of the task; the defaults are what the command makes. Tests shrink it.

    Example: ``DigitsSettings(train_rows=64, val_rows=16, warm_start=WarmStartSettings(reading_steps=2))``
    """

    train_rows: int = 2048
    val_rows: int = 256
    warm_start: WarmStartSettings = field(default_factory=WarmStartSettings)
    model: TinySize = field(default_factory=TinySize)
    threads: int | None = None
    """Threads of the warm start; all cores, at most 8, by default. Not part of the cache's key."""

    def __post_init__(self) -> None:
        if min(self.train_rows, self.val_rows) < 1:
            raise UserError(
                f"{self.train_rows} train_rows and {self.val_rows} val_rows: at least 1 is needed"
            )


def prepare(
    out: Path,
    seed: int = 0,
    quiet: bool = False,
    settings: DigitsSettings | None = None,
    model_type: str = MODEL_TYPE,
) -> None:
    """Make the digits task in ``out``: training and validation rows and the base model.

    Takes about a minute and a half on two cores. Returns at once when ``out`` already holds the task
    of this seed, settings, family and `TASK_VERSION`; rebuilds it when it is of another kind or incomplete.
    See `mssr.data.prepared.fill`. Progress goes to stderr, unless ``quiet``.

    Args:
        model_type: family of the base model; one that takes text only gets the digits in words.

    Raises:
        UserError: there is no such family; ``out`` is no directory, cannot be written, or holds such files of
            somebody else.
    """
    out, settings = Path(out), settings or DigitsSettings()
    if seed < 0:
        raise UserError(f"seed={seed}: must be 0 or more")
    if model_type not in FAMILIES:
        raise UserError(f"--model {model_type}: one of {', '.join(FAMILIES)}")

    def build(folder: Path) -> dict[str, Any]:
        return _build(folder, seed, quiet, settings, model_type)

    key = fingerprint(seed, settings, model_type)
    summary = prepared.fill(out, "digits", ["model"], key, build, quiet)
    if summary is not None:
        sampled, careful = summary["accuracy"]["sampled"], summary["accuracy"]["careful"]
        rows = f"{settings.train_rows} + {settings.val_rows} rows"
        say(quiet, f"digits: {rows} and the base model are in {out}")
        say(quiet, f"digits: the model is right {sampled:.0%} of the time, {careful:.0%} if it looks")


def fingerprint(seed: int, settings: DigitsSettings, model_type: str = MODEL_TYPE) -> str:
    """Of task version, seed, settings (not the number of threads) and family."""
    content = asdict(settings) | {"threads": None, "seed": seed, "version": TASK_VERSION}
    if model_type != MODEL_TYPE:  # what was prepared before there were others stays valid
        content["model_type"] = model_type
    return prepared.fingerprint(content)


def _build(folder: Path, seed: int, quiet: bool, settings: DigitsSettings, model_type: str) -> dict[str, Any]:
    """Write everything but the summary into ``folder``; return the summary."""
    words = FAMILIES[model_type].tower_name is None
    model = build_tiny(folder / "model", model_type, corpus(words), seed, settings.model)
    processor = load_processor(ModelConfig(path=str(folder / "model")))
    # A digit becomes 2 x 2 tokens, in Qwen2.5-VL one window; without images there are no patches.
    side = 2 * processor.patch_size * processor.merge_size
    train, val = (load_scans(split, seed, side) for split in ("train", "val"))
    # Each stream of random numbers has its own key, so changing one count leaves the others alone.
    lessons = list(draw_examples(train, settings.train_rows, np.random.default_rng([seed, 1])))
    exam = list(draw_examples(val, settings.val_rows, np.random.default_rng([seed, 2])))
    write_parquet(train, lessons, folder / "train.parquet")
    write_parquet(val, exam, folder / "val.parquet")
    encoder = Encoder(model, processor)
    steps = settings.warm_start.reading_steps + settings.warm_start.habit_steps

    def on_step(step: int, loss: float) -> None:
        if (step + 1) * 10 // steps > step * 10 // steps:
            say(quiet, f"digits: warm start, step {step + 1} of {steps}, loss {loss:.2f}")

    with torch_threads(settings.threads):
        warm_start(encoder, train, settings.warm_start, seed, on_step)
        save_quietly(model, folder / "model")
        share = examine(encoder, val, exam, seed)
    parameters = sum(p.numel() for p in model.parameters())
    rows = {"train": len(lessons), "val": len(exam)}
    told = {"seed": seed, "model_type": model_type, "millions": parameters / 1e6} | rows | share
    told |= {"digits": "written", "split": IN_WORDS} if words else {"digits": "handwritten", "split": SCANNED}
    (folder / "README.md").write_text(README.format(**told))
    return {
        "task_version": TASK_VERSION,
        "seed": seed,
        "model_type": model_type,
        "settings": asdict(settings),
        "rows": rows,
        "parameters": parameters,
        "accuracy": {name: round(share[name], 4) for name in ("sampled", "greedy", "careful")},
    }
