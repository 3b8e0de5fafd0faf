#!/usr/bin/env bash
# Make the virtual environment and install mssr in it. Run it again at any time: it does nothing while the
# environment is up to date.
#
#   scripts/setup.sh [--cpu | --gpu]
#
# MSSR_DEVICE=cpu|gpu    like --cpu or --gpu; without either, gpu where nvidia-smi finds one
# MSSR_VENV=DIR          the environment, default .venv in the repository
# MSSR_TORCH_INDEX=URL   where torch's CPU wheels are, default https://download.pytorch.org/whl/cpu;
#                        used only where it answers, beside what pip is configured with
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${MSSR_VENV:-$REPO/.venv}
TORCH_INDEX=${MSSR_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
MIN_DRIVER=580 # of CUDA 13, for which torch 2.13 and vLLM are built
STAMP=$VENV/mssr-setup.stamp
LOG=$VENV/mssr-setup.log

say() { echo "[setup] $*"; }
die() {
    echo "[setup] error: $*" >&2
    exit 1
}

choose_device() {
    local device=${MSSR_DEVICE:-}
    case $* in
        --cpu) device=cpu ;;
        --gpu) device=gpu ;;
        "") ;;
        *) die "unknown argument $*; usage: scripts/setup.sh [--cpu | --gpu]" ;;
    esac
    if [[ -z $device ]]; then
        device=cpu
        if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=gpu; fi
    fi
    [[ $device == cpu || $device == gpu ]] || die "MSSR_DEVICE is '$device', it must be cpu or gpu"
    echo "$device"
}

find_python() {
    local python
    for python in python3 python3.11 python3.12 python3.13; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    die "no Python 3.11, 3.12 or 3.13 with the venv module found; install one (on Debian: python3 python3-venv)"
}

# What the environment was made from: the same text again means that there is nothing to do.
fingerprint() {
    local files=(pyproject.toml constraints.txt scripts/setup.sh scripts/repair_env.py scripts/torchvision_cpu_repair.py)
    echo "$DEVICE $({ echo "$REPO" && "$VENV/bin/python" -VV && cd "$REPO" && cat "${files[@]}"; } | sha256sum)"
}

# Line 1 of the stamp is the fingerprint, line 2 the versions that were seen.
exit_if_up_to_date() {
    if [[ -f $STAMP && $(head -n 1 "$STAMP") == "$(fingerprint 2>/dev/null)" ]]; then
        say "up to date ($DEVICE, $VENV): $(sed -n 2p "$STAMP")"
        exit
    fi
}

# Asked without pip, because pip retries an index that does not answer for minutes.
torch_index_answers() {
    local code='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=4).read(1)'
    timeout 6 "$VENV/bin/python" -c "$code" "${TORCH_INDEX%/}/torch/" 2>/dev/null
}

# Some GB of wheels take minutes: what they do not work without is asked for first.
check_gpu_machine() {
    local driver python
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=""
    driver=${driver%%$'\n'*}
    if [[ ! $driver =~ ^[0-9]+ ]]; then
        say "nvidia-smi finds no driver here: right for an image; where it runs, the host needs driver $MIN_DRIVER or newer"
    elif ((${driver%%.*} < MIN_DRIVER)); then
        die "the NVIDIA driver is $driver, and torch's CUDA 13.0 needs $MIN_DRIVER or newer; install a newer one on the host"
    fi
    if [[ ! $(type -P "${CC:-gcc}" || [[ ${CC:-} ]] || type -P clang) ]]; then
        die "there is no C compiler${CC:+ $CC}, and Triton compiles at run time; install gcc (on Debian: build-essential)"
    fi
    python=$VENV/bin/python
    [[ -x $python ]] || python=$(find_python)
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' ||
        die "$python has no Python.h, and Triton compiles with it at run time; install Python's headers (on Debian: python3-dev, or python3.12-dev and the like for another Python)"
}

