"""``mssr prepare chains``: the rows and the base models of the chains task, cached.

One model learns to read rows of digits and to keep a running total. Then each base learns a habit from
mixed demonstrations (`mssr.data.chains.responses.Habit`): mostly shortcuts, and the rarer the careful way is
among them, the less often reinforcement learning meets it.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mssr.config import ModelConfig
from mssr.data import prepared
from mssr.data.chains.responses import GLANCE, GUESS, SHORTCUTS, Habit, corpus, demonstration
from mssr.data.chains.rows import Chain, ChainScans, draw_chains
from mssr.data.digits.rows import load_scans, write_parquet
from mssr.data.digits.warmstart import Encoder, answers, imitate, torch_threads
from mssr.data.prepared import MODEL_TYPE, say
from mssr.errors import UserError
from mssr.models.encoded import EncodedPrompt
from mssr.models.loading import load_processor
from mssr.models.tiny import TinySize, build_tiny, save_quietly

TASK_VERSION = 1
"""Raised whenever the same seed and settings would give other rows or other models."""

SIDE = 28
"""Pixels of a digit, which is one token: a patch of 14, merged 2 x 2."""
MIN_PIXELS = SIDE * SIDE
MAX_TOKENS = 48

README = """# chains

Questions about two to five handwritten digits in a row, made by `mssr prepare chains` (seed {seed}).

- `train.parquet` ({train} rows), `val.parquet` ({val} rows): id, images, problem, answer, kind. The scans are
  scikit-learn's; no scan is in both files.
- `bases/`: three models of {millions:.2f} million parameters that can read and add up step by step, and
  mostly do not. Of their responses to `val.parquet`, sampled at temperature 1 but for two columns:

| base | right | right if greedy | and kept from shortcuts | guess | glance | one step | a step a digit |
|---|---|---|---|---|---|---|---|
{table}

- `prepare.json`: seed, settings, versions and these numbers. Running the command again with the same seed
  returns at once; delete this folder to start over.
