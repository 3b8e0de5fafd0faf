"""mssr/tools/errors.txt has the errors that the code makes, no more and no less; it makes docs/errors.md."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator

import pytest

from mssr.config.options import describe
from mssr.config.run import Config
from mssr.tools import errors
from mssr.tools.cli import main
from tests.unit.error_messages import ROOT, Module

pytestmark = pytest.mark.unit

PASSED_ON = {
    "mssr/actor/initial_weights.py: problem[0]",
    "mssr/cluster/faults.py: str(failure)",
    "mssr/data/images.py: reason(error)",
    "mssr/data/index.py: reason(error)",
    "mssr/data/tables.py: cells",
    "mssr/rewards/endpoint.py: f'{self.url}: {type(error).__name__}: {error}'.splitlines()[0]",
    "mssr/rollout/checksums.py: loaded.interrupted",
    "mssr/tools/doctor.py: str(error.cause)",
    "mssr/tools/gpu_checks.py: (err or out).strip().rpartition('\\n')[2].strip()"
    " or f'exit code {child.returncode}'",
}
"""Errors whose whole text is that of another one, or of another program."""
QUOTED = re.compile(r"(\{\}:? )*\{\}")
"""Another error behind what it is about."""


def _messages() -> Iterator[tuple[str, str]]:
    """What each error of the code may say, ``{}`` being what varies, and where it is made."""
    for folder in ("mssr", "scripts/study"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for line, said in Module(path).messages():
                if isinstance(said, ast.expr):
                    text = ast.unparse(said)
                    assert f"{name}: {text}" in PASSED_ON, f"{name}:{line}: no text in {text}"
                else:
                    yield from ((text, f"{name}:{line}") for text in said if not QUOTED.fullmatch(text))


def _form(entry: errors.Entry) -> re.Pattern[str]:
    """Of the messages in the code that an entry is about."""
    names = {"{...}": ".*"}
    parts = re.split(f"({errors.NAME.pattern})", entry.message)
    return re.compile(
        "".join(names.get(p, r"(\{\})+") if i % 2 else re.escape(p) for i, p in enumerate(parts))
    )


def test_every_error_is_in_the_list_once_and_no_other() -> None:
    forms = {entry: _form(entry) for entry in errors.entries()}
    used: set[errors.Entry] = set()
    wrong = []
    for text, where in _messages():
        found = [entry for entry, form in forms.items() if form.fullmatch(text)]
        used.update(found)
        if len(found) != 1:
            wrong.append(f"{where}: {text!r} is there {len(found)} times")
    wrong += [f"no error says {entry.message!r}" for entry in forms if entry not in used]
    assert not wrong, "mssr/tools/errors.txt:\n" + "\n".join(wrong)


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    assert page == errors.reference(), "run python -m mssr.tools.errors > docs/errors.md"


def test_cause_and_cure_name_options_that_there_are() -> None:
    options = describe(Config)
    of_options = "|".join(key for key in options if "." not in key)
    for entry in errors.entries():
        names = re.findall(rf"`((?:{of_options})\.[\w.]+)(?:=[^`]*)?`", entry.cause + entry.cure)
        unknown = {n for n in names if n not in options and not n.endswith((".options", ".yaml", ".py"))}
        assert entry.group == "In verl" or not unknown, entry.message


@pytest.mark.parametrize(
    ("message", "fits"),
    [
        ("mssr: error: data file a: b.parquet does not exist", ["data file {path} does not exist"]),
        (
            "a.csv row 1: image 0 cannot be read (it is empty); 1 of 8 rows are bad, listed in run/bad.jsonl"
            " (data.max_bad_fraction allows some)",
            ["{row}: {reason}; {bad} of", "image {number} cannot be read", "it is empty"],
        ),
        ("algorithm.name=mssr: clip_low must be in [0, 1], not 2", ["clip_low must be in [0, {limit}], not"]),
        ("rollout.lag=2 must be 0 or 1", ["{key}{is}{value} must {...}"]),
        ("Traceback (most recent call last):", []),
    ],
)
def test_a_message_is_found_with_those_that_it_quotes(message: str, fits: list[str]) -> None:
    found = errors.find(message)
    assert len(found) == len(fits)
    assert all(entry.message.startswith(start) for entry, start in zip(found, fits, strict=True))


def test_explain_reads_a_message_or_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["explain", "data", "a.json", "has", "no", "rows"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("data {name} has no rows\n  why: ") and "\n  do:  " in said
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("step 1: died (x)\nmssr: error: --nodes 0 must be at least 1\n")
    )
    assert main(["explain"]) == 0
    assert capsys.readouterr().out.startswith("--nodes {nodes} must be at least 1\n")
    assert main(["explain", "that is something else"]) == 2
    assert errors.find(capsys.readouterr().err.strip())
