"""What a user's reward function is given, told from the names of its parameters: the table in docs/data.md.

If the response's name is in the plural, the function takes a batch: it gets a list for every parameter and
returns as many scores. ``completions`` are as TRL has them: a column goes before another meaning of its name,
``**`` gets the other columns, and where questions are message lists, responses are. Other names are options,
which ``reward.options`` sets; it may also set a name that is neither response nor answer. Nothing is guessed,
but that two names of which none is known are the response and the answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

from mssr.rewards.rows import NO_ROWS, RowAccess, RowView

RESPONSE = ("response", "completion", "solution_str", "predict_str")
RESPONSE_ELSE = ("predict", "prediction", "pred", "output", "text")
"""Understood where none of the others is there, and no column or option is called so."""
ANSWER = ("answer", "ground_truth", "solution", "truth")
ANSWER_ELSE = ("gt", "label", "target", "reference")
"""Likewise."""

_RESPONSES = {*RESPONSE, *RESPONSE_ELSE, "reward_input"}

Getter = Callable[[RowView], Any]
_OF_ITEM: Mapping[str, Getter] = {
    **dict.fromkeys((*RESPONSE, *RESPONSE_ELSE), lambda view: view.item.response),
    **dict.fromkeys((*ANSWER, *ANSWER_ELSE), lambda view: view.item.answer),
    "response_length": lambda view: view.item.response_length,
    "reward_input": lambda view: {
        "response": view.item.response,
        "response_length": view.item.response_length,
        "ground_truth": view.item.answer,
    },
}
_OF_IMAGES: Mapping[str, Getter] = {
    "images": RowView.images,
    "image_sizes": RowView.image_sizes,
    "resized_image_sizes": RowView.resized_image_sizes,
    "row": lambda view: {
        "image_sizes": view.image_sizes(),
        "resized_image_sizes": view.resized_image_sizes(),
        **view.cells,
    },
}
_MEANINGS: Mapping[str, Getter] = {
    **_OF_ITEM,
    **_OF_IMAGES,
    **dict.fromkeys(("prompt", "problem", "question"), RowView.question),
    "data_source": lambda view: view.cells.get("data_source", view.source_name()),
    "extra_info": lambda view: view.cells.get("extra_info", {}),
}
_OF_TRL: Mapping[str, Getter] = {
    "prompts": lambda view: view.conversation() or view.question(),
    "completions": lambda view: (
        [{"role": "assistant", "content": view.item.response}] if view.conversation() else view.item.response
    ),
}


@dataclass(frozen=True)
class Binding:
    """How a function is called."""

    batch: bool
    positional: tuple[Getter, ...] = ()
    named: Mapping[str, Getter] = field(default_factory=dict)
    options: Mapping[str, bool] = field(default_factory=dict)
    """Names that ``reward.options`` may set -> whether it must; ``**`` stands for any."""
    rows: bool = False
    """Whether it asks for something of the row."""
    sized: bool = False
    """Whether it asks for the resized sizes of images."""
    note: str = ""
    """What was taken for what."""


def bind(function: Callable[..., Any], options: Mapping[str, Any], access: RowAccess | None) -> Binding:
    """What the function is given.

    Args:
        options: ``reward.options``.
        access: the rows; None where it is not known yet which columns there are.

    Raises:
        ValueError: its parameters are not understood; the message goes on after the function's name.
    """
    try:
        every = inspect.signature(function).parameters
    except ValueError:  # a builtin without
        every = inspect.signature(lambda *arguments, **options: None).parameters
    variadic = {p.kind for p in every.values()} & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    parameters = {n: p for n, p in every.items() if p.kind not in variadic}
    settable = {"**": False} if Parameter.VAR_KEYWORD in variadic else {}
    if not parameters and Parameter.VAR_POSITIONAL in variadic:
        return Binding(False, (_MEANINGS["response"], _MEANINGS["answer"]), options=settable)
    columns = (access or NO_ROWS).columns
    meanings, batch, note = _meanings(parameters, options, columns)
    getters: dict[str, Getter] = {}
    for name, parameter in parameters.items():
        getter = _getter(name, meanings, batch, access or NO_ROWS)
        if getter is not None and (name not in options or getter in _OF_ITEM.values()):
            getters[name] = getter
        elif access is not None or parameter.default is not Parameter.empty or name in options:
            settable[name] = parameter.default is Parameter.empty
    # (Without access, a name without a default may be that of a column.)
    if "completions" in meanings and "**" in settable and access is not None:
        left_out = {access.named("images_column"), "prompt", "completion"}
        rest = (columns or {"answer"}) - getters.keys() - options.keys() - left_out
        getters |= {name: _column(name) for name in sorted(rest)}
    of_row = {n for n, getter in getters.items() if getter not in _OF_ITEM.values()}
    of_images = {meanings[n] for n in of_row if meanings.get(n) in _OF_IMAGES}
    if of_images and access is not None and not access.sources:
        raise ValueError(f"asks for {', '.join(sorted(of_images))}, and there are no rows here")
    first = [n for n, p in parameters.items() if p.kind is Parameter.POSITIONAL_ONLY and n in getters]
    return Binding(
        batch=batch,
        positional=tuple(getters.pop(n) for n in first),
        named=getters,
        options=settable,
        rows=bool(of_row),
        sized=bool(of_images & {"row", "resized_image_sizes"}),
        note=note,
    )


def _meanings(
    parameters: Mapping[str, Parameter], options: Mapping[str, Any], columns: AbstractSet[str]
) -> tuple[dict[str, str], bool, str]:
    """What names stand for, in the singular; whether the response is in the plural; what is to be said."""
    meanings: dict[str, str] = {}
    for name in parameters:
        meaning = name if name in _MEANINGS else name.removesuffix("s")
        if meaning in _OF_ITEM or (meaning in _MEANINGS and name not in options):
            meanings[name] = meaning
    others = {*options, *columns}
    for known, understood_else in (RESPONSE, RESPONSE_ELSE), (ANSWER, ANSWER_ELSE):
        there = any(m in (*known, "reward_input") for m in meanings.values())
        for name in [n for n, m in meanings.items() if m in understood_else and (there or n in others)]:
            del meanings[name]
    responses = [n for n, m in meanings.items() if m in _RESPONSES]
    plural = {n.endswith("s") for n in responses}
    if len(plural) > 1:
        raise ValueError(f"takes both one response and many ({', '.join(responses)})")
    if responses:
        return meanings, plural.pop(), ""
    unknown = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind is not p.KEYWORD_ONLY and n not in meanings and n not in others
    ]
    if len(unknown) != 2 or set(meanings.values()) & {*ANSWER, *ANSWER_ELSE}:
        raise ValueError(
            "must take (response, answer), (responses, answers), (reward_input) or (reward_inputs), or other "
            f"names for these (docs/data.md), not ({', '.join(parameters)})"
        )
    first, second = unknown
    meanings |= {first: "response", second: "answer"}
    note = f"{first} is taken for the response and {second} for the answer, by their place"
    return meanings, first.endswith("s") and second.endswith("s"), note


def _getter(name: str, meanings: Mapping[str, str], batch: bool, access: RowAccess) -> Getter | None:
    """What a parameter gets; None if it is an option."""
    meaning = meanings.get(name)
    if meaning is None:
        return _column(name) if name in access.columns else None
    trl = "completions" in meanings
    several = meaning in ANSWER and sum(m in ANSWER for m in meanings.values()) > 1  # answer and solution
    if (trl or several) and name in access.columns - access.named_columns:
        return _column(name)
    if trl and name in _OF_TRL:
        return _OF_TRL[name]
    plural = name == meaning + "s" and meaning not in _OF_IMAGES
    if plural and not batch:
        if name in access.columns:
            return _column(name)
        raise ValueError(f"takes one response and many {name}; call it {meaning}")
    return _MEANINGS[meaning]


def _column(name: str) -> Getter:
    return lambda row: row.column(name)
