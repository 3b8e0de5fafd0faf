"""What a user's reward function is given, told from the names of its parameters.

===================================================  ====================================================
response, completion, solution_str, predict_str      the model's text
answer, ground_truth, solution, truth                the row's answer; what is no text stays as it is
prompt, problem, question                            the question
response_length                                      tokens of the response
data_source, extra_info                              their columns; else the source's name, an empty dict
row                                                  all columns, image_sizes and resized_image_sizes
images                                               PIL images in RGB, upright, in their original size
image_sizes, resized_image_sizes                     (width, height) of each, as stored and as the model sees
the name of a column                                 its cell
reward_input                                         EasyR1's dict of response, response_length, ground_truth
===================================================  ====================================================

If the response's name is in the plural, the function takes a batch: it gets a list for every parameter and
returns as many scores. ``completions`` are as TRL has them: a column goes before another meaning of its name,
``**`` gets the other columns, and where questions are message lists, responses are. Other names are options,
which ``reward.options`` sets; it may also set a name that is neither response nor answer. Nothing is guessed,
but that two names of which none is known are the response and the answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from mssr.rewards.base import RewardInput
from mssr.rewards.rows import RowAccess, RowReader, RowView

RESPONSE = ("response", "completion", "solution_str", "predict_str")
RESPONSE_ELSE = ("predict", "prediction", "pred", "output", "text")
"""Understood where none of the others is there, and no column or option is called so."""
ANSWER = ("answer", "ground_truth", "solution", "truth")
ANSWER_ELSE = ("gt", "label", "target", "reference")
"""Likewise."""
PROMPT = ("prompt", "problem", "question")

Getter = Callable[[RewardInput, RowView], Any]
_OF_ITEM: Mapping[str, Getter] = {
    **dict.fromkeys((*RESPONSE, *RESPONSE_ELSE), lambda item, row: item.response),
    **dict.fromkeys((*ANSWER, *ANSWER_ELSE), lambda item, row: item.answer),
    "response_length": lambda item, row: item.response_length,
    "reward_input": lambda item, row: {
        "response": item.response,
        "response_length": item.response_length,
        "ground_truth": item.answer,
    },
}
_OF_IMAGES: Mapping[str, Getter] = {
    "row": lambda item, row: row.row(),
    "images": lambda item, row: row.images(),
    "image_sizes": lambda item, row: row.image_sizes(),
    "resized_image_sizes": lambda item, row: row.resized_image_sizes(),
}
_OF_ROW: Mapping[str, Getter] = {
    **dict.fromkeys(PROMPT, lambda item, row: row.prompt()),
    "data_source": lambda item, row: row.data_source(),
    "extra_info": lambda item, row: row.extra_info(),
    **_OF_IMAGES,
}
_OF_TRL: Mapping[str, Getter] = {
    "completions": lambda item, row: row.completion(),
    "prompts": lambda item, row: row.messages(),
}


@dataclass(frozen=True)
class Binding:
    """How a function is called."""

    batch: bool
    positional: tuple[Getter, ...]
    named: Mapping[str, Getter]
    options: Mapping[str, bool]
    """Names that ``reward.options`` may set -> whether it must; ``**`` stands for any."""
    rows: bool = False
    """Whether it asks for something of the row."""
    sized: bool = False
    """Whether it asks for the resized sizes of images."""
    note: str = ""
    """What was taken for what."""

    def arguments(
        self, items: Sequence[RewardInput], reader: RowReader | None
    ) -> tuple[list[Any], dict[str, Any]]:
        """Of a call for some items; for one unless ``batch``."""
        views = [RowView(item, reader) for item in items]

        def values(get: Getter) -> Any:
            found = [get(item, view) for item, view in zip(items, views, strict=True)]
            return found if self.batch else found[0]

        named = {name: values(get) for name, get in self.named.items()}
        return [values(get) for get in self.positional], named


def bind(function: Callable[..., Any], options: Mapping[str, Any], access: RowAccess | None) -> Binding:
    """What the function is given.

    Args:
        options: ``reward.options``.
        access: the rows; None where it is not known yet which columns there are.

    Raises:
        ValueError: its parameters are not understood; the message goes on after the function's name.
    """
    every = inspect.signature(function).parameters
    variadic = {p.kind for p in every.values()} & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    parameters = {n: p for n, p in every.items() if p.kind not in variadic}
    columns = access.columns if access else frozenset[str]()
    if not parameters and Parameter.VAR_POSITIONAL in variadic:
        given = _OF_ITEM["response"], _OF_ITEM["answer"]
        return Binding(False, given, {}, {"**": False} if len(variadic) > 1 else {})
    meanings = {n: m for n in parameters if (m := _meaning(n)) and (m in _OF_ITEM or n not in options)}
    responses, note = _responses(every, parameters, meanings, {*options, *columns})
    batch = all(name.endswith("s") for name in responses)
    trl = "completions" in responses
    getters: dict[str, Getter] = {}
    settable: dict[str, bool] = {"**": False} if Parameter.VAR_KEYWORD in variadic else {}
    for name, parameter in parameters.items():
        getter = _getter(name, meanings.get(name), batch, trl, meanings, access)
        if getter is not None and (name not in options or getter in _OF_ITEM.values()):
            getters[name] = getter
        elif access is not None or parameter.default is not Parameter.empty or name in options:
            settable[name] = parameter.default is Parameter.empty
    # (Without access, a name without a default may be that of a column.)
    if trl and "**" in settable and access is not None:
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


def _meaning(name: str) -> str | None:
    """What a name stands for, in the singular."""
    for found in (name, name.removesuffix("s")):
        if found in _OF_ITEM or found in _OF_ROW:
            return found
    return None


def _responses(
    every: Mapping[str, Parameter],
    parameters: Mapping[str, Parameter],
    meanings: dict[str, str],
    others: set[str],
) -> tuple[list[str], str]:
    """The parameters that get the response, and what is to be said of them; `meanings` is completed.

    Args:
        others: names that are options or columns.
    """
    for known, understood_else in (RESPONSE, RESPONSE_ELSE), (ANSWER, ANSWER_ELSE):
        there = any(m in (*known, "reward_input") for m in meanings.values())
        for name in [n for n, m in meanings.items() if m in understood_else and (there or n in others)]:
            del meanings[name]
    responses = [n for n, m in meanings.items() if m in (*RESPONSE, *RESPONSE_ELSE, "reward_input")]
    if responses:
        if len({n.endswith("s") for n in responses}) > 1:
            raise ValueError(f"takes both one response and many ({', '.join(responses)})")
        return responses, ""
    unknown = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind is not p.KEYWORD_ONLY and n not in meanings and n not in others
    ]
    if len(unknown) != 2 or set(meanings.values()) & {*ANSWER, *ANSWER_ELSE}:
        raise ValueError(
            "must take (response, answer), (responses, answers), (reward_input) or (reward_inputs), or other "
            f"names for these (docs/data.md), not ({', '.join(every)})"
        )
    meanings |= zip(unknown, ("response", "answer"), strict=True)
    return unknown, f"{unknown[0]} is taken for the response and {unknown[1]} for the answer, by their place"


def _getter(
    name: str,
    meaning: str | None,
    batch: bool,
    trl: bool,
    meanings: Mapping[str, str],
    access: RowAccess | None,
) -> Getter | None:
    """What the parameter gets; None if it is an option."""
    if meaning is None:
        return _column(name) if access and name in access.columns else None
    several = meaning in ANSWER and sum(m in ANSWER for m in meanings.values()) > 1  # answer and solution
    if (trl or several) and access and name in access.columns - access.named_columns:
        return _column(name)
    if trl and name in _OF_TRL:
        return _OF_TRL[name]
    plural = name == meaning + "s" and meaning not in _OF_IMAGES
    if plural and not batch:
        if access and name in access.columns:
            return _column(name)
        raise ValueError(f"takes one response and many {name}; call it {meaning}")
    return _OF_ITEM.get(meaning) or _OF_ROW[meaning]


def _column(name: str) -> Getter:
    return lambda item, row: row.column(name)
