"""YAML files + key=value overrides -> a Config. Every complaint is one line with the key."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mssr.config import easyr1_keys
from mssr.config.checks import naming
from mssr.config.options import describe, nearest
from mssr.config.run import Config, flatten, to_dict
from mssr.config.secrets import environment_variable, named_secrets, redact
from mssr.errors import UserError, did_you_mean, first_line

BASE = "base"
"""A file may name another one that it changes: ``base: ../mssr.yaml``, relative to itself."""
Layer = tuple[str, dict[str, Any]]
"""Where keys are from, for messages, and the tree of them."""


def file_layers(path: str | Path, above: Sequence[Path] = ()) -> list[Layer]:
    """What a YAML file and those that it is based on say, the last counting most.

    Args:
        above: the files that led here, each based on the next.

    Raises:
        UserError: a file is missing or no YAML.
    """
    path, asked_by = Path(path), f" (base of {above[-1]})" if above else ""
    if not path.is_file():
        raise UserError(f"config file {path} does not exist{asked_by}")
    if any(path.samefile(file) for file in above):
        raise UserError(f"{path} is based on itself{asked_by}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # yaml and omegaconf raise many types; all mean the same to the user
        raise UserError(f"{path} is not valid YAML: {redact(first_line(error))}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path} must hold key: value pairs at the top level")
    base = tree.pop(BASE, None)
    below = [] if base is None else file_layers(path.parent / str(base), [*above, path])
    return [*below, (str(path), _plain(tree))]


def merge(layers: Sequence[Layer], overrides: Sequence[str], note: Callable[[str], None]) -> Config:
    """Merge trees of keys, the last counting most, then ``key=value`` overrides, over the defaults.

    The rest as of `mssr.runs.config.load_config`, but for what the checks refuse.
    """
    if {"trainer.steps", "trainer.epochs"} <= {override.partition("=")[0] for override in overrides}:
        raise UserError("trainer.steps and trainer.epochs both say how long to train; set one of them")
    merged = OmegaConf.structured(Config)
    prompts_per_step = None
    for source, plain in [*layers, *map(_override, overrides)]:
        for key in named_secrets(plain):
            raise UserError(
                f"{source}: {key} looks like a secret, and a config is written to the run directory and sent "
                f"to loggers; put it in the environment ({environment_variable(key)}), or rename the key if "
                "it is none"
            )
        tree, prompts, notes = easyr1_keys.translate(plain, source)
        for line in notes:
            note(line)
        merged = _merge(merged, OmegaConf.create(_one_length(tree)), source)
        if "rollouts_per_step" in tree.get("rollout", {}):
            prompts_per_step = None
        prompts_per_step = prompts or prompts_per_step
    config = cast(Config, OmegaConf.to_object(merged))
    if config.trainer.progress == "False":  # so YAML reads a bare off
        config.trainer.progress = "off"
    if prompts_per_step is not None:
        with naming(f"algorithm.name={config.algorithm.name}"):
            config.rollout.rollouts_per_step = prompts_per_step * config.responses_per_prompt
    return config


def _override(text: str) -> Layer:
    source = f"override {redact(text)!r}"
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise UserError(f"{source} must look like key=value")
    try:
        parsed = OmegaConf.from_dotlist([text])
    except Exception as error:
        raise UserError(f"{source} cannot be read: {redact(first_line(error))}") from error
    return source, _plain(parsed)


def _one_length(tree: dict[str, Any]) -> dict[str, Any]:
    """A layer that says how long to train, in steps or in epochs, takes the other from those before it."""
    trainer = tree.get("trainer")
    if not isinstance(trainer, dict) or ("steps" in trainer) == (trainer.get("epochs") is not None):
        return tree
    other = {"epochs": None} if "steps" in trainer else {"steps": 0}
    return tree | {"trainer": trainer | other}


def from_dict(tree: dict[str, Any]) -> Config:
    """The Config that `mssr.config.to_dict` was made from (config.yaml, checkpoints)."""
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree)))


def config_yaml(config: Config) -> str:
    """The resolved config; what looks like a secret as ``***``."""
    return OmegaConf.to_yaml(OmegaConf.create(redact(to_dict(config))))


def _merge(base: DictConfig, extra: DictConfig, source: str) -> DictConfig:
    known = describe(Config)
    for key in flatten(_plain(extra)):
        holder = nearest(known, key)
        if key not in known and not (holder and holder.own_keys):
            raise UserError(f"{source}: unknown key {key}{_hint(key, known)}")
    try:
        return cast(DictConfig, OmegaConf.merge(base, extra))
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", None) or "a value"
        reason = redact(re.sub(r"\s+", " ", first_line(error)))
        raise UserError(f"{source}: {key} has the wrong type: {reason}") from error


def _hint(key: str, known: Collection[str]) -> str:
    same_leaf = [k for k in sorted(known) if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return f", did you mean {same_leaf[0]}?" if same_leaf else did_you_mean(key, known).replace("'", "")


def _plain(tree: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(tree))
