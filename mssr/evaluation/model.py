"""What is evaluated: a Hugging Face model or a checkpoint of ours, with the config that it is asked under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mssr.config import Config, ModelConfig, to_dict
from mssr.config.data import DataConfig
from mssr.config.loading import Layer, file_layers, from_dict
from mssr.config.options import READ, UNREAD, describe, nearest
from mssr.config.recipes import find
from mssr.data.images import reason
from mssr.errors import UserError
from mssr.models.files import sha256
from mssr.models.loading import resolve_device
from mssr.runs import manifest as manifests
from mssr.runs.checkpoint import resolve
from mssr.runs.config import merge_layers
from mssr.runs.export import export

DEFAULTS = {"data": {"train": "-", "max_prompt_length": 8192}}
"""Of a Hugging Face model; longer prompts than in training: an image of data.max_pixels has 5350 tokens."""
NOT_OF_CHECKPOINT = {"rollout": ("n", "rollouts_per_step"), "model": (), "data": (), "cluster": ()}
"""Sections that are taken from a checkpoint's config, without these keys."""
HASHED = (".json", ".jinja", ".txt", ".model")
"""Small files of a model directory: known by content; weights by size and time of change."""


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model and how it is asked."""

    name: str
    """As the user wrote it."""
    config: Config
    checkpoint: Path | None
    """A checkpoint of ours, with intact files; None for a Hugging Face model."""
    step: int | None
    identity: str
    """A hash that another model would not have."""

    @property
    def label(self) -> str:
        """A name for a directory: "digits-mssr-step-000060", "Qwen2.5-VL-3B-Instruct"."""
        if self.checkpoint is None:
            return Path(self.name).name or "model"
        run = self.checkpoint.absolute().parent.parent.name
        return f"{run}-{self.checkpoint.name}"

    def directory(self, scratch: Path) -> str:
        """A Hugging Face model for the engines; a checkpoint is exported under ``scratch``.

        Where engines compute in float32 the export is float32 too, as the weights that a training sends them.
        """
        if self.checkpoint is None:
            return self.config.model.path
        dtype, device = self.config.model.dtype, self.config.cluster.device
        in_float32 = dtype == "float32" or (dtype == "auto" and resolve_device(device) == "cpu")
        exported = export(self.checkpoint, scratch / "model", "float32" if in_float32 else None)
        return str(exported.absolute())


def open_model(
    name: str,
    config_file: str | None,
    overrides: Sequence[str],
    reward: bool,
    note: Callable[[str], None],
) -> EvaluatedModel:
    """Find a model and its config.

    Args:
        name: a Hugging Face directory or hub name; or a checkpoint, a pointer to one, or a run directory,
            which means its latest.
        config_file: for a Hugging Face model; a checkpoint has the config of its training.
        reward: whether ``reward`` of the config is read.

    Raises:
        UserError: there is no such model, a checkpoint is damaged, or the config is wrong.
    """
    _check_overrides(overrides, reward)
    placed = {"placement": "auto", "weight_transfer": "auto"}  # there are no ranks
    fixed: Layer = ("mssr eval", {"actor": {"num_ranks": 1}, "cluster": placed})
    path = Path(name)
    if not (path.is_file() or (path / "checkpoints").is_dir() or (path / manifests.FILE).is_file()):
        if path.exists() and not (path / "config.json").is_file():
            raise UserError(
                f"--model: {name} is no Hugging Face model (no config.json), no checkpoint (no "
                f"{manifests.FILE}) and no run directory (no checkpoints)"
            )
        layers: list[Layer] = [("mssr eval", DEFAULTS)]
        layers += file_layers(find(config_file)) if config_file else []
        layers += [("--model", {"model": {"path": name}}), fixed]
        config = merge_layers(layers, overrides, note)
        return EvaluatedModel(name, config, None, None, _model_identity(config.model))
    if config_file:
        raise UserError(f"--config: {name} is a checkpoint and has its own; change it by key=value")
    path = resolve(path)
    manifest = manifests.verify(path)
    config = merge_layers([(str(path), _of_checkpoint(manifest.config, reward)), fixed], overrides, note)
    return EvaluatedModel(name, config, path, manifest.step, sha256(path / manifests.FILE))


def _of_checkpoint(tree: dict[str, Any], reward: bool) -> dict[str, Any]:
    """What of a training's config an evaluation is asked under."""
    full = to_dict(from_dict(tree))
    taken: dict[str, Any] = {
        section: {k: v for k, v in full[section].items() if k not in left_out}
        for section, left_out in NOT_OF_CHECKPOINT.items()
    }
    taken["seed"] = full["seed"]
    if reward:
        taken["reward"] = full["reward"]
    return taken


def _check_overrides(overrides: Sequence[str], reward: bool) -> None:
    known = describe(Config)
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith("reward.") and not reward:
            raise UserError(f"{key} is read by nothing without --reward")
        option = nearest(known, key)
        if option and option.evaluation != READ:
            instead = "" if option.evaluation == UNREAD else f"; use {option.evaluation}"
            raise UserError(f"{key} is read by nothing in an evaluation{instead}")


def _model_identity(config: ModelConfig) -> str:
    path = Path(config.path)
    known: list[list[str]] = []
    if path.is_dir():
        for file in sorted(p for p in path.iterdir() if p.is_file()):
            if file.suffix in HASHED:
                known.append([file.name, sha256(file)])
            elif file.suffix == ".safetensors":
                known.append([file.name, f"{file.stat().st_size}/{file.stat().st_mtime_ns}"])
    else:
        import transformers

        try:
            loaded = transformers.AutoConfig.from_pretrained(
                config.path, trust_remote_code=config.trust_remote_code
            )
        except Exception as error:  # transformers raises many types for what it cannot find
            raise UserError(f"--model: {config.path} cannot be had ({reason(error)})") from error
        known.append([config.path, str(getattr(loaded, "_commit_hash", None))])
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def engine_config(config: Config, path: str, data: DataConfig, out: Path) -> Config:
    """The config of a cluster of engines alone: this model, these prompts, logs in the output directory."""
    return replace(
        config,
        model=replace(config.model, path=path),
        data=data,
        actor=replace(config.actor, num_ranks=0),
        trainer=replace(config.trainer, run_dir=str(out)),
    )
