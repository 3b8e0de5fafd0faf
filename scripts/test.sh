#!/usr/bin/env bash
# Set up, lint, type-check and test. Arguments go to pytest: scripts/test.sh tests/unit -k advantage
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Some images forbid Python to keep what it has compiled. Every process of every run would then compile torch,
# transformers and vLLM anew, which takes longer than all that the tests do.
unset PYTHONDONTWRITEBYTECODE
./scripts/setup.sh

export PATH=${MSSR_VENV:-$PWD/.venv}/bin:$PATH

phase() {
    local title=$1 start=$SECONDS
    echo "[test] $title: ${*:2}"
    "${@:2}" || { local status=$?; echo "[test] FAILED: $title (exit status $status)" >&2; exit "$status"; }
    echo "[test] $title passed in $((SECONDS - start)) s"
}

phase "lint" ruff check .
phase "format" ruff format --check .
phase "rooms" lint-imports --no-cache
phase "types" mypy mssr
if (($#)); then
    phase "tests" pytest "$@"
else
    # Two at a time, because much of a run is one process starting. A file stays in one process, which makes
    # what its tests share once; the long files first, so that small ones are left to fill the end.
    phase "tests" pytest tests/e2e tests/unit examples -n 2 --dist loadfile --no-loadscope-reorder --durations=25
    phase "docs" ./scripts/docs.sh
    phase "wheel" ./scripts/test_wheel.sh
    phase "plugins" ./scripts/test_plugins.sh
fi
echo "[test] all passed in $SECONDS s"
