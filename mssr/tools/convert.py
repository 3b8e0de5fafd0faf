"""`mssr convert`: a config of EasyR1 or verl becomes one of ours, which says what became of every key."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mssr.config import Config, checks
from mssr.config.loading import merge
from mssr.config.options import describe, in_yaml
from mssr.config.secrets import redact
from mssr.errors import EXIT_OK, EXIT_USER_ERROR, UserError, did_you_mean, first_line
from mssr.tools.convert_keys import FACTS, SYSTEMS, VALUES, Key
from mssr.tools.convert_options import Options
from mssr.tools.convert_sources import read

READ, NONE, LOST, UNKNOWN = "read", "without effect here", "not possible", "unknown"


class Conversion:
    """What became of every key, and the options of ours.

    Attributes:
        system: "EasyR1" or "verl".
        told: (READ, NONE, LOST or UNKNOWN; key=value, or what of the file; the option, why or what to use).
        options: ours, by dotted key.
        same: whether the options mean what theirs meant, but for memory, time, files and validation.
    """

    def __init__(self, tree: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
        self.system = "verl" if "actor_rollout_ref" in tree else "EasyR1" if "worker" in tree else ""
        if not self.system:
            raise UserError("neither a config of EasyR1 (section worker) nor of verl (actor_rollout_ref)")
        self.table = SYSTEMS[self.system]
        self.told: list[tuple[str, str, str]] = [(LOST, line, "") for line in notes]
        self.same = not notes  # what was not read may have said anything
        self.given = dict(self._leaves(tree))
        self.facts: dict[str, Any] = {}
        self.keys: dict[str, list[str]] = {}
        """Of an option or a fact, the keys that set it."""
        for key, value in self.given.items():
            self._take(key, value)
        for key, about in self.table.items():
            if about.to and about.to not in self.facts:
                self.facts[about.to], known = self._translated(about, about.default)
                if not known:
                    self._lost(f"{key}={about.default}, the default", VALUES[about.to][1])
        made = Options(self.facts, self.system, self._lost)
        try:
            self.options = made.options()
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"a value is not of the kind that its key has: {first_line(error)}") from error
        if made.reward_of:
            self.keys["reward.name"] = [made.reward_of]
            self.told.append((READ, made.reward_of, f"reward.name={self.options['reward.name']}"))
        for key, value in self.given.items():
            self._report(key, value)

    def _leaves(self, tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Keys and values; a value may have keys of its own where the table has none of them."""
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in self.table):
                yield from self._leaves(value, f"{key}.")
            elif name != "_target_":
                yield key, value

    def about(self, key: str) -> Key | None:
        """The table's row of a key, or of what it lies in."""
        while key and key not in self.table:
            key = key.rpartition(".")[0]
        return self.table.get(key)

    def _translated(self, about: Key, value: Any) -> tuple[Any, bool]:
        """A value as ours, and whether there is one."""
        values, use = VALUES.get(about.to, ({}, ""))
        if not isinstance(value, list | dict) and value in values:
            return values[value], True
        number = isinstance(about.default, int | float)
        known = not use and (not number or isinstance(value, int | float | None))
        return (value if known else None), known

    def _take(self, key: str, value: Any) -> None:
        about = self.about(key)
        if about and about.to and not _open(value):
            ours, _ = self._translated(about, value)
            if ours is None and about.default is not None and about.to not in VALUES:
                return  # so the default holds
            if ours or about.to not in self.facts:  # of two keys that say the same, the one that says it
                self.facts[about.to] = ours

    def _lost(self, what: str, use: str, trains: bool = True) -> None:
        self.told.append((LOST, what, use))
        self.same &= not trains

    def _report(self, key: str, value: Any) -> None:
        """What became of one key."""
        about, setting = self.about(key), f"{key}={in_yaml(value)}"
        if about is None:
            self.told.append(
                (UNKNOWN, setting, f"{self.system} has no such key{did_you_mean(key, self.table)}")
            )
            self.same = False
        elif _open(value) and (about.to or about.only):
            use = "the running script decides it; give key=value after FILE"
            self._lost(setting, use, about.trains and about.to != "experiment_name")
        elif about.to and not self._translated(about, value)[1]:
            instead = f"set {FACTS.get(about.to, about.to)}"
            self._lost(setting, VALUES.get(about.to, ({}, ""))[1] or instead)
        elif about.to:
            options = [o for o in FACTS.get(about.to, about.to).split(", ") if o in self.options]
            for option in options:
                self.keys.setdefault(option, []).append(key)
            said = ", ".join(f"{o}={in_yaml(self.options[o])}" for o in options)
            self.told.append(
                (READ, setting, said) if said else (NONE, setting, "nothing reads it with the others")
            )
        elif about.only is None or value in [self._meant(v) for v in about.only]:
            self.told.append((NONE, setting, about.note if about.only is None else "as it is here"))
        else:
            self._lost(setting, about.note, about.trains)

    def _meant(self, allowed: Any) -> Any:
        """A value of ``only``; "=KEY" is the value of that key, given or by default."""
        if not isinstance(allowed, str) or not allowed.startswith("="):
            return allowed
        return self.given.get(allowed[1:], self.table[allowed[1:]].default)

    def yaml(self, source: str) -> str:
        """The config as a file: our keys with the keys that they are from, then the others in comments."""
        lines = [f"# From {source}, by mssr convert: docs/convert.md."]
        tree: dict[str, Any] = {}
        for option in filter(self.options.__contains__, describe(Config)):
            *sections, leaf = option.split(".")
            node = tree
            for depth, section in enumerate(sections):
                if section not in node:
                    lines.append(f"{'  ' * depth}{section}:")
                node = node.setdefault(section, {})
            value = yaml.safe_dump(
                self.options[option], default_flow_style=True, width=10**6, sort_keys=False
            )
            keys = ", ".join(self.keys.get(option, [])) or f"{self.system}'s default"
            lines.append(f"{'  ' * len(sections)}{leaf}: {value.removesuffix(_END).strip()}  # {keys}")
        for kind in (UNKNOWN, LOST, NONE):
            lines += [f"# {line}" for line in self.lines(kind)]
        return "\n".join(lines) + "\n"

    def lines(self, kind: str) -> list[str]:
        """What was told of one kind, a line a key."""
        return [
            f"{kind}: {' '.join(what.split())}: {why}".rstrip(": ") for k, what, why in self.told if k == kind
        ]


_END = "...\n"


def _open(value: Any) -> bool:
    """Whether it holds something that only a running script or another file knows."""
    return isinstance(value, str) and ("$" in value or "`" in value)


def convert(config_file: str, overrides: Sequence[str], out: Path | None = None) -> int:
    """Write a config of EasyR1 or verl as one of ours; the exit code is 2 where it trains otherwise."""
    from mssr.algorithms import policy_losses  # noqa: F401 - for the check below; missed before anything is written

    found = Conversion(*read(config_file, overrides))
    text = redact(found.yaml(config_file))
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)
        print(redact("\n".join([*found.lines(READ), *found.lines(NONE), f"written: {out}"])))
    for line in (*found.lines(UNKNOWN), *found.lines(LOST)):
        print(redact(line), file=sys.stderr)
    try:
        checks.validate(merge([(config_file, yaml.safe_load(text))], (), lambda line: None))
    except UserError as error:
        raise UserError(f"what could be converted is no whole config yet: {error}") from error
    return EXIT_OK if found.same else EXIT_USER_ERROR
