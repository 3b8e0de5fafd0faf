#!/usr/bin/env bash
# Set up, lint, type-check and test. Arguments go to pytest: scripts/test.sh tests/unit -k advantage
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh

export PATH=${MSSR_VENV:-$PWD/.venv}/bin:$PATH

phase() {
    local title=$1 start=$SECONDS status=0
    shift
    echo "[test] $title: $*"
    "$@" || status=$?
    if ((status)); then
        echo "[test] FAILED: $title (exit status $status)" >&2
        exit "$status"
    fi
    echo "[test] $title passed in $((SECONDS - start)) s"
}

phase "lint" ruff check .
phase "format" ruff format --check .
phase "types" mypy mssr
if (($#)); then
    phase "tests" pytest "$@"
else
    # The end-to-end tests start many processes themselves; the others share two.
    phase "unit tests" pytest tests/unit examples -n 2 --dist loadfile
    phase "end-to-end tests" pytest tests/e2e --durations=15
fi
echo "[test] all passed in $SECONDS s"
