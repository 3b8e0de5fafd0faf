"""A folder that ``mssr prepare`` fills once: who asks for the same again finds it done, and nothing in it is
ever half there."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mssr
from mssr.errors import UserError
from mssr.models.families import FAMILIES

LOCK = ".prepare.lock"
PARTIAL = ".prepare.partial"
SUMMARY = "prepare.json"
FILES = ("train.parquet", "val.parquet", "README.md")
IMAGES_ONLY = "processor_config.json"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", IMAGES_ONLY)
MODEL_TYPE = "qwen2_5_vl"
"""Family of the base model unless another is asked for."""


def fill(
    out: Path,
    task: str,
    models: Sequence[str],
    key: str,
    build: Callable[[Path], dict[str, Any]],
    quiet: bool,
) -> dict[str, Any] | None:
    """Fill ``out`` with `FILES` and ``models`` by ``build(folder)``, unless it holds those of this key.

    Everything is made in a folder beside and moved into place at the end, so what is there is complete.
    Two processes may prepare the same ``out``: the second waits and finds the work done.

    Args:
        task: its name, for what is said.
        models: their directories in ``out``.
        key: `fingerprint` of what the content depends on.
        build: writes everything but the summary, and returns that.

    Returns:
        The summary; None where there was nothing to do.

    Raises:
        UserError: ``out`` is no directory, cannot be written, or holds such files of somebody else.
    """
    from filelock import FileLock

    products = (*FILES, *dict.fromkeys(Path(model).parts[0] for model in models))
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_files(out, products)
        (out / LOCK).touch()
    except OSError as error:
        raise UserError(f"cannot prepare the {task} in {out}: {error.strerror or error}") from error
    with FileLock(out / LOCK):
        if is_complete(out, key, models):
            say(quiet, f"{task}: {out} is up to date")
            return None
        partial = out / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            started = time.monotonic()
            summary = {"task": task} | build(partial)
            versions = {name: version(name) for name in ("torch", "transformers", "scikit-learn")}
            summary |= {"versions": {"mssr": mssr.__version__} | versions, "fingerprint": key}
            summary["seconds"] = round(time.monotonic() - started, 1)
            (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
            _publish(partial, out, products)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return summary


def fingerprint(content: Mapping[str, Any]) -> str:
    """What the files depend on, hashed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_complete(out: Path, key: str, models: Sequence[str] = ("model",)) -> bool:
    """Whether ``out`` holds all files of the task with this fingerprint."""
    try:
        summary = json.loads((out / SUMMARY).read_text())
        found, family = summary["fingerprint"], FAMILIES[summary.get("model_type", MODEL_TYPE)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    of_models = [name for name in MODEL_FILES if family.tower_name or name != IMAGES_ONLY]
    files = [out / name for name in FILES] + [out / model / name for model in models for name in of_models]
    return bool(found == key) and all(path.exists() for path in files)


def say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)


def _publish(partial: Path, out: Path, products: Sequence[str]) -> None:
    """Move the finished files into ``out``; the summary goes first and comes last."""
    (out / SUMMARY).unlink(missing_ok=True)
    for name in (*products, SUMMARY):
        if (old := out / name).is_dir():
            old.rename(partial / f"{name}.old")  # in one step: a model is never half a directory
        (partial / name).replace(old)


def _refuse_foreign_files(out: Path, products: Sequence[str]) -> None:
    foreign = [name for name in products if (out / name).exists()]
    if foreign and not any((out / name).exists() for name in (SUMMARY, LOCK)):
        raise UserError(
            f"{out} holds {foreign[0]}, which `mssr prepare` did not make: choose another folder for --out"
        )
