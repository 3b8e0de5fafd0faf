"""Keys and passwords: kept out of configs, which are written, logged and shown (`named_secrets` finds them),
and out of everything else that is written (`redact`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

_T = TypeVar("_T")

HIDDEN = "***"

_SECRET = re.compile(
    r"(^|_)(password|passwd|passphrase|pwd|secret|credential|apikey|authorization|bearer)s?(_|$)"
    r"|(^|_)(api|auth|access|account|private|secret|signing|encryption|license)_keys?(_|$)"
    r"|(^|_)token$"
)
_HARMLESS = re.compile(
    r"(^|_)(file|path|dir|env|var|variable|name|column|header|url|id|count|limit|length)$"
    r"|(^|_)(pad|eos|bos|eot|eod|unk|sep|cls|mask|image|video|vision|audio|think|stop|start|end|begin|special|tool"
    r"|next|last|first|new|per|each|extra|boi|eoi|newline|placeholder|prompt|response)_token$"
)
"""What says something about a secret, as where it lies; tokens of a vocabulary."""
_VALUE = re.compile(
    r"\b(hf_|gh[pousr]_|AKIA|ASIA)[A-Za-z0-9]{16,}"
    r"|\b(sk-(?=[\w-]*\d)|github_pat_|glpat-|xox[abprs]-|wandb_v\d_|AIza|eyJ)[\w.-]{16,}"
    r"|\bBearer\s+[\w.~+/-]{16,}=*|(?<=://)[^\s/:@'\"]*:[^\s/@'\"]+(?=@)"
)
"""Tokens of known forms, and name and password in a URL."""
_PASSWORD = re.compile("passw|pwd|passphrase").search
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.-]{0,99})([\"']?[=:]\s?)(\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',;}\]]+)")


def is_secret_name(name: str) -> bool:
    """Whether a key's own name says that its value is a secret: api_key, hf_token, but not pad_token."""
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    return bool(_SECRET.search(words)) and not _HARMLESS.search(words)


def named_secrets(tree: Any) -> list[str]:
    """Dotted keys (``a.b``, ``a.0.b`` in a list) whose name says that their value is a secret.

    ``null``, empty text, true and false are no secrets, and neither is ``${oc.env:NAME}``, which names
    one. A number is one only where the name speaks of a password.
    """
    found: list[str] = []
    _map_leaves(tree, lambda key, value: found.append(key) if _holds(key, value) else None)
    return found


def redact(value: _T) -> _T:
    """The same with every secret as ``***``.

    Text: what looks like a secret, and what follows a secret's name and "=" or ":". A dict or list, nested:
    values under a secret's name, and in other text what looks like a secret, so that a config without
    secrets stays as it is.
    """
    if isinstance(value, str):
        return cast(_T, _ASSIGNMENT.sub(_hide_assigned, _VALUE.sub(HIDDEN, value)))
    return cast(_T, _map_leaves(value, _redact_leaf))


def environment_variable(key: str) -> str:
    """A name for a variable with the secret of a config key: "reward.options.api_key" -> "API_KEY"."""
    return re.sub(r"[^A-Z0-9]+", "_", key.rpartition(".")[2].upper()).strip("_")


def _map_leaves(tree: Any, function: Callable[[str, Any], Any], key: str = "") -> Any:
    """A nested dict or list with ``function(dotted key, value)`` in place of its values."""
    if isinstance(tree, dict):
        return {k: _map_leaves(v, function, f"{key}.{k}" if key else str(k)) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_leaves(v, function, f"{key}.{i}") for i, v in enumerate(tree)]
    return function(key, tree)


def _redact_leaf(key: str, value: Any) -> Any:
    if _holds(key, value):
        return HIDDEN
    return _VALUE.sub(HIDDEN, value) if isinstance(value, str) else value


def _holds(key: str, value: Any) -> bool:
    """Whether a value under this dotted key is a secret by the key's name."""
    names = [part.lower() for part in key.split(".") if is_secret_name(part)]
    if not isinstance(value, str):
        return isinstance(value, int | float) and not isinstance(value, bool) and any(map(_PASSWORD, names))
    if not names or not value.strip() or value.startswith("${") or value == HIDDEN:
        return False
    # answer_token: <answer>
    return not (all(name.endswith("token") for name in names) and re.search(r"[<>\[\]\s]", value))


def _hide_assigned(match: re.Match[str]) -> str:
    name, separator, value = match.groups()
    return f"{name}{separator}{HIDDEN}" if _holds(name, value.strip("\"'")) else match[0]
