"""The glossary: complete, of options that there are, and what docs/metrics.md is made from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mssr.config.options import describe
from mssr.config.run import Config
from mssr.runs import glossary

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    assert page == glossary.reference(), "run python -m mssr.runs.glossary > docs/metrics.md"


def test_the_first_line_that_fits_counts() -> None:
    found = [glossary.find(key) for key in ("val/accuracy", "val/mmk12/accuracy", "val/format", "nothing")]
    assert [m and m.key for m in found] == ["val/accuracy", "val/*/accuracy", "val/*", None]


def test_every_line_is_complete_and_names_options_and_metrics_that_there_are() -> None:
    options = describe(Config)
    for m in glossary.metrics():
        assert all((m.group, m.key, m.unit, m.meaning, m.normal, m.otherwise)), m.key
        for name in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=\w+)?`", m.meaning + m.normal + m.otherwise):
            assert name in options, f"{m.key}: {name} is no option"
        for key in re.findall(r"`(\w+/\w+)`", m.meaning + m.normal + m.otherwise):
            assert glossary.find(key), f"{m.key}: {key} is no metric"


def test_keys_that_stand_in_the_code_are_explained() -> None:
    """Those that no test run writes, of GPUs for example; those of runs: tests/conftest.py."""
    text = "\n".join(path.read_text() for path in (ROOT / "mssr").rglob("*.py"))
    keys = set(re.findall(r'"((?:policy|rollout|sampler|perf|memory|watch|baseline|shaping)/[a-z_]+)"', text))
    assert len(keys) > 40
    assert not {key for key in keys if (m := glossary.find(key)) is None or m.key == "policy/*"}


def test_metrics_that_the_docs_name_are_explained() -> None:
    spaces = {m.key.partition("/")[0] for m in glossary.metrics() if "/" in m.key}
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    keys = {key for key in re.findall(r"`([a-z]+/\w+)`", text) if key.partition("/")[0] in spaces}
    of_others = {"perf/throughput"}  # EasyR1's
    modules = {key for key in keys if (ROOT / "mssr" / f"{key}.py").exists()}
    found = {key: glossary.find(key) for key in keys - of_others - modules}
    assert len(found) > 60
    assert not {key for key, metric in found.items() if metric is None or metric.key == "policy/*"}
