"""Reward functions: the rules, and a user's in all their forms, told from the names of their parameters.

A user's function is named ``path/to/file.py:function``; docs/rewards.md has the table of what a parameter of
which name gets, and what may be returned. The function is called in any order and in several processes, so it
must not depend on earlier calls. Each process loads its file.

If the response's name is in the plural, the function takes a batch: it gets a list for every parameter and
returns as many scores. ``completions`` are as TRL has them: a column goes before another meaning of its name,
``**`` gets the other columns, and where questions are message lists, responses are. Other names are options,
which ``reward.options`` sets; it may also set a name that is neither response nor answer. Nothing is guessed,
but that two names of which none is known are the response and the answer.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from mssr.algorithms import plugins
from mssr.errors import UserError, did_you_mean
from mssr.rewards.base import NONE, Outcome, RewardInput, as_result
from mssr.rewards.rows import NO_ROWS, RowAccess, RowView
from mssr.rewards.rules import RULES, score

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig

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
    "data_source": RowView.data_source,
    "extra_info": RowView.extra_info,
}
_OF_TRL: Mapping[str, Getter] = {
    "prompts": lambda view: view.conversation() or view.question(),
    "completions": lambda view: (
        [{"role": "assistant", "content": view.item.response}] if view.conversation() else view.item.response
    ),
}


_OF_RULE: tuple[Getter, ...] = (lambda view: view.item.whole, lambda view: view.answer_text())


@dataclass(frozen=True)
class LoadedReward:
    """A reward function as the pool calls it, and what it is given."""

    function: Callable[..., Any]
    """With its options bound."""
    batch: bool
    """Whether it takes several items and gives a list."""
    positional: tuple[Getter, ...] = ()
    named: Mapping[str, Getter] = field(default_factory=dict)
    options: Mapping[str, bool] = field(default_factory=dict)
    """Names that ``reward.options`` may set -> whether it must; ``**`` stands for any."""
    sized: bool = False
    """Whether it asks for the resized sizes of images."""
    note: str = ""
    """What was taken for what."""
    access: RowAccess = NO_ROWS
    """Where the rows are, if it asks for something of them."""
    may_be_none: bool = False
    """Whether None says that there is no score, as in TRL; else it is an error like other things."""

    @property
    def is_async(self) -> bool:
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))  # an object's call

    def call(self, items: Sequence[RewardInput]) -> list[Outcome]:
        """Score items; whatever the function raises comes through.

        Raises:
            TypeError, ValueError: it returned something that is no score, or not as many as items.
        """
        if not self.batch and len(items) != 1:
            return [outcome for item in items for outcome in self.call([item])]
        value = self.ask(items)
        if inspect.isawaitable(value):
            value = self.loop.run_until_complete(value)
        if not self.batch:
            return [self.result(value)]
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise TypeError(f"a reward of many responses must return a list, not {value!r:.100}")
        results = [self.result(v) for v in value]
        if len(results) != len(items):
            raise ValueError(f"{len(results)} scores were returned for {len(items)} responses")
        return results

    def result(self, value: object) -> Outcome:
        """What a value that was returned for one response means; raises as `as_result`."""
        return NONE if value is None and self.may_be_none else as_result(value)

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The only one of this process: a user's client may be bound to it."""
        return asyncio.new_event_loop()

    def ask(self, items: Sequence[RewardInput]) -> Any:
        """What the function itself returns for items (one unless ``batch``), unchecked; of an async one a
        coroutine."""
        views = [RowView(item, self.access) for item in items]

        def values(get: Getter) -> Any:
            return [get(view) for view in views] if self.batch else get(views[0])

        named = {name: values(get) for name, get in self.named.items()}
        return self.function(*map(values, self.positional), **named)


