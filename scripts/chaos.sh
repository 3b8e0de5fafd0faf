#!/usr/bin/env bash
# Injure N real runs, three times each, at seeded moments, and compare their ends with an undisturbed run:
#   scripts/chaos.sh 10 [--out table.md]
# A full disk needs the right to mount a small file system (root); elsewhere it is skipped.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # see scripts/test.sh
./scripts/setup.sh
export PATH=${MSSR_VENV:-$PWD/.venv}/bin:$PATH
exec python -m tests.chaos.report "$@"
