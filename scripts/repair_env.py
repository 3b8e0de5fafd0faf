"""Repair what pip cannot get right about a CPU environment. Run by scripts/setup.sh with the venv's python.

1. Beside a CPU torch, torchvision gets an import hook (torchvision_cpu_repair.py); beside a CUDA torch none.
2. torchaudio and torchcodec, which vLLM demands and nothing here uses, are uninstalled if they do not
   import: a broken one breaks the import of transformers and of vLLM.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = "torchvision_cpu_repair"
UNUSED = ("torchaudio", "torchcodec")


def runs(code: str) -> bool:
    """In a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def repair_torchvision() -> None:
    site_packages = Path(sysconfig.get_paths()["purelib"])
    module, pth = site_packages / f"{HOOK}.py", site_packages / f"{HOOK}.pth"
    if not runs("import torch; assert torch.version.cuda is None"):
        pth.unlink(missing_ok=True)  # first: a .pth whose module is gone complains at every start
        module.unlink(missing_ok=True)
        return
    partial = module.with_suffix(".py.partial")
    shutil.copyfile(Path(__file__).with_name(f"{HOOK}.py"), partial)
    os.replace(partial, module)
    pth.write_text(f"import {HOOK}\n")
    print("import hook for a torchvision that is a CUDA build: in place")


def remove_broken_unused_packages() -> None:
    broken = [name for name in UNUSED if importlib.util.find_spec(name) and not runs(f"import {name}")]
    if broken:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
        print(f"{' and '.join(broken)} did not import and nothing here uses them: uninstalled")


if __name__ == "__main__":
    repair_torchvision()
    remove_broken_unused_packages()