def load(config: RewardConfig, access: RowAccess | None = NO_ROWS) -> LoadedReward:
    """The reward that ``config.name``, a single one, and ``config.options`` mean.

    Args:
        access: the rows that there are; None if that is not known yet, when any name may be a column's.

    Raises:
        UserError: no such name, file or function; the file does not run; the function takes other
            arguments, or not these options.
    """
    name, options = config.name, config.options
    if plugins.is_spec(name):
        function = plugins.load(name, "reward", noun="function")
        path, _, attribute = name.rpartition(":")
        if not callable(function):
            raise UserError(f"reward {name!r}: {path} has no function {attribute!r}")
        try:
            reward = bind(function, options, access)
        except ValueError as error:
            raise UserError(f"reward {name!r}: {attribute} {error}") from None
        known = reward.options
    elif name in RULES:
        rule = functools.partial(score, name, format=config.format, format_weight=config.format_weight)
        reward = LoadedReward(rule, False, _OF_RULE)
        known = dict.fromkeys([*inspect.signature(RULES[name]).parameters][2:], False)
    else:
        raise UserError(
            f"reward.name: unknown reward {name!r}{did_you_mean(name, RULES)}: one of {sorted(RULES)}, "
            "judge, remote or path/to/file.py:function"
        )
    for key in options:
        if key not in known and not ("**" in known and key.isidentifier()):
            names = ", ".join(k for k in known if k != "**") or "none"
            raise UserError(
                f"reward.options.{key} is no option of {name} (it takes {names}){did_you_mean(key, known)}"
            )
    if missing := [n for n, required in known.items() if required and n not in options]:
        hint = " or have a column of that name" if access is not None and access.sources else ""
        raise UserError(
            f"reward {name!r}: {attribute} needs {', '.join(missing)}; set reward.options.{missing[0]}{hint}"
        )
    return replace(reward, function=functools.partial(reward.function, **options))


def bind(function: Callable[..., Any], options: Mapping[str, Any], access: RowAccess | None) -> LoadedReward:
    """A function with what it is given, told from its signature.

    Args:
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
        given = _MEANINGS["response"], _MEANINGS["answer"]
        return LoadedReward(function, False, given, options=settable)
    columns = (access or NO_ROWS).columns
    meanings, batch, note = _meanings(parameters, options, columns)
    getters: dict[str, Getter] = {}
    if "completions" in meanings:  # TRL's for tables and metrics: a dict with parts does that here
        unheard = {name: _ignore for name in ("log_extra", "log_metric") if name in parameters}
        function = functools.partial(function, **unheard)
        parameters = {name: p for name, p in parameters.items() if name not in unheard}
    for name, parameter in parameters.items():
        getter = _getter(name, meanings, batch, access or NO_ROWS)
        if getter is not None and (name not in options or getter in _OF_ITEM.values()):
            getters[name] = getter
        elif access is not None or parameter.default is not Parameter.empty or name in options:
            settable[name] = parameter.default is Parameter.empty
    # (Without access, a name without a default may be that of a column.)
    if "completions" in meanings and "**" in settable and access is not None:
        left_out = {access.config.images_column, "prompt", "completion"}
        rest = (columns or {"answer"}) - getters.keys() - options.keys() - left_out
        getters |= {name: _column(name) for name in sorted(rest)}
    of_row = {n for n, getter in getters.items() if getter not in _OF_ITEM.values()}
    of_images = {meanings[n] for n in of_row if meanings.get(n) in _OF_IMAGES}
    if of_images and access is not None and not access.sources:
        raise ValueError(f"asks for {', '.join(sorted(of_images))}, and there are no rows here")
    first = [n for n, p in parameters.items() if p.kind is Parameter.POSITIONAL_ONLY and n in getters]
    return LoadedReward(
        function,
        batch,
        positional=tuple(getters.pop(n) for n in first),
        named=getters,
        options=settable,
        sized=bool(of_images & {"row", "resized_image_sizes"}),
        note=note,
        access=access if access and of_row else NO_ROWS,
        may_be_none="completions" in meanings,
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
            f"names for these (docs/rewards.md), not ({', '.join(parameters)})"
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
    config = access.config
    read_anyway = {config.answer_column, config.problem_column, config.images_column}
    if (trl or several) and name in access.columns - read_anyway:
        return _column(name)
    if trl and name in _OF_TRL:
        return _OF_TRL[name]
    plural = name == meaning + "s" and meaning not in _OF_IMAGES
    if plural and not batch:
        if name in access.columns:
            return _column(name)
        raise ValueError(f"takes one response and many {name}; call it {meaning}")
    return _MEANINGS[meaning]


def _ignore(*_: Any) -> None: ...


def _column(name: str) -> Getter:
    return lambda row: row.column(name)
