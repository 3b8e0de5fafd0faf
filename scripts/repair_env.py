"""Repair what pip cannot get right about a CPU environment. Run by scripts/setup.sh with the venv's python.

1. A torchvision that does not import beside this torch gets an import hook (see torchvision_cpu_repair.py);
   the hook is removed again where torchvision is sound without it.
2. torchaudio and torchcodec, which vLLM demands and nothing here uses, are uninstalled if they do not
   import: a broken one breaks the import of transformers and of vLLM.

Does nothing in a sound environment, and nothing new when it is run again.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = "torchvision_cpu_repair"
UNUSED = ("torchaudio", "torchcodec")
WITHOUT_HOOK = (
    f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != {HOOK!r}]; "
)


def import_error(code: str) -> str | None:
    """Run `code` in a new interpreter; None if it worked, else the last line of its error."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


def installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def repair_torchvision() -> None:
    """Install the import hook, or remove it, as `import torchvision` needs."""
    site_packages = Path(sysconfig.get_paths()["purelib"])
    module, pth = site_packages / f"{HOOK}.py", site_packages / f"{HOOK}.pth"

    error = import_error(WITHOUT_HOOK + "import torchvision")
    if error is None:
        if pth.exists() or module.exists():
            pth.unlink(missing_ok=True)  # first: a .pth whose module is gone complains at every start
            module.unlink(missing_ok=True)
            print("torchvision is sound without the import hook: removed the hook")
        return
    if "operator torchvision::" not in error:
        raise SystemExit(f"import torchvision fails in a way that is not known here: {error}")

    partial = module.with_suffix(".py.partial")
    shutil.copyfile(Path(__file__).with_name(f"{HOOK}.py"), partial)
    os.replace(partial, module)
    pth.write_text(f"import {HOOK}\n")
    error = import_error("import torchvision")
    if error is not None:
        raise SystemExit(f"import torchvision fails even with the import hook: {error}")
    print("torchvision is a CUDA build beside a CPU torch: import hook in place")


def remove_broken_unused_packages() -> None:
    broken = [name for name in UNUSED if installed(name) and import_error(f"import {name}") is not None]
    if broken:
        pip = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken]
        subprocess.run(pip, check=True)
        print(f"{' and '.join(broken)} did not import and nothing here uses them: uninstalled")


if __name__ == "__main__":
    repair_torchvision()
    remove_broken_unused_packages()
