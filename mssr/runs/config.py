"""A config as a run takes it: read and merged, and checked by every room that has a section in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mssr import rewards
from mssr.config import Config
from mssr.config import checks as own
from mssr.config.loading import Layer, file_layers, merge
from mssr.config.recipes import find
from mssr.data.sources import parse_sources
from mssr.data.validation_sets import validation_sets


def load_config(
    path: str | Path, overrides: Sequence[str] = (), note: Callable[[str], None] = lambda line: None
) -> Config:
    """Merge a YAML file (over its ``base``) and ``key=value`` overrides over the defaults; check the result.

    Args:
        path: of the file, or the name of a recipe, see `mssr.config.recipes`.
        note: told in which sense EasyR1's keys were taken, a line a file.

    Raises:
        UserError: a file is missing or no YAML, a key is unknown, a value has the wrong type or is a
            secret, or values contradict each other.
    """
    return merge_layers(file_layers(find(path)), overrides, note)


def merge_layers(
    layers: Sequence[Layer], overrides: Sequence[str], note: Callable[[str], None] = lambda line: None
) -> Config:
    """As `load_config`, from trees of keys, of which the last counts most."""
    config = merge(layers, overrides, note)
    own.validate(config)
    parse_sources(config.data.train, "data.train")
    validation_sets(config.data.val)
    rewards.check(config.reward)
    return config


def advice(config: Config) -> list[str]:
    """What is allowed and likely not meant; one line each, shown at the start of a run."""
    return [*own.advice(config), *rewards.advice(config.reward, config.method.bounded_rewards)]
