"""What there is to know of an option, at its field: the docstring says its meaning, the metadata all else.

A condition of ``read_if`` is ``KEY = VALUE`` or ``KEY != VALUE`` (several joined by ``or``); or ``KEY takes
it``, for a method or loss that has a parameter of the option's name; or, of a name or a list of them, ``KEY
has NAME``, ``KEY has rule``, ``KEY has several``. KEY is of the same section, or dotted from the top. Where
it is null, what null means there counts.
"""

from __future__ import annotations

import copy
import functools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import yaml

from mssr import algorithms
from mssr.algorithms.plugins import is_spec
from mssr.errors import UserError

REFUSED = "refused"
"""What a resume thinks of a change: the saved state would mean other weights, prompts, baselines, order."""
FORM = "refused, also forced"
"""As REFUSED, and the state is made of other tensors, so that it cannot be read at all."""
LISTED = "listed"
"""It changes the course of the run, and is shown."""
FREE = "free"
"""It says how a run is computed and not what it computes."""

READ = "read"
UNREAD = "unread"


@dataclass(frozen=True, slots=True)
class Option:
    """An option; or a section of options, for which counts what they do not say themselves."""

    default: Any = None
    within: str = ""
    """The range of a number, or of each in a list: "> 0", ">= 0 and < 1", "[0, 1)", "0 or 1"."""
    choices: str = ""
    """The values that there are, or those of each in a list."""
    required: bool = False
    nullable: bool = False
    """Whether its type takes null; `describe` finds it out."""
    read_if: str = ""
    """Conditions joined by ``and``; where they do not hold, a changed option is an error."""
    resume: str = ""
    """REFUSED, FORM, LISTED or FREE."""
    evaluation: str = ""
    """READ, UNREAD, or the option of `mssr eval` that takes its place."""
    first_values: bool | None = None
    """Whether the base model's responses or their scores depend on it, see `mssr.trainer.initial_values`."""
    own_keys: bool = False
    """Whether its value may have keys, which are not ours."""
    section: type | None = None


def option(default: Any, within: str = "", **facts: Any) -> Any:
    """The field of an option; the facts are those of `Option`."""
    facts.setdefault("own_keys", isinstance(default, dict))
    metadata = {"option": Option(default, within, **facts)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, **facts: Any) -> Any:
    """The field of a section, with facts for the options in it."""
    return field(default_factory=kind, metadata={"option": Option(section=kind, **facts)})


@functools.cache
def describe(kind: type, prefix: str = "", above: Option | None = None) -> dict[str, Option]:
    """Options and sections of a config class by dotted key, in order, with what their sections say of them.

    Of a section's class: the prefix of its keys, "reward.", and the section itself, which is above them.
    """
    outer = above or Option(resume=LISTED, evaluation=READ, first_values=False)
    found: dict[str, Option] = {}
    for f in fields(kind):
        key, own = prefix + f.name, f.metadata["option"]
        conditions = [*outer.read_if.split(" and "), *own.read_if.split(" and ")]
        full = replace(
            own,
            nullable="None" in str(f.type),
            # What decides about a whole section may be an option in it.
            read_if=" and ".join(c for c in conditions if c and not c.startswith(f"{key} ")),
            resume=own.resume or outer.resume,
            evaluation=own.evaluation or outer.evaluation,
            first_values=outer.first_values if own.first_values is None else own.first_values,
        )
        found[key] = full
        if own.section:
            found |= describe(own.section, f"{key}.", full)
    return found


def nearest(known: Mapping[str, Option], key: str) -> Option | None:
    """The option of a key, or what the key lies in; None for a key of no section."""
    while key and key not in known:
        key = key.rpartition(".")[0]
    return known.get(key)


def values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value of every option of a config, or of a section and the prefix of its keys."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from values(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def check_values(config: Any, prefix: str = "") -> None:
    """Refuse values that an option of a config, or of a section and the prefix of its keys, cannot have.

    Raises:
        UserError: names the key, the value and what it must be.
    """
    known = describe(config.__class__, prefix)
    for key, value in values(config, prefix):
        if known[key].required and not value:
            raise UserError(f"{key} is not set")
        listed = isinstance(value, list)
        for one in value if listed else [value]:
            if one is not None and (complaint := _complaint(one, known[key])):
                off = ", or be null" if known[key].nullable else ""
                raise UserError(f"{key}{': ' if listed else '='}{in_yaml(one)} must {complaint}{off}")


def _complaint(value: Any, about: Option) -> str:
    """What a value that is not null must be, if it is not."""
    if about.choices and value not in about.choices.split(", "):
        return f"be one of {about.choices}"
    if " or " in about.within:
        return "" if str(value) in about.within.split(" or ") else f"be {about.within}"
    bounds = [tuple(bound.split()) for bound in about.within.split(" and ") if bound]
    interval = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", about.within)
    if interval:
        left, low, high, right = interval.groups()
        bounds = [(">=" if left == "[" else ">", low), ("<=" if right == "]" else "<", high)]
    for sign, limit in bounds:
        if not _COMPARE[sign](value, float(limit)):  # NaN fails too
            if interval:
                return f"lie in {about.within}"
            return "not be negative" if (sign, limit) == (">=", "0") else f"be {_WORDS[sign]} {limit}"
    return ""


_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_WORDS = {">": "greater than", ">=": "at least", "<": "below", "<=": "at most"}


def check_read(config: Any, prefix: str = "", meant: Mapping[str, Any] | None = None) -> None:
    """Refuse a changed option that nothing reads: it would mislead.

    Args:
        config, prefix: as of `check_values`.
        meant: what options that may be null mean, by key.

    Raises:
        UserError: names the option, and the settings that keep it from being read.
    """
    known, given = describe(config.__class__, prefix), dict(values(config, prefix))
    effective = given | dict(meant or {})
    for key, value in given.items():
        conditions = known[key].read_if.split(" and ") if value != known[key].default else []
        for condition in filter(None, conditions):
            if unmet := _unmet(condition, key, effective):
                settings = " and ".join(
                    f"{k}={in_yaml(effective[k])}"
                    + ("" if given[k] == effective[k] else " (as null means here)")
                    for k in unmet
                )
                raise UserError(
                    f"{key}={in_yaml(value)} is read by nothing with {settings}; change that or remove it"
                )


def _unmet(condition: str, key: str, effective: Mapping[str, Any]) -> list[str]:
    """Keys of the settings that keep a condition from holding; none if it holds."""
    section, _, name = key.rpartition(".")
    settings = []
    for alternative in condition.split(" or "):
        setting, relation, wanted = alternative.split(" ", 2)
        setting = neighbour if (neighbour := f"{section}.{setting}") in effective else setting
        value = effective[setting]
        if relation == "takes" and setting == "algorithm.name":
            keys = {"baseline": "baseline.name", "normalisation": "normalisation"}
            chosen = {k: effective[f"algorithm.{v}"] for k, v in keys.items()}
            holds = name in algorithms.options(value, chosen)
        elif relation == "takes":
            holds = name in algorithms.policy_losses.loss_options(value)  # needs torch
        elif relation == "has":
            names = list(map(str, value)) if isinstance(value, list) else [str(value)]
            is_rule = any(not is_spec(one) and one not in ("judge", "remote") for one in names)
            holds = {"rule": is_rule, "several": len(names) > 1}.get(wanted, wanted in names)
        else:
            holds = (value == yaml.safe_load(wanted)) == (relation == "=")
        if holds:
            return []
        settings.append(setting)
    return settings


def in_yaml(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
