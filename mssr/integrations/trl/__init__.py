"""Single-rollout training inside TRL 1.16: `MSSRTrainer` and `MSSRConfig`, subclasses of its GRPO classes.

Nothing of TRL is changed: what else a process trains with it is the same, bit for bit. What differs from
training here, and the faults of TRL that are mended on the way: docs/plugins.md.
"""

from __future__ import annotations

from importlib import metadata

if (_version := metadata.version("trl")).split(".")[:2] != ["1", "16"]:
    raise ImportError(f"mssr.integrations.trl needs trl>=1.16,<1.17, and this is {_version}")

from mssr.integrations.trl.config import MSSRConfig
from mssr.integrations.trl.trainer import MSSRTrainer

__all__ = ["MSSRConfig", "MSSRTrainer"]