"""

ABILITY = Habit(guess=0.0, glance=0.0, read=0.05, slip=0.0, misread=0.0, stop_early=0.0)
HABITS = {
    "habit": Habit(guess=0.55, glance=0.41, read=0.0),
    "mid": Habit(guess=0.50, glance=0.47, read=0.0, slip=0.15, misread=0.08, stop_early=0.15),
    "rare": Habit(guess=0.50, glance=0.49, read=0.0, slip=0.25, misread=0.10, stop_early=0.25),
}


SIZE = TinySize(
    vocab_limit=400,
    hidden=64,
    heads=2,
    kv_heads=1,
    mlp=256,
    text_layers=2,
    vision_hidden=32,
    vision_mlp=64,
    vision_depth=1,
    full_attention_blocks=(0,),
    min_pixels=MIN_PIXELS,
)


@dataclass(frozen=True, slots=True)
class ChainsSettings:
    """The size of the task; the defaults are what the command makes. Tests shrink it."""

    train_rows: int = 1024
    val_rows: int = 256
    lessons: int = 8192
    """Rows that the models are taught with; no image of theirs is in ``train.parquet``."""
    ability_steps: int = 600
    habit_steps: int = 150
    batch_size: int = 64
    ability_rate: float = 4e-3
    """Peak learning rates; linear warm-up, then a cosine to a twentieth."""
    habit_rate: float = 5e-4
    weight_decay: float = 0.05
    habits: dict[str, Habit] = field(default_factory=lambda: dict(HABITS))
    model: TinySize = SIZE
    threads: int = 1
    """Threads of torch: the weights are the same bit for bit on every machine that rounds alike."""


def prepare(
    out: Path,
    seed: int = 0,
    quiet: bool = False,
    settings: ChainsSettings | None = None,
    model_type: str = MODEL_TYPE,
) -> None:
    """Make the chains task in ``out``: training and validation rows and the base models.

    Takes about three minutes on one core. Returns at once when ``out`` already holds the task of this seed,
    settings and `TASK_VERSION`. See `mssr.data.prepared.fill`. Progress goes to stderr, unless ``quiet``.

    Raises:
        UserError: ``model_type`` is another than `MODEL_TYPE`; or as `mssr.data.prepared.fill`.
    """
    out, settings = Path(out), settings or ChainsSettings()
    if seed < 0:
        raise UserError(f"seed={seed}: must be 0 or more")
    if model_type != MODEL_TYPE:
        raise UserError(f"--model {model_type}: the chains have base models of {MODEL_TYPE} only")
    key = prepared.fingerprint(asdict(settings) | {"task": "chains", "seed": seed, "version": TASK_VERSION})
    models = [f"bases/{name}" for name in settings.habits]

    def build(folder: Path) -> dict[str, Any]:
        return _build(folder, seed, quiet, settings)

    if (summary := prepared.fill(out, "chains", models, key, build, quiet)) is not None:
        say(quiet, f"chains: {settings.train_rows} + {settings.val_rows} rows are in {out}, and base models:")
        for name, share in summary["accuracy"].items():
            sampled, careful = share["sampled"], share["careful"]
            say(quiet, f"chains: {name} is right {sampled:.0%} of the time, {careful:.0%} if it is careful")


def _build(folder: Path, seed: int, quiet: bool, settings: ChainsSettings) -> dict[str, Any]:
    """Write everything but the summary into ``folder``; return the summary."""
    started = time.monotonic()
    train, val = (ChainScans(load_scans(split, seed, SIDE)) for split in ("train", "val"))
    # Each stream of random numbers has its own key, so changing one count leaves the others alone.
    lessons, exam, taught = (
        list(draw_chains(scans, count, np.random.default_rng([seed, stream])))
        for scans, count, stream in (
            (train, settings.train_rows, 1),
            (val, settings.val_rows, 2),
            (train, settings.lessons, 3),
        )
    )
    write_parquet(train, lessons, folder / "train.parquet")
    write_parquet(val, exam, folder / "val.parquet")
    with torch_threads(settings.threads):
        encoder = _new_model(folder / "ability", seed, settings)
        teach = _Teacher(encoder, train, taught, settings, quiet)
        rng = np.random.default_rng([seed, 4])
        teach("ability", settings.ability_steps, settings.ability_rate, ABILITY, rng)
        able = copy.deepcopy(encoder.model.state_dict())
        shares = {}
        for number, (name, habit) in enumerate(settings.habits.items()):
            encoder.model.load_state_dict(able)
            rng = np.random.default_rng([seed, 5, number])
            teach(name, settings.habit_steps, settings.habit_rate, habit, rng)
            shutil.copytree(folder / "ability", folder / "bases" / name)
            save_quietly(encoder.model, folder / "bases" / name)
            shares[name] = _shares(encoder, val, exam, seed)
    shutil.rmtree(folder / "ability")
    parameters = sum(p.numel() for p in encoder.model.parameters())
    rows = {"train": len(lessons), "val": len(exam)}
    table = "\n".join(
        f"| {name} | " + " | ".join(f"{value:.1%}" for value in share.values()) + " |"
        for name, share in shares.items()
    )
    told = rows | {"seed": seed, "millions": parameters / 1e6, "table": table}
    (folder / "README.md").write_text(README.format(**told))
    return {
        "task": "chains",
        "task_version": TASK_VERSION,
        "seed": seed,
        "settings": asdict(settings),
        "versions": prepared.versions(),
        "rows": rows,
        "parameters": parameters,
        "accuracy": shares,
        "seconds": round(time.monotonic() - started, 1),
    }


def _new_model(folder: Path, seed: int, settings: ChainsSettings) -> Encoder:
    model = build_tiny(folder, MODEL_TYPE, corpus(), seed, settings.model)
    processor = load_processor(ModelConfig(path=str(folder)))
    return Encoder(model, processor, SHORTCUTS, MIN_PIXELS)


class _Teacher:
    """Trains the encoder's model on demonstrations of a habit, always for the same prompts."""

    def __init__(
        self,
        encoder: Encoder,
        scans: ChainScans,
        taught: Sequence[Chain],
        settings: ChainsSettings,
        quiet: bool,
    ) -> None:
        self.encoder, self.settings, self.quiet = encoder, settings, quiet
        self.shown = [(chain.kind, scans.digits(chain)) for chain in taught]
        self.prompts = encoder.prompts(scans, taught)

    def __call__(self, what: str, steps: int, rate: float, habit: Habit, rng: np.random.Generator) -> None:
        def demonstrate(step: int) -> tuple[list[EncodedPrompt], list[str]]:
            chosen = rng.integers(len(self.prompts), size=self.settings.batch_size).tolist()
            texts = [
                demonstration(kind, digits, habit, rng) for kind, digits in (self.shown[i] for i in chosen)
            ]
            return [self.prompts[i] for i in chosen], texts

        def on_step(step: int, loss: float) -> None:
            if (step + 1) * 5 // steps > step * 5 // steps:
                say(self.quiet, f"chains: {what}, step {step + 1} of {steps}, loss {loss:.2f}")

        imitate(self.encoder, demonstrate, steps, rate, self.settings.weight_decay, on_step)


def _shares(encoder: Encoder, val: ChainScans, exam: Sequence[Chain], seed: int) -> dict[str, float]:
    """What the model does and how often it is right, as in the README."""
    sampled = answers(encoder, val, exam, seed, greedy=False, max_tokens=MAX_TOKENS)
    ways = {
        "guess": lambda text: GUESS in text,
        "glance": lambda text: GLANCE in text,
        "one step": lambda text: text.count("**") == 2,
        "a step a digit": lambda text: text.count("**") > 2,
    }
    greedy, best = (
        [right for _, right in answers(encoder, val, exam, seed, careful=c, max_tokens=MAX_TOKENS)]
        for c in (False, True)
    )
    shares = {
        "sampled": fmean(right for _, right in sampled),
        "greedy": fmean(greedy),
        "careful": fmean(best),
    }
    shares |= {name: fmean(is_so(text) for text, _ in sampled) for name, is_so in ways.items()}
    return {name: round(value, 4) for name, value in shares.items()}
