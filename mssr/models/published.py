"""Shapes of models by their paths, of those that are published without reaching for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mssr.config import ModelConfig
from mssr.errors import UserError, first_line
from mssr.models.families import family_named
from mssr.models.loading import is_there
from mssr.models.shapes import ModelShape


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """What config.json says of sizes, by hub name, for machines from where the hub cannot be reached."""
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return found


def read_shape(model: ModelConfig) -> ModelShape:
    """Of a directory, of a name in `published`, or from the hub or its cache.

    Raises:
        UserError: there is no config.json to be read, or it is of no family that is known.
    """
    if (tree := published().get(model.path)) is not None and not Path(model.path).exists():
        return shape_of(tree, model.path)
    try:
        return shape_of(json.loads(_config_file(model.path).read_text()), model.path)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many types
        raise UserError(
            f"model.path: the config.json of {model.path} cannot be read ({first_line(error)}); give a "
            "directory with it, or one of " + ", ".join(published())
        ) from error


def _config_file(path: str) -> Path:
    if is_there(path):
        return Path(path) / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, "config.json"))


def shape_of(tree: Mapping[str, Any], path: str = "") -> ModelShape:
    """From the content of config.json."""
    return family_named(tree.get("model_type"), path).shape(tree)
