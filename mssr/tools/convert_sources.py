"""What a config of EasyR1 or verl says: a YAML file, Hydra's too, or the script that starts a training.

Scripts are read and never run. Assignments, arrays, continued lines, comments, quotes and ``${X:-default}``
are understood, with the environment's variables as a shell would have them; what stands in an if, case, loop
or function is not followed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mssr.errors import UserError, first_line

_SUBSTITUTION = r"\$\((?:[^()]|\([^()]*\))*\) | \$\{(?:[^{}]|\$\{[^{}]*\})*\}"
_PIECE = rf"""'[^']*' | "(?:\\. | {_SUBSTITUTION} | [^"\\])*" | {_SUBSTITUTION} | `[^`]*` | \$\w+ | \$[@*]
| \\[^\n] | [^\s;&|()<>'"`\\]"""
_TOKEN = re.compile(rf"\\\n|[ \t]+|(?<!\S)\#[^\n]*|(?P<word>(?:{_PIECE})+)|(?P<end>[\n;&|()<>])", re.X | re.S)
_PIECES = re.compile(_PIECE, re.X | re.S)
_ARRAY = re.compile(r'"?\$\{(\w+)\[[@*]\]\}"?')
_VARIABLE = re.compile(r"\$(?:(\w+|[@*])|\{(\w+)(?:(:?-)((?:[^{}]|\$\{[^{}]*\})*))?\})")
_ASSIGNMENT = re.compile(r"(\w+)(\+?=)(.*)", re.S)
_OPEN, _CLOSE = [["if"], ["case"], ["for"], ["while"], ["until"], ["{"]], [["fi"], ["esac"], ["done"], ["}"]]
_BEFORE = ("then", "else", "do", "export", "local", "declare", "readonly")
_SETTING = re.compile(r"(\+{0,2}[A-Za-z_]\w*(\.\w+)+=|~[A-Za-z_])")


def read(path: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The tree of keys of a file and ``key=value`` overrides, and lines about what of the file was not read.

    Raises:
        UserError: a file is missing or cannot be read, an override cannot, or a script starts no training.
    """
    file, notes = Path(path), list[str]()
    if not file.is_file():
        raise UserError(f"{path} does not exist; name a YAML file, or a script that starts a training")
    if file.suffix in (".yaml", ".yml"):
        tree = _yaml(file, notes)
    else:
        words = _command(file, notes)
        tree = _base(words, file, notes)
        overrides = [*filter(_SETTING.match, words), *overrides]
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if key.startswith("hydra."):
            continue
        if not equals and override[0] != "~":
            raise UserError(f"override {override!r} must look like key=value")
        try:
            if override[0] == "~":
                holder, _, leaf = key.rpartition(".")
                (OmegaConf.select(tree, holder) if holder else tree).pop(leaf, None)
            else:
                parsed = OmegaConf.from_dotlist([f"value={value}"])
                OmegaConf.update(tree, key, parsed._get_node("value"), merge=False, force_add=True)
        except Exception as error:  # yaml and omegaconf raise many types; all mean the same to the user
            raise UserError(f"override {override!r} cannot be read: {first_line(error)}") from error
    return _resolved(tree), notes


def _yaml(file: Path, notes: list[str]) -> DictConfig:
    """A YAML file, over those that its ``defaults`` name and that lie beside it."""
    try:
        tree = OmegaConf.load(file)
    except Exception as error:
        raise UserError(f"{file} is not valid YAML: {first_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{file} must hold key: value pairs at the top level")
    tree.pop("hydra", None)
    below = DictConfig({})
    for entry in tree.pop("defaults", None) or []:
        name = entry if isinstance(entry, str) else "/".join(f"{k}/{v}" for k, v in entry.items())
        if (beside := file.parent / f"{name}.yaml").is_file():
            below.merge_with(_yaml(beside, notes))
        elif name != "_self_" and not name.startswith("ppo_"):
            notes.append(f"defaults of {file.name}: {name} is not read, {name}.yaml is not beside it")
    below.merge_with(tree)
    return below


def _resolved(tree: DictConfig) -> dict[str, Any]:
    """As a plain dict. What is missing ("???") is left out, and a value stays as it is written where one that
    it names is not there."""

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in list(node.items()):
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif value == "???":
                del node[key]
            elif isinstance(value, str) and "${" in value:
                with contextlib.suppress(Exception):
                    found = OmegaConf.select(tree, f"{prefix}{key}")
                    node[key] = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found

    plain: Any = OmegaConf.to_container(tree, resolve=False)
    walk(plain, "")
    return plain  # type: ignore[no-any-return]


def _base(words: Sequence[str], script: Path, notes: list[str]) -> DictConfig:
    """The file that a command line names for what it does not say: EasyR1's config=, or Hydra's options."""
    options = dict(
        re.findall(r"(?:^|\n)(config|--config-path|--config-name|-cp|-cn)[=\n]([^\n]*)", "\n".join(words))
    )
    name = options.get("config")
    if name is None:
        name = (options.get("--config-name") or options.get("-cn") or "ppo_trainer").removesuffix(".yaml")
        if name.startswith("ppo_"):  # verl's own
            return DictConfig({})
        name = f"{options.get('--config-path') or options.get('-cp') or '.'}/{name}.yaml"
    for directory in (Path(), *script.absolute().parents):
        if (directory / name).is_file():
            return _yaml(directory / name, notes)
    raise UserError(
        f"{script} is based on {name}, which is not here; name its directory as the working directory"
    )


def _command(script: Path, notes: list[str]) -> list[str]:
    """The words of the command that starts the training."""
    known: dict[str, Any] = {**os.environ, "PWD": os.getcwd()}
    depth, left, found = 0, set[str](), list[list[str]]()
    text = script.read_text(errors="replace")
    for words in _statements(text):
        while words and (words[0] in _BEFORE or words[0][0][0] == "-"):  # declare -a NAME=(...)
            words = words[1:]
        depth += (words[:1] in _OPEN) - (words[:1] in _CLOSE)
        while words and (
            match := _ASSIGNMENT.fullmatch(words[0] if isinstance(words[0], str) else words[0][0])
        ):
            name, how, written = match.groups()
            value: Any = _expand(written, known) if isinstance(words[0], str) else _words(words[0][1:], known)
            if depth:
                left |= {name} if isinstance(value, str) or any(map(_SETTING.match, value)) else set()
            else:
                more = how == "+=" and isinstance(known.get(name), type(value))
                known[name] = known[name] + value if more else value
            words = words[1:]
        expanded = [] if depth else _words(words, known)
        if expanded and _SETTING.match(expanded[0]):
            notes.append(
                f"{script.name}: {expanded[0]} and what follows is cut off from the command by a comment"
            )
        elif any(map(_SETTING.match, expanded)):
            found.append(expanded)
    if len(found) != 1:
        raise UserError(
            f"{script} holds {len(found) or 'no'} commands with key=value words outside of if, case, loop "
            "and function; give a script with one, or a YAML file"
        )
    if used := sorted(name for name in left if re.search(rf"\${{?{name}\b", text)):
        notes.append(
            f"{script.name} sets {', '.join(used)} in an if, case, loop or function, which is not "
            "followed; give key=value after FILE for what it decides"
        )
    return found[0]


def _statements(text: str) -> Iterator[list[Any]]:
    """The words of every simple command as they are written; of an array a list of name, = and its words."""
    words: list[Any] = []
    array: list[str] | None = None
    for token in _TOKEN.finditer(text):
        word, end = token["word"], token["end"]
        if array is not None:
            array += [word] if word else []
            array = None if end == ")" else array
        elif word:
            words.append(word)
        elif end == "(" and words and re.fullmatch(r"\w+\+?=", words[-1]):
            array = words[-1] = [words[-1]]
        elif end:
            yield words
            words = []
    yield words


def _words(written: Sequence[Any], known: Mapping[str, Any]) -> list[str]:
    expanded: list[str] = []
    for word in (word for word in written if isinstance(word, str)):
        array = _ARRAY.fullmatch(word)
        found = known.get(array[1], []) if array else _expand(word, known)
        expanded += [found] if isinstance(found, str) else found
    return list(filter(None, expanded))


def _expand(word: str, known: Mapping[str, Any]) -> str:
    """A word without its quotes; what only the running script knows stays as it is written."""
    text = ""
    for piece in _PIECES.findall(word):
        if piece[0] in "'\\":
            text += piece.strip("'") if piece[0] == "'" else piece[1:]
        elif piece[0] == '"':
            text += re.sub(r'\\(["$`\\])', r"\1", _substitute(piece[1:-1], known))
        else:
            text += _substitute(piece, known)
    return text


def _substitute(text: str, known: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        name, how, default = match[1] or match[2], match[3], match[4]
        if name in "@*":
            return ""
        found = known.get(name)
        if how and (found is None or (how == ":-" and not found)):
            return _substitute(default.strip("\"'"), known)
        return found if isinstance(found, str) else match[0]

    return _VARIABLE.sub(value, text.replace("$(pwd)", known["PWD"]))
