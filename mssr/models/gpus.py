"""Kinds of GPU: what they can do and hold, by the names that drivers and people give them.

Operations, memory bandwidth and links are those of NVIDIA's data sheets; of the GeForce and RTX boards, of
the white papers of their architectures. Operations are dense, which is half of what data sheets print beside
"with sparsity", and with float32 sums. Memory is what torch reports as total, less than the name says: error
correction and the driver take some.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mssr.errors import UserError, did_you_mean


@dataclass(frozen=True, slots=True)
class GpuKind:
    """One kind. Example: ``GpuKind("L4-24GB", "L4", 121e12, 23622320128, 0.3e12, 32e9)``"""

    name: str
    device_name: str
    """Regular expression for all that NVML and torch may call it, "NVIDIA" and the like left out."""
    bf16_flops: float | None
    """bfloat16 operations a second, dense; None where it has none (before Ampere)."""
    memory_bytes: int
    bandwidth: float
    """Of its memory, B/s."""
    link: float
    """To other GPUs of the machine, B/s in each direction: NVLink, or PCIe where that is all."""


_NVLINK3, _NVLINK4, _NVLINK5, _BRIDGE, _PCIE4, _PCIE5 = 300.0, 450.0, 900.0, 56.0, 32.0, 64.0
# name, device name, bfloat16 TFLOP/s, memory GiB, its TB/s, link GB/s
_TABLE: tuple[tuple[str, str, float | None, float, float, float], ...] = (
    ("GB200-186GB", r"GB200", 2500, 184.0, 8.0, _NVLINK5),
    ("B200-180GB", r"B200", 2250, 178.3, 8.0, _NVLINK5),
    ("GH200-96GB", r"GH200 480GB", 989.4, 94.5, 4.0, _NVLINK4),
    ("H200-141GB", r"H200", 989.4, 139.8, 4.8, _NVLINK4),
    ("H200-NVL-141GB", r"H200 NVL", 835.5, 139.8, 4.8, _NVLINK4),
    ("H100-80GB", r"H100 80GB HBM3", 989.4, 79.1, 3.35, _NVLINK4),
    ("H100-PCIe-80GB", r"H100 PCIe", 756.0, 79.1, 2.0, _PCIE5),
    ("H100-NVL-94GB", r"H100 NVL", 835.5, 93.1, 3.9, 300.0),
    ("H800-80GB", r"H800", 989.4, 79.1, 3.35, 200.0),
    ("H20-96GB", r"H20", 148.0, 95.0, 4.0, _NVLINK4),
    ("A100-80GB", r"A100-SXM4-80GB", 312.0, 79.1, 2.039, _NVLINK3),
    ("A100-PCIe-80GB", r"A100 80GB PCIe", 312.0, 79.1, 1.935, _PCIE4),
    ("A100-40GB", r"A100-SXM4-40GB", 312.0, 39.4, 1.555, _NVLINK3),
    ("A100-PCIe-40GB", r"A100-PCIE-40GB", 312.0, 39.4, 1.555, _PCIE4),
    ("A800-80GB", r"A800-SXM4-80GB", 312.0, 79.1, 2.039, 200.0),
    ("A30-24GB", r"A30", 165.0, 23.5, 0.933, _PCIE4),
    ("A40-48GB", r"A40", 149.7, 44.4, 0.696, _PCIE4),
    ("A10-24GB", r"A10", 125.0, 22.0, 0.6, _PCIE4),
    ("A10G-24GB", r"A10G", 70.0, 22.0, 0.6, _PCIE4),
    ("L40S-48GB", r"L40S", 362.1, 44.4, 0.864, _PCIE4),
    ("L40-48GB", r"L40", 181.1, 44.4, 0.864, _PCIE4),
    ("L4-24GB", r"L4", 121.0, 22.0, 0.3, _PCIE4),
    ("RTX-PRO-6000-96GB", r"RTX PRO 6000 Blackwell .+ Edition", 503.8, 94.9, 1.792, _PCIE5),
    ("RTX-6000-Ada-48GB", r"RTX 6000 Ada Generation", 364.2, 47.4, 0.96, _PCIE4),
    ("RTX-A6000-48GB", r"RTX A6000", 154.8, 47.4, 0.768, _BRIDGE),
    ("RTX-5090-32GB", r"RTX 5090", 209.5, 31.3, 1.792, _PCIE5),
    ("RTX-4090-24GB", r"RTX 4090", 165.2, 23.5, 1.008, _PCIE4),
    ("RTX-3090-24GB", r"RTX 3090", 71.0, 23.6, 0.936, _BRIDGE),
    ("V100-32GB", r"V100-(SXM2|SXM3|PCIE)-32GB.*", None, 31.7, 0.9, 150.0),
    ("V100-16GB", r"V100-(SXM2|PCIE)-16GB", None, 15.8, 0.9, 150.0),
    ("T4-16GB", r"T4", None, 14.6, 0.32, 16.0),
)
KINDS = {
    name: GpuKind(name, device, tera and tera * 1e12, int(gib * 2**30), tb * 1e12, gb * 1e9)
    for name, device, tera, gib, tb, gb in _TABLE
}


def find(device_name: str) -> GpuKind | None:
    """The kind that NVML or torch calls so; None for one that is not known for sure: a laptop's board or a
    part of a GPU (MIG) shares most of its name with another that can do more."""
    short = re.sub(r"^(NVIDIA |Tesla |GeForce |Quadro )+", "", device_name.strip())
    return next((kind for kind in KINDS.values() if re.fullmatch(kind.device_name, short)), None)


def parse(text: str) -> tuple[int, GpuKind]:
    """Number and kind that people mean by "8xH100-80GB" or "RTX 4090"; the memory may be left out where only
    one kind has that name.

    Raises:
        UserError: there is no such kind, or there are several.
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX×*]\s*)?(.*?)\s*", text)
    assert match is not None
    count, name = int(match[1] or 1), match[2]
    if kind := next((k for k in KINDS.values() if _plain(k.name) == _plain(name)), None):
        found = [kind]
    else:
        found = [k for k in KINDS.values() if _plain(k.name.rpartition("-")[0]) == _plain(name)]
    if not found:
        known = ", ".join(KINDS)
        raise UserError(f"{text!r}: no GPU is called {name!r}{did_you_mean(name, KINDS)}; known: {known}")
    if len(found) > 1:
        raise UserError(f"{text!r} may be {' or '.join(k.name for k in found)}; say which")
    if count < 1:
        raise UserError(f"{text!r}: the number of GPUs must be at least 1")
    return count, found[0]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
