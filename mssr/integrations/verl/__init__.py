"""The methods in verl 0.9.1: ``trainer.v1.trainer_mode=mssr_sync algorithm.adv_estimator=mssr``.

verl loads this module with every ``import verl``, in Ray's workers too (entry-point group ``verl.plugins``).
Its registries lie in modules that take seconds to import: ours follow once verl itself has imported those.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_FOLLOWS = {
    "verl.trainer.ppo.core_algos": f"{__name__}.estimators",
    "verl.trainer.ppo.v1.trainer_sync": f"{__name__}.trainer",
}
"""verl's module, and ours that is imported after it."""


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        try:
            importlib.import_module(_FOLLOWS[module.__name__])
        except (
            Exception
        ) as error:  # raised, it would end every run of verl, also those that do not ask for us
            print(
                f"mssr: no plugin for this verl: {type(error).__name__}: {error}", file=sys.stderr, flush=True
            )


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in _FOLLOWS else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder())
