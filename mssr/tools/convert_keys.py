"""EasyR1's and verl's config keys, every one of them: read as what, without effect here, or not possible.

The tables are convert_keys.txt beside this file; `mssr.tools.convert` reads configs by them, and
docs/convert.md is written from them: ``python -m mssr.tools.convert_keys``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mssr.config import easyr1_keys
from mssr.config.options import in_yaml

NO_LIMIT = 1_000_000
"""A number that no run reaches; as an interval of steps: before the first and after the last only."""
MARK = "<!-- From here on written by `python -m mssr.tools.convert_keys`. -->"


@dataclass(frozen=True, slots=True)
class Key:
    """What becomes of a key; and of the keys in it, unless they are listed."""

    to: str = ""
    """Option of ours that it sets, or a fact of which options are computed; "" for neither."""
    default: Any = None
    """What it is where it is absent, which is written too."""
    only: tuple[Any, ...] | None = None
    """Values that mean the same here, or "=KEY": the value of that key. Others are not possible."""
    note: str = ""
    """Why it has no effect; or what to use in place of a value that is not possible."""
    trains: bool = True
    """Whether such a value changes what is learnt, and not only memory, files or validation."""


SYSTEMS: dict[str, dict[str, Key]] = {
    "EasyR1": {f"data.{key}": Key(note=reason) for key, reason in easyr1_keys.WITHOUT_EFFECT.items()},
    "verl": {},
}
"""Every key by its whole name."""
FACTS: dict[str, str] = {}
"""The options that are computed of a fact, or that an option has a say in."""
VALUES: dict[str, tuple[Mapping[Any, Any], str]] = {}
"""Their values -> ours, and what to use in place of others; "" where others stay as they are."""


def _read_tables() -> None:
    short = [
        {"a": f"{base}.actor", "ro": f"{base}.rollout", "m": f"{base}.model"}
        for base in ("worker", "actor_rollout_ref")
    ]
    text = Path(__file__).with_suffix(".txt").read_text()
    for line in filter(None, (line.partition("#")[0] for line in text.splitlines())):
        about, *columns = (part.strip() for part in line.split("|"))
        if about.startswith("> "):
            VALUES[about[2:]] = yaml.safe_load(columns[0]), columns[1]
            continue
        to, computes, options = about.partition(" > ")
        if computes:
            FACTS[to] = options
        for (table, names_of), column in zip(zip(SYSTEMS.values(), short, strict=True), columns, strict=True):
            for names, _, value in (group.partition(" = ") for group in column.split("; ") if group):
                given: Any = yaml.safe_load(value) if value else None
                if " " in to:
                    only = tuple(given) if value else None
                    key = Key(only=only, note=to.lstrip("?"), trains=not to.startswith("?"))
                else:
                    key = Key(to, given)
                for start, dot, rest in (name.partition(".") for name in names.split()):
                    table[names_of.get(start, start) + dot + rest] = key


_read_tables()
for _key, (_ours, _default) in easyr1_keys.RENAMED.items():
    SYSTEMS["EasyR1"][f"data.{_key}"] = Key("val" if _ours == "data.val" else _ours, _default)


def reference() -> str:
    """The tables as docs/convert.md has them."""
    lines = [MARK]
    for system, table in SYSTEMS.items():
        lines += ["", f"## {system}", "", "| key | by default | here |", "| --- | --- | --- |"]
        for key, about in table.items():
            default, values, use = "", *VALUES.get(about.to, ({}, about.note))
            here = ", ".join(f"`{option}`" for option in FACTS.get(about.to, about.to).split(", "))
            if about.to:
                default = f"`{in_yaml(about.default)}`"
                as_ours = (f"`{in_yaml(a)}`" + f" as `{in_yaml(b)}`" * (a != b) for a, b in values.items())
                here += (": " if values else "") + ", ".join(as_ours) + f"; else {use}" * bool(use)
            elif about.only:
                here = f"as here: {', '.join(f'`{in_yaml(v)}`' for v in about.only)}; else {use}"
            else:
                here = f"without effect: {use}"
            lines.append(f"| `{key}` | {default} | {here} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
