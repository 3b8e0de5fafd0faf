"""Shapes of models by their paths, of those that are published without reaching for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mssr.config import ModelConfig
from mssr.errors import UserError, first_line
from mssr.models.families import family_named
from mssr.models.shapes import ModelShape

_QWEN2_5_VL = {"model_type": "qwen2_5_vl", "vocab_size": 151936}

KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _QWEN2_5_VL
    | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "tie_word_embeddings": True}
    | {"num_attention_heads": 16, "num_key_value_heads": 2}
    | {"vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}},
    "Qwen/Qwen2.5-VL-7B-Instruct": _QWEN2_5_VL
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    | {"num_attention_heads": 28, "num_key_value_heads": 4}
    | {"vision_config": {"hidden_size": 1280, "out_hidden_size": 3584}},
}
"""What their config.json say of sizes, by hub name, for machines from where the hub cannot be reached."""


def read_shape(model: ModelConfig) -> ModelShape:
    """Of a directory, of a name in `KNOWN`, or from the hub or its cache.

    Raises:
        UserError: there is no config.json to be read, or it is of no family that is known.
    """
    if (tree := KNOWN.get(model.path)) is None or Path(model.path).exists():
        try:
            tree = json.loads(_config_file(model.path).read_text())
            return shape_of(tree, model.path)
        except UserError:
            raise
        except Exception as error:  # the hub's client raises many types
            raise UserError(
                f"model.path: the config.json of {model.path} cannot be read ({first_line(error)}); give a "
                "directory with it, or one of " + ", ".join(KNOWN)
            ) from error
    return shape_of(tree, model.path)


def _config_file(path: str) -> Path:
    if Path(path).exists():
        return Path(path) / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, "config.json"))


def shape_of(tree: Mapping[str, Any], path: str = "") -> ModelShape:
    """From the content of config.json."""
    return family_named(tree.get("model_type"), path).shape(tree)
