"""What `data.val` may be: one set, or several with a name, a frequency and sampling settings each.

val: val.parquet                      # or a list of sources: one set, without a name

val:
  digits: val.parquet
  hard: {path: [a.parquet, b.parquet], every: 20, n: 4, temperature: 1.0}
  mathvista: {benchmark: mathvista, data_dir: /data/benchmarks, every: 40, limit: 200}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mssr.config.data import DataConfig
from mssr.data.dataset import VAL_PREFIX, PromptDataset
from mssr.data.sources import parse_sources
from mssr.errors import UserError


@dataclass(frozen=True, slots=True)
class ValidationSet:
    """One set. Example: ``ValidationSet("hard", path="hard.parquet", every=20, n=4, temperature=1.0)``"""

    name: str = ""
    """In metrics, ``val/<name>/accuracy``; empty for the only set, which has no name."""
    path: Any = None
    """A source or a list of sources, scored by the reward of the training."""
    benchmark: str | None = None
    """In place of ``path``: a benchmark, scored as `mssr eval` does."""
    data_dir: str | None = None
    """Where the benchmark's data are; null takes the hub."""
    every: int | None = None
    """Steps between validations; null is trainer.val_every."""
    limit: int | None = None
    """The first so many prompts; null is trainer.val_max_prompts."""
    n: int = 1
    """Responses a prompt."""
    temperature: float | None = None
    """null is greedy for one response and rollout.temperature for several; 0 is greedy."""

    @property
    def prefix(self) -> str:
        """Before the ids of its prompts."""
        return f"{VAL_PREFIX}{self.name}/" if self.name else VAL_PREFIX

    @property
    def key(self) -> str:
        """Before the names of its metrics."""
        return f"val/{self.name}" if self.name else "val"

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature is None and self.n == 1)

    def dataset(self, config: DataConfig, run_dir: Path) -> PromptDataset:
        """Its prompts; those of a benchmark from where the driver has put them."""
        if self.benchmark is None:
            return PromptDataset(self.path, config, self.prefix)
        return PromptDataset(str(self.directory(run_dir)), benchmark_data(config), self.prefix)

    def directory(self, run_dir: Path) -> Path:
        """Where the prompts of a benchmark are."""
        return (run_dir / "validation" / self.name).absolute()


def benchmark_data(config: DataConfig) -> DataConfig:
    """The config of prompts that were written in the project's own form, where parts say where images are;
    what makes prompts of rows stays."""
    own: dict[str, Any] = {f"{name}_column": name for name in ("id", "images", "problem", "answer")}
    return replace(config, **own, image_dir=None, image_marks="literal")


def validation_sets(value: Any) -> list[ValidationSet]:
    """The sets that ``data.val`` names; the first gives ``val/accuracy``.

    Raises:
        UserError: names the key.
    """
    if not value:
        return []
    if not isinstance(value, Mapping) or "path" in value:
        parse_sources(value, "data.val")
        return [ValidationSet(path=value)]
    return [_parse(str(name), options) for name, options in value.items()]


def _parse(name: str, options: Any) -> ValidationSet:
    key = f"data.val.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"{key}: the name of a set may hold letters, digits, '_', '-' and '.'")
    if not isinstance(options, Mapping):
        options = {"path": options}
    known = [f.name for f in fields(ValidationSet) if f.name != "name"]
    for option in options:
        if option not in known:
            raise UserError(f"{key}: unknown key {option!r}: one of {', '.join(known)}")
    given = {k: v for k, v in options.items() if v is not None}
    if ("path" in given) == ("benchmark" in given):
        raise UserError(f"{key}: give either path (a source, or a list of them) or benchmark")
    if "path" in given:
        parse_sources(given["path"], key)
        if "data_dir" in given:
            raise UserError(f"{key}.data_dir is read by benchmarks only; write it into the path")
    for option in ("every", "limit", "n"):
        number = given.get(option, 1)
        if type(number) is not int or number < 1:
            raise UserError(f"{key}.{option}={number} must be an integer of at least 1")
    found = ValidationSet(name, **given)
    temperature = given.get("temperature", 1.0)
    if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
        raise UserError(f"{key}.temperature={temperature} must be a number and must not be negative")
    if temperature == 0 and found.n > 1:
        raise UserError(f"{key}: temperature=0 would give the same response {found.n} times")
    return found
