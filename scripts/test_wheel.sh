#!/usr/bin/env bash
# Build an sdist and from it a wheel, install the wheel with what it requires in a fresh environment, and use it outside
# the clone: the algorithms, the recipes, and the trainer, whose packages are those of the main environment
# (scripts/setup.sh, MSSR_VENV).
set -euo pipefail

TITLE=wheel
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
MAIN=${MSSR_VENV:-$REPO/.venv}/bin/python
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MSSR_CACHE=$SCRATCH/cache

quiet() { "$@" >"$SCRATCH/log" 2>&1 || { cat "$SCRATCH/log" >&2 && die "failed: $*"; }; }
expect() { [[ $1 == *"$2"* ]] || die "expected '$2' in: $1"; }

say "building"
# A copy, so that what is left of earlier builds in the clone has no part in it.
mkdir "$SCRATCH/source" "$SCRATCH/dist"
cp -a "$REPO"/{mssr,configs,pyproject.toml,README.md,LICENSE} "$SCRATCH/source"
quiet "$MAIN" -m pip install --target "$SCRATCH/backend" "setuptools>=77"
export PYTHONPATH=$SCRATCH/backend
(cd "$SCRATCH/source" && quiet "$MAIN" -c "import setuptools.build_meta as b; b.build_sdist('$SCRATCH/dist')")
rm -rf "$SCRATCH/source"
quiet "$MAIN" -m pip wheel --no-deps --no-build-isolation -w "$SCRATCH/dist" "$SCRATCH"/dist/*.tar.gz
unset PYTHONPATH

say "installing in a fresh environment"
"$MAIN" -m venv --without-pip "$SCRATCH/venv"
quiet "$MAIN" -m pip --python "$SCRATCH/venv/bin/python" install --no-compile "$SCRATCH"/dist/*.whl
export PATH=$SCRATCH/venv/bin:$PATH
mkdir "$SCRATCH/empty"
cd "$SCRATCH/empty"

say "using what it brings"
site=$(python -c 'import mssr, pathlib; print(pathlib.Path(mssr.__file__).parents[1])')
expect "$site" "$SCRATCH/venv"
[[ $(cd "$site/mssr/recipes" && find . -name '*.yaml' | sort) == $(cd "$REPO/configs" && find . -name '*.yaml' | sort) ]] ||
    die "the wheel has other recipes than configs/"
expect "$(mssr --version)" "mssr $(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$REPO/mssr/__init__.py")"
expect "$(mssr init digits)" "3 configs are in configs/digits"
expect "$(mssr train digits 2>&1 || echo "exit $?")" 'pip install "mssr[train,cpu]"'
python - <<'PYTHON'
from mssr.algorithms import AdaptiveDiscount, BetaBaseline, create

baseline, discount, ids = BetaBaseline(), AdaptiveDiscount(), ["a", "b"]
print("advantages", *create("mvsr").advantages(ids, [1.0, 0.0], [5, 5]))
discount.observe(0.01)
baseline.update(ids, [1.0, 0.0], discount.eta)
low, high = sorted(baseline.values(ids))
assert low < 0.5 < high
PYTHON

say "training with it"
# After the fresh environment's own, without what the main one adds at start: the clone that is installed in it.
"$MAIN" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/main.pth"
cat "$(<"$site/main.pth")"/torchvision_cpu_repair.pth >>"$site/main.pth" 2>/dev/null || true
cat >train.py <<'PYTHON'
import sys
from pathlib import Path

import mssr.trainer.session
from mssr.data.digits import DigitsSettings, WarmStartSettings, prepare
from mssr.tools.cli import main

assert mssr.trainer.session.__file__.startswith(sys.prefix)
warm_start = WarmStartSettings(reading_steps=2, habit_steps=1)
little = DigitsSettings(train_rows=32, val_rows=8, threads=1, warm_start=warm_start)
prepare(Path("data/digits"), quiet=True, settings=little)
sys.exit(main(["train", "digits", *sys.argv[1:]]))
PYTHON
quiet python train.py cluster.launcher=local cluster.device=cpu rollout.engine=hf rollout.workers=1 \
    actor.num_ranks=1 rollout.rollouts_per_step=16 actor.updates_per_step=2 trainer.steps=2 trainer.progress=plain
[[ $(wc -l <runs/digits-mssr/metrics.jsonl) == 3 && -d runs/digits-mssr/checkpoints/step-000002 ]] ||
    { cat "$SCRATCH/log" >&2 && die "the training left no metrics of two steps, or no checkpoint"; }
say "the wheel is sound ($SECONDS s)"
