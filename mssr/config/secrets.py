"""Keys and passwords: kept out of configs, and out of everything that is written.

A config is written to config.yaml, sent to loggers and shown in reports, so a secret has no place in it:
`find_secrets` finds them, and `redact` takes out of what is written whatever got in all the same.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")

HIDDEN = "***"

_WORDS = frozenset("password passwd passphrase pwd secret credential apikey authorization bearer".split())
"""Words of a name that make it a secret's, also in the plural."""
_PAIRS = frozenset(
    ("api", "auth", "access", "account", "private", "secret", "signing", "encryption", "license")
)
"""Words that do so before "key"."""
_VOCABULARY = frozenset(
    "pad eos bos eot eod unk sep cls mask image video vision audio think stop start end begin special tool "
    "next last first new per each extra boi eoi newline placeholder prompt response".split()
)
"""Words before "token" that mean one of a vocabulary."""
_ABOUT = frozenset("file path dir env var variable name column header url id count limit length".split())
"""Last words of names that say something about a secret, as where it lies."""

_VALUES = re.compile(
    r"""
    \bhf_[A-Za-z0-9]{16,}                                   # Hugging Face
  | \bsk-(?=[\w-]*\d)[\w-]{16,}                              # OpenAI, Anthropic and others
  | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,}     # GitHub
  | \bglpat-[\w-]{16,}                                      # GitLab
  | \bxox[abprs]-[\w-]{10,}                                 # Slack
  | \bwandb_v\d_\w{16,}                                     # wandb
  | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b                           # AWS
  | \bAIza[\w-]{30,}                                        # Google
  | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}                 # a JSON web token
  | \bBearer\s+[\w.~+/-]{16,}=*
  | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----
    """,
    re.VERBOSE,
)
_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://[^\s/:@'\"]*:)([^\s/@'\"]+)(@)", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    r"([A-Za-z_][\w.-]{0,99})([\"']?[=:]\s?)(?:(\"[^\"\n]*\")|('[^'\n]*')|([^\s\"',;}\]]+))"
)


def find_secrets(tree: Any) -> list[str]:
    """Keys in a nested dict whose name says that their value is a secret, or whose value looks like one.

    ``null``, empty text, true and false are no secrets, and neither is ``${oc.env:NAME}``, which names
    one. A number is one only where the name speaks of a password.

    Returns:
        Dotted keys, ``a.b`` or ``a.0.b`` within a list.
    """
    return [
        key
        for key, value in _leaves(tree)
        if _holds(key, value) or (isinstance(value, str) and _in_text(value) != value)
    ]


def named_secrets(tree: Any) -> list[str]:
    """Those of `find_secrets` whose name says so."""
    return [key for key, value in _leaves(tree) if _holds(key, value)]


def redact(value: _T) -> _T:
    """The same with every secret as ``***``.

    Text: what looks like a secret, and what follows a secret's name and "=" or ":". A dict or list, nested:
    values under a secret's name, and in other text what looks like a secret, so that a config without
    secrets stays as it is.
    """
    if isinstance(value, str):
        return _ASSIGNMENT.sub(_hide_assigned, _in_text(value))  # type: ignore[return-value]
    return _redact_tree(value, "")


def is_secret_name(name: str) -> bool:
    """Whether a key's own name says that its value is a secret: api_key, hf_token, but not max_tokens.

    Example: ``is_secret_name("wandb_api_key")``, ``not is_secret_name("pad_token")``
    """
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    words = [w for w in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if w]
    if not words or words[-1] in _ABOUT:
        return False
    if any(w in _WORDS or w.removesuffix("s") in _WORDS for w in words):
        return True
    if any(a in _PAIRS and b in ("key", "keys") for a, b in itertools.pairwise(words)):
        return True
    return words[-1] == "token" and (len(words) == 1 or words[-2] not in _VOCABULARY)


def environment_variable(key: str) -> str:
    """Where the libraries look for the secret that a config key is named after, or a name of its own."""
    name = key.rpartition(".")[2].lower()
    for word, variable in (
        ("wandb", "WANDB_API_KEY"),
        ("openai", "OPENAI_API_KEY"),
        ("hf", "HF_TOKEN"),
        ("hub", "HF_TOKEN"),
        ("huggingface", "HF_TOKEN"),
    ):
        if word in re.split(r"[^a-z0-9]+", name):
            return variable
    return re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        yield prefix, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _holds(key: str, value: Any) -> bool:
    """Whether a value under this dotted key is a secret by the key's name."""
    parts = [part for part in key.split(".") if is_secret_name(part)]
    if not parts or value is None or isinstance(value, bool):
        return False
    if isinstance(value, str):
        if not value.strip() or value.startswith("${") or value == HIDDEN:
            return False
        # answer_token: <answer>
        return not (all(part.lower().endswith("token") for part in parts) and re.search(r"[<>\[\]\s]", value))
    return any(re.search("passw|pwd|passphrase", part.lower()) for part in parts)


def _redact_tree(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _redact_tree(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_tree(v, f"{key}.{i}") for i, v in enumerate(value)]
    if _holds(key, value):
        return HIDDEN
    return _in_text(value) if isinstance(value, str) else value


def _in_text(text: str) -> str:
    return _URL_PASSWORD.sub(rf"\1{HIDDEN}\3", _VALUES.sub(HIDDEN, text)) if text else text


def _hide_assigned(match: re.Match[str]) -> str:
    name, separator, value = match[1], match[2], match[3] or match[4] or match[5]
    return f"{name}{separator}{HIDDEN}" if _holds(name, value.strip("\"'")) else match[0]
