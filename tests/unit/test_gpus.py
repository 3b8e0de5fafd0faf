"""Kinds of GPU by the names of drivers and people."""

from __future__ import annotations

import pytest

from mssr.errors import UserError
from mssr.models.gpus import KINDS, find, parse

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe-80GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA H200 NVL", "H200-NVL-141GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090-24GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10M", None),
        ("", None),
    ],
)
def test_device_names(device_name: str, name: str | None) -> None:
    """A peak that is not the device's would make every MFU wrong, so what is not known is not guessed."""
    kind = find(device_name)
    assert (None if kind is None else kind.name) == name


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xH100-80GB", 8, "H100-80GB"),
        ("h100", 1, "H100-80GB"),
        ("4 x RTX 4090", 4, "RTX-4090-24GB"),
        ("2xh100_pcie", 2, "H100-PCIe-80GB"),
        ("A100-40GB", 1, "A100-40GB"),
    ],
)
def test_what_people_write(text: str, count: int, name: str) -> None:
    assert parse(text) == (count, KINDS[name])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8xA100", "A100-80GB or A100-40GB"),
        ("8xH1000-80GB", "no GPU is called 'H1000-80GB', did you mean 'H100-80GB'"),
        ("0xH100", "at least 1"),
        ("", "no GPU is called ''"),
    ],
)
def test_what_is_no_gpu_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(text)


def test_the_table_is_in_one_unit() -> None:
    """A row with a factor of a thousand missing would stand out by these."""
    for kind in KINDS.values():
        named = int(kind.name.rpartition("-")[2].removesuffix("GB"))
        assert 0.89 < kind.memory_bytes / 2**30 / named < 1.0, kind.name
        assert kind.bf16_flops is None or 5e13 < kind.bf16_flops < 3e15, kind.name
        assert 2e11 < kind.bandwidth < 1e13 and 1e10 < kind.link <= 9e11, kind.name
