"""The models that can be trained: a file a family, found by the ``model_type`` of config.json."""

from __future__ import annotations

from typing import Any

from mssr.errors import UserError
from mssr.models.families.base import Family
from mssr.models.families.qwen2_5_vl import Qwen25VL
from mssr.models.families.qwen2_vl import Qwen2VL
from mssr.models.families.qwen3_5 import Qwen35
from mssr.models.families.qwen3_vl import Qwen3VL
from mssr.models.families.qwen3_vl_moe import Qwen3VLMoe
from mssr.models.families.qwen_text import Qwen2, Qwen3

_ALL = Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe(), Qwen35(), Qwen2(), Qwen3()
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

__all__ = ["FAMILIES", "Family", "family_named", "family_of"]


def family_named(model_type: str | None, path: str) -> Family:
    """The family of the model at a path.

    Raises:
        UserError: there is none; names those that there are.
    """
    if (family := FAMILIES.get(model_type or "")) is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"model.path: {path} is a {model_type} model; mssr trains {known}")
    return family


def family_of(config: Any) -> Family:
    """That of a transformers config."""
    return family_named(config.model_type, config.name_or_path)
