#!/usr/bin/env bash
# From a fresh clone to a trained tiny model and its curves, on a CPU. Arguments go to `mssr train`:
# scripts/quickstart.sh trainer.steps=20
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

phase() {
    local title=$1 start=$SECONDS
    echo "[quickstart] $title: ${*:2}"
    "${@:2}" || { local status=$?; echo "[quickstart] FAILED: $title (exit status $status)" >&2; exit "$status"; }
    echo "[quickstart] $title done in $((SECONDS - start)) s, $SECONDS s since the start"
}

phase "set-up" ./scripts/setup.sh
export PATH=${MSSR_VENV:-$PWD/.venv}/bin:$PATH
phase "data" mssr prepare digits --out data/digits
# Without a terminal there is no live line; a line a step shows that it goes on.
[[ -t 1 ]] || set -- trainer.progress=plain "$@"
phase "training" mssr train configs/digits/mssr.yaml "$@"