make_venv() {
    if [[ -f $STAMP && $(head -n 1 "$STAMP") != "$DEVICE "* ]]; then
        say "the environment was made for another device than $DEVICE: making it anew"
        rm -rf "$VENV"
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        local python
        python=$(find_python)
        say "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV" || die "$python -m venv $VENV failed"
    fi
}

install() {
    # Compiling every module beforehand takes longer than all the rest; Python does it for those it imports.
    local arguments=(-e ".[$DEVICE,dev]" -c constraints.txt --progress-bar off --no-compile)
    if [[ $DEVICE == cpu ]]; then
        if torch_index_answers; then
            arguments+=(--extra-index-url "$TORCH_INDEX")
            say "torch's CPU wheels: $TORCH_INDEX"
        else
            say "torch's CPU wheels: from pip's own configuration, because $TORCH_INDEX does not answer"
            say "  (if pip then finds no torch 2.13.0+cpu: set MSSR_TORCH_INDEX or PIP_FIND_LINKS to a mirror)"
        fi
    fi
    cd "$REPO"
    say "installing mssr[$DEVICE,dev] and its dependencies (the first time, some minutes)"
    local start=$SECONDS ticks=0 status=0 pid
    "$VENV/bin/python" -m pip install "${arguments[@]}" >>"$LOG" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        ((++ticks % 75)) || say "  $((SECONDS - start)) s: $(grep -v 'is ignored: it is neither' "$LOG" | tail -n 1 | cut -c 1-90)"
    done
    wait "$pid" || status=$?
    trap - INT TERM
    if ((status)); then
        grep -v 'is ignored: it is neither' "$LOG" | tail -n 25 >&2
        die "the installation failed after $((SECONDS - start)) s (everything is in $LOG)"
    fi
    say "  done in $((SECONDS - start)) s"
}

verify() {
    # Empty, so that what is compiled is kept, also in images that forbid it: every process needs it again.
    PYTHONDONTWRITEBYTECODE="" "$VENV/bin/python" - "$DEVICE" <<'PYTHON'
import importlib, logging, os, sys

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
logging.disable(logging.WARNING)
names = ["torch", "torchvision", "transformers", "vllm", "ray"]
modules = {name: importlib.import_module(name) for name in names}
# What a training imports, too: an environment that lacks some of it fails here and not in a run, and
# Python compiles it now, in one process, and not in four at once when the first run starts.
for name in f"""
    mssr.trainer.train mssr.trainer.session mssr.cluster.ray_cluster mssr.actor.worker mssr.rollout.vllm_engine
    transformers.models.qwen2_5_vl.modeling_qwen2_5_vl vllm.entrypoints.llm vllm.v1.engine.core
    vllm.model_executor.models.qwen2_5_vl vllm.v1.worker.{sys.argv[1]}_worker matplotlib.pyplot
""".split():
    importlib.import_module(name)
if sys.argv[1] == "gpu" and modules["torch"].version.cuda is None:
    sys.exit(f"torch {modules['torch'].__version__} has no CUDA: pip found a CPU wheel first, look at its find-links")
print(", ".join(f"{name} {module.__version__}" for name, module in modules.items()))
PYTHON
}

DEVICE=$(choose_device "$@")
exit_if_up_to_date
# One set-up at a time; whoever waited may find the work done.
if command -v flock >/dev/null; then
    exec 9<"$REPO/pyproject.toml"
    flock -n 9 || { say "another set-up is running, waiting for it" && flock 9; }
    exit_if_up_to_date
fi

say "device: $DEVICE"
if [[ $DEVICE == gpu ]]; then check_gpu_machine; fi
make_venv
rm -f "$STAMP"
: >"$LOG"
install
say "checking torchvision, torchaudio and torchcodec"
"$VENV/bin/python" "$REPO/scripts/repair_env.py" | sed 's/^/[setup]   /'
say "importing the main libraries"
versions=$(verify) || die "the main libraries do not import"
printf '%s\n%s\n' "$(fingerprint)" "$versions" >"$STAMP.partial"
mv "$STAMP.partial" "$STAMP"
say "ready in $SECONDS s ($DEVICE, $VENV): $versions"
