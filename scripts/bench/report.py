"""What the benchmarks share: arguments, clocks, memory, and the Markdown that each prints and keeps."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MIB, GIB = 2**20, 2**30


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of a benchmark, with ``--out``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write what is printed to this file")
    return parser


def publish(
    args: argparse.Namespace,
    measure: Callable[[], Sequence[str]],
    packages: str = "",
    append: bool = False,
    title: str = "",
) -> None:
    """Print what is measured below command, day and machine, and write it to ``--out``.

    Args:
        packages: whose versions are told, of those that are installed.
        append: to the file, in place of what it holds.
        title: above all of it.
    """
    before = os.getloadavg()[0]
    lines = measure()
    words = ["DIR" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = " ".join(["python", f"scripts/bench/{Path(sys.argv[0]).name}", *words])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = f"{os.cpu_count()} CPU cores, {memory / GIB:.0f} GiB, "
    if getattr(args, "device", "cpu") == "cuda":
        import torch

        machine += torch.cuda.get_device_name()
    else:
        machine += "no GPU"
    load = f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after"
    parts = [f"`{command}`", f"{datetime.date.today()}", machine, f"Python {platform.python_version()}"]
    for name in packages.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{name} {importlib.metadata.version(name)}")
    heading = [f"## {title}", ""] if title else []
    text = "\n".join([*heading, f"{', '.join(parts)}; {load}.", "", *lines, ""])
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a" if append else "w") as file:
            file.write(text + "\n" * append)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]


def timed(call: Callable[[], object], cuda: bool = False) -> tuple[float, float]:
    """Seconds, and seconds of CPU time, the device's work included."""
    synchronize(cuda)
    started, cpu = time.perf_counter(), time.process_time()
    call()
    synchronize(cuda)
    return time.perf_counter() - started, time.process_time() - cpu


def synchronize(cuda: bool) -> None:
    if cuda:
        import torch

        torch.cuda.synchronize()


def in_turn(
    sides: Mapping[str, Callable[[], object]], repeats: int, cuda: bool = False
) -> dict[str, np.ndarray]:
    """(repeats, 2): what `timed` says of rounds in which each has its turn, so all meet the same machine."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, call in sides.items():
            measured = timed(call, cuda)
            if number:  # the first warms up
                found[name].append(measured)
            print(f"round {number}, {name}: {measured[0]:.2f} s", file=sys.stderr, flush=True)
    return {name: np.array(measured) for name, measured in found.items()}


def watch(owner: Any, method: str, around: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    """Put a context around every call of a method of an object."""
    call: Callable[..., Any] = getattr(owner, method)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with around():
            return call(*args, **kwargs)

    setattr(owner, method, watched)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: now, or with "VmHWM" the most since `forget_peak`. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_new_process(*arguments: str, **environment: str) -> Any:
    """What this benchmark prints last with other arguments, read as JSON."""
    command = [sys.executable, sys.argv[0], *arguments]
    variables = os.environ | environment
    output = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])
