"""scripts/setup.sh --gpu says what the machine lacks before it downloads anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup.sh"
NEEDED = "bash cat cut dirname env flock grep head mv rm sed sha256sum sleep tail timeout".split()
# A Python that has headers or not, and cannot make an environment: as far as a set-up is to get here.
PYTHON = """#!/bin/sh
case "$*" in
    *sysconfig*) exit {no_headers} ;;
    --version) echo Python 3.12.1 ;;
    *"-m venv"*) exit 1 ;;
esac
"""


@pytest.fixture
def set_up(tmp_path: Path) -> Callable[..., str]:
    """Runs the set-up with nothing in PATH but what it needs, and stand-ins; returns what it says."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in NEEDED:
        if found := shutil.which(name):
            (bin_dir / name).symlink_to(found)

    def command(name: str, text: str) -> None:
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)

    def run(driver: str | None, compiler: str | None = "gcc", headers: bool = True, **variables: str) -> str:
        command("python3", PYTHON.format(no_headers=int(not headers)))
        if driver is not None:
            command("nvidia-smi", f"#!/bin/sh\necho '{driver}'\necho '{driver}'\n")
        (bin_dir / "gcc").unlink(missing_ok=True)
        if compiler:
            command(compiler, "#!/bin/sh\n")
        env = {"PATH": str(bin_dir), "MSSR_VENV": str(tmp_path / "venv"), "HOME": os.environ["HOME"]}
        done = subprocess.run(
            ["bash", str(SETUP), "--gpu"], env=env | variables, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 1 and not (tmp_path / "venv").exists()
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("driver", ["580.95.05", "610.1", None, "NVIDIA-SMI has failed"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_machine_that_has_all_goes_on(
    set_up: Callable[..., str], driver: str | None, compiler: str
) -> None:
    said = set_up(driver, compiler)
    assert "-m venv" in said.splitlines()[-1]
    assert ("580 or newer" in said) == (driver is None or "failed" in driver)


def test_what_is_missing_is_one_line(set_up: Callable[..., str]) -> None:
    old = set_up("575.57.08")
    assert "error: the NVIDIA driver is 575.57.08" in old and "580 or newer" in old.splitlines()[-1]
    bare = set_up("580.95.05", compiler=None)
    assert "error: there is no C compiler, and" in bare.splitlines()[-1] and "install gcc" in bare
    assert "no C compiler cc-9, and" in set_up("580.95.05", CC="cc-9")
    headers = set_up("580.95.05", headers=False)
    assert "has no Python.h" in headers.splitlines()[-1] and "python3-dev" in headers
