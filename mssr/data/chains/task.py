"""``mssr prepare chains``: the rows and the base models of the chains task, cached.

One model learns to read rows of digits and to keep a running total. Then each base learns a habit from
mixed demonstrations (`mssr.data.chains.responses.Habit`): mostly shortcuts, and the rarer the careful way is
among them, the less often reinforcement learning meets it.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mssr.config import ModelConfig
from mssr.data import prepared
from mssr.data.chains.responses import Habit, corpus, demonstration
from mssr.data.chains.rows import ChainScans, draw_chains
from mssr.data.digits.rows import load_scans, write_parquet
from mssr.data.digits.warmstart import Encoder, examine, imitate, torch_threads
from mssr.data.prepared import MODEL_TYPE, say
from mssr.errors import UserError
from mssr.models.encoded import EncodedPrompt
from mssr.models.loading import load_processor
from mssr.models.tiny import TinySize, build_tiny, save_quietly

TASK_VERSION = 1
"""Raised whenever the same seed and settings would give other rows or other models."""

SIDE = 28
"""Pixels of a digit, which is one token: a patch of 14, merged 2 x 2."""

README = """# chains

Questions about two to five handwritten digits in a row, made by `mssr prepare chains` (seed {seed}).

- `train.parquet` ({train} rows), `val.parquet` ({val} rows): id, images, problem, answer, kind. The scans are
  scikit-learn's; no scan is in both files.
- `bases/`: models of {parameters:,} parameters that can add up step by step, and mostly do not.
- `prepare.json`: seed, settings, versions, and for each base the share of `val.parquet` on which it is right
  when it is sampled, greedy, and kept from shortcuts, and the share of sampled responses that have steps.
  Running the command again with the same seed returns at once; delete this folder to start over.
"""

ABILITY = Habit(guess=0.05, glance=0.3)
HABITS = {
    "habit": Habit(guess=0.55, glance=0.41, slip=0.12, misread=0.05, stop_early=0.12),
    "mid": Habit(guess=0.50, glance=0.485, slip=0.22, misread=0.10, stop_early=0.22),
    "rare": Habit(guess=0.50, glance=0.49, slip=0.25, misread=0.10, stop_early=0.25),
}
SIZE = TinySize(
    vocab_limit=400,
    hidden=64,
    heads=2,
    kv_heads=1,
    text_layers=2,
    vision_hidden=32,
    vision_mlp=64,
    vision_depth=1,
    full_attention_blocks=(0,),
    min_pixels=SIDE * SIDE,
)


@dataclass(frozen=True, slots=True)
class ChainsSettings:
    """The size of the task; the defaults are what the command makes. Tests shrink it."""

    train_rows: int = 1024
    val_rows: int = 256
    lessons: int = 8192
    """Rows that the models are taught with, again and again; none of them is in ``train.parquet``."""
    batch_size: int = 64
    ability_steps: int = 800
    ability_rate: float = 4e-3
    """Peak learning rate; linear warm-up, then a cosine to a twentieth."""
    habit_steps: int = 150
    habit_rate: float = 7e-4
    weight_decay: float = 0.5
    """Keeps the weights small, so that the rates of the configs move a model of this width as they should."""


def prepare(
    out: Path,
    seed: int = 0,
    quiet: bool = False,
    settings: ChainsSettings | None = None,
    model_type: str = MODEL_TYPE,
) -> None:
    """Make the chains task in ``out``: training and validation rows and the base models.

    Takes two to three minutes, and one core however many there are, so that the sums are the same. Returns at
    once when ``out`` already holds the task of this seed, settings and `TASK_VERSION`; see
    `mssr.data.prepared.fill`. Progress goes to stderr, unless ``quiet``.

    Raises:
        UserError: ``model_type`` is another than `MODEL_TYPE`; or as `mssr.data.prepared.fill`.
    """
    out, settings = Path(out), settings or ChainsSettings()
    if seed < 0:
        raise UserError(f"seed={seed}: must be 0 or more")
    if model_type != MODEL_TYPE:
        raise UserError(f"--model {model_type}: the chains have base models of {MODEL_TYPE} only")
    habits = {name: asdict(habit) for name, habit in HABITS.items()}
    identity = {"task_version": TASK_VERSION, "seed": seed, "settings": asdict(settings), "habits": habits}
    models = [f"bases/{name}" for name in HABITS]

    def build(folder: Path) -> dict[str, Any]:
        with torch_threads(1):
            return identity | _build(folder, seed, quiet, settings)

    key = prepared.fingerprint(identity)
    if (summary := prepared.fill(out, "chains", models, key, build, quiet)) is not None:
        say(quiet, f"chains: {settings.train_rows} + {settings.val_rows} rows are in {out}, and base models:")
        for name, share in summary["accuracy"].items():
            right = f"{share['sampled']:.0%} of the time, {share['careful']:.0%} if it takes its steps"
            say(quiet, f"chains: {name} is right {right}")


def _build(folder: Path, seed: int, quiet: bool, settings: ChainsSettings) -> dict[str, Any]:
    """Write everything but the summary into ``folder``; return what it tells."""
    train, val = (ChainScans(load_scans(split, seed, SIDE)) for split in ("train", "val"))
    # Each stream of random numbers has its own key, so changing one count leaves the others alone.
    first, exam, taught = (
        list(draw_chains(scans, count, np.random.default_rng([seed, stream])))
        for stream, scans, count in (
            (1, train, settings.train_rows),
            (2, val, settings.val_rows),
            (3, train, settings.lessons),
        )
    )
    write_parquet(train, first, folder / "train.parquet")
    write_parquet(val, exam, folder / "val.parquet")
    able = folder / "able"
    model = build_tiny(able, MODEL_TYPE, corpus(), seed, SIZE)
    encoder = Encoder(model, load_processor(ModelConfig(path=str(able))))
    # Encoding takes longer than a step on what is encoded, so all lessons share their prompts.
    prompts = encoder.prompts(train, taught)

    def teach(what: str, habit: Habit, stream: int, steps: int, rate: float) -> None:
        rng = np.random.default_rng([seed, stream])

        def demonstrate(step: int) -> tuple[list[EncodedPrompt], list[str]]:
            chosen = rng.integers(len(taught), size=settings.batch_size).tolist()
            shown = [taught[i] for i in chosen]
            texts = [demonstration(chain.kind, train.digits(chain), habit, rng) for chain in shown]
            return [prompts[i] for i in chosen], texts

        def on_step(step: int, loss: float) -> None:
            if (step + 1) * 5 // steps > step * 5 // steps:
                say(quiet, f"chains: {what}, step {step + 1} of {steps}, loss {loss:.2f}")

        imitate(encoder, demonstrate, steps, rate, settings.weight_decay, on_step)

    teach("ability", ABILITY, 4, settings.ability_steps, settings.ability_rate)
    weights, shares = copy.deepcopy(model.state_dict()), {}
    for stream, (name, habit) in enumerate(HABITS.items(), start=5):
        model.load_state_dict(weights)
        teach(name, habit, stream, settings.habit_steps, settings.habit_rate)
        shutil.copytree(able, folder / "bases" / name)
        save_quietly(model, folder / "bases" / name)
        found = examine(encoder, val, exam, seed, max_tokens=48)
        shares[name] = {key: round(value, 4) for key, value in found.items()}
    shutil.rmtree(able)
    parameters = sum(p.numel() for p in model.parameters())
    rows = {"train": len(first), "val": len(exam)}
    (folder / "README.md").write_text(README.format(seed=seed, parameters=parameters, **rows))
    return {"rows": rows, "parameters": parameters, "accuracy": shares}
