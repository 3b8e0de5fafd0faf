#!/usr/bin/env bash
# Main table and ablation of the paper: training, evaluation, and a table beside the published numbers.
#   scripts/study/paper.sh --size 3b --dry-run       # every command, GPU hours, disk
#   scripts/study/paper.sh --size 7b --rows base mssr -- actor.micro_batch_tokens=8192
# What is finished is not done again. See docs/paper.md.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PATH=${MSSR_VENV:-$root/.venv}/bin:$PATH
exec python "$root/scripts/study/paper.py" "$@"
