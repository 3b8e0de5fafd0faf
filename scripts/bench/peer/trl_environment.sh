#!/usr/bin/env bash
# TRL in an environment of its own, .venv-trl, with our versions of torch and transformers. Does nothing if it is
# there.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
VENV=$REPO/.venv-trl
TRL_VERSION=1.16.0

[[ -f $VENV/ready-$TRL_VERSION ]] && exit
echo "making $VENV with TRL $TRL_VERSION (some minutes)" >&2
python3 -m venv "$VENV"
extra=()
[[ -n ${MSSR_TORCH_INDEX:-} ]] && extra=(--extra-index-url "$MSSR_TORCH_INDEX")
"$VENV/bin/python" -m pip install --quiet --no-compile "trl==$TRL_VERSION" torch torchvision pillow \
    -c "$REPO/constraints.txt" "${extra[@]}" >&2
"$VENV/bin/python" "$REPO/scripts/repair_env.py" >&2
touch "$VENV/ready-$TRL_VERSION"
