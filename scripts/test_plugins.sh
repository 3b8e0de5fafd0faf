#!/usr/bin/env bash
# Test the plugins for TRL and verl, each in an environment of its own, which is made first where it is not up to date.
#
#   scripts/test_plugins.sh [--install] [trl] [verl]     both by default; --install makes environments and tests nothing
#
# .venv-trl has TRL with our versions of torch and transformers, .venv-verl what verl's driver imports.
set -euo pipefail

TITLE=plugins
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO"
unset PYTHONDONTWRITEBYTECODE # see scripts/test.sh

install_trl() {
    pip_install -r tests/plugins/trl-requirements.txt -e ".[trl]" -c constraints.txt "${TORCH_CPU[@]}"
}

install_verl() {
    pip_install --no-deps -r tests/plugins/verl-requirements.txt -e . "${TORCH_CPU[@]}"
}

VERSIONS='import sys, importlib.metadata as m; print(", ".join(f"{name} {m.version(name)}" for name in sys.argv[1:]))'

# In a process of its own, with which the lock of set-ups ends.
environment() (
    KIND=$1 MADE_FROM=(scripts/test_plugins.sh "tests/plugins/$1-requirements.txt")
    STAMP=$VENV/mssr-setup.stamp LOG=$VENV/mssr-setup.log SECONDS=0
    if up_to_date; then exit; fi
    wait_for_others
    if up_to_date; then exit; fi
    rm -rf "$VENV"
    make_venv
    find_torch_cpu
    "install_$1"
    repair
    write_stamp "$("$VENV/bin/python" -c "$VERSIONS" torch transformers "$1")"
)

run() {
    VENV=$REPO/.venv-$1
    environment "$1"
    if ((!TESTS)); then return; fi
    # The other tests' conftest wants more than these environments have.
    # Processes that the tests start find tests/plugins by PYTHONPATH.
    PYTHONPATH=$REPO OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false \
        "$VENV/bin/python" -m pytest --noconftest -q --durations=10 tests/plugins/test_"$1"*.py
}

TESTS=1
if [[ ${1:-} == --install ]]; then TESTS=0 && shift; fi
(($#)) || set -- trl verl
for plugin in "$@"; do
    [[ $plugin == trl || $plugin == verl ]] || die "unknown argument $plugin; usage: scripts/test_plugins.sh [--install] [trl] [verl]"
done
if (($# == 1)); then
    run "$1"
    exit
fi

# Side by side, because one installs, or waits for its processes, while the other computes.
LOGS=$(mktemp -d)
PIDS=()
trap 'rm -rf "$LOGS"; for pid in "${PIDS[@]}"; do kill -- "-$pid" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT TERM
set -m # each a group of processes, which can be ended
for plugin in "$@"; do
    run "$plugin" >"$LOGS/$plugin" 2>&1 &
    PIDS+=($!)
    say "$plugin has begun; what it says is shown at its end"
done
status=0
for plugin in "$@"; do
    failed=0
    wait "${PIDS[0]}" || failed=$?
    PIDS=("${PIDS[@]:1}")
    cat "$LOGS/$plugin"
    if ((failed)); then
        say "FAILED: $plugin (exit status $failed)" >&2
        status=$failed
    fi
done
exit "$status"
