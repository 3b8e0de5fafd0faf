#!/usr/bin/env bash
# Check everything that only a GPU runs, on the GPUs of this machine, and write a report to commit:
#   scripts/gpu_acceptance.sh [--quick] [--cpu] [--out report.md] [--only PART ...] [--scratch DIR]
# Without a GPU, or with --cpu, the CPU stands in, so that the script itself is tested (where there are GPUs this
# needs an environment of its own: MSSR_DEVICE=cpu MSSR_VENV=DIR). See docs/testing.md.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # see scripts/test.sh
./scripts/setup.sh
export PATH=${MSSR_VENV:-$PWD/.venv}/bin:$PATH
exec python -m scripts.acceptance "$@"
