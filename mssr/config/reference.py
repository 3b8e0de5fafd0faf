"""docs/config.md from the fields of the config: ``python -m mssr.config.reference > docs/config.md``."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise

from mssr.config.options import Option, describe, in_yaml
from mssr.config.run import Config

HEAD = """# Every option

Written by `python -m mssr.config.reference > docs/config.md` from the fields of
[`mssr/config`](../mssr/config), which the checks read too.

`null` leaves a value to the method, or turns off. *Read with*: the settings without which nothing reads the
option; to change it is then an error. *On resume*: **refused**, because the state would mean something else
(unless `trainer.resume_force=true`), or also when forced, because it is made of other tensors; **listed**,
because it changes the course of the run; **free**. *`mssr eval`*: reads it or not, or has an option for it.
"""


def reference() -> str:
    """The page: a table a section."""
    lines = [HEAD]
    sections = {key: about.section for key, about in describe(Config).items() if about.section}
    for name, kind in {"": Config, **sections}.items():
        assert kind is not None
        meanings = _docstrings(kind)
        own = {
            key: o for key, o in describe(Config).items() if key.rpartition(".")[0] == name and not o.section
        }
        if own:
            lines += [f"## {name or 'Top'}", "", inspect.cleandoc(kind.__doc__ or ""), ""]
            lines += ["| key | default | meaning | read with | on resume | `mssr eval` |", "| --- " * 6 + "|"]
            lines += [_row(key, meanings[key.rpartition(".")[2]], option) for key, option in own.items()]
            lines += [""]
    return "\n".join(lines)


def _row(key: str, meaning: str, about: Option) -> str:
    if about.within:
        meaning += f" Range: `{about.within}`."
    if about.choices:
        meaning += f" Choices: {', '.join(f'`{choice}`' for choice in about.choices.split(', '))}."
    meaning = meaning.replace("|", "\\|").replace("<", "&lt;")
    default = "required" if about.required else f"`{in_yaml(about.default)}`"
    conditions = " and ".join(
        f"`{c}`" for c in about.read_if.split(" and ") if c and not c.startswith(f"{key} ")
    )
    cells = (f"`{key}`", default, meaning, conditions, about.resume, about.evaluation)
    return "| " + " | ".join(cells) + " |"


def _docstrings(kind: type) -> dict[str, str]:
    """What stands under each field, on one line."""
    [definition] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


if __name__ == "__main__":
    print(reference(), end="")
