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
COLUMNS = "| key | default | values | meaning | read with | on resume | `mssr eval` |\n" + "| --- " * 7 + "|"


def reference() -> str:
    """The page: a table a section."""
    known = describe(Config)
    lines = [HEAD]
    for name, kind in {"": Config, **{key: o.section for key, o in known.items() if o.section}}.items():
        own = {k: o for k, o in known.items() if k.rpartition(".")[0] == name and not o.section}
        if own:
            meanings = _docstrings(kind)
            lines += [f"## {name or 'Top'}", "", inspect.cleandoc(kind.__doc__ or ""), "", COLUMNS]
            lines += [*(_row(key, o, meanings[key.rpartition(".")[2]]) for key, o in own.items()), ""]
    return "\n".join(lines)


def _row(key: str, about: Option, meaning: str) -> str:
    default = "required" if about.required else f"`{in_yaml(about.default)}`"
    values, conditions = (
        f"`{text}`" if text else "" for text in (about.within or about.choices, about.read_if)
    )
    meaning = meaning.replace("|", "\\|").replace("<", "&lt;")
    cells = (f"`{key}`", default, values, meaning, conditions, about.resume, about.evaluation)
    return f"| {' | '.join(cells)} |"


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
