#!/usr/bin/env bash
# Make the virtual environment and install mssr in it. Run it again at any time: it does nothing while the
# environment is up to date.
#
#   scripts/setup.sh [--cpu | --gpu]
#
# MSSR_DEVICE=cpu|gpu    like --cpu or --gpu; without either, gpu where nvidia-smi finds one
# MSSR_VENV=DIR          the environment, default .venv in the repository
# MSSR_TORCH_INDEX=URL   where torch's CPU wheels are, see scripts/environment.sh
set -euo pipefail

TITLE=setup
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
VENV=${MSSR_VENV:-$REPO/.venv}
MIN_DRIVER=580 # of CUDA 13, for which torch 2.13 and vLLM are built
STAMP=$VENV/mssr-setup.stamp
LOG=$VENV/mssr-setup.log
MADE_FROM=(scripts/setup.sh)

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

install() {
    TORCH_CPU=()
    if [[ $KIND == cpu ]]; then find_torch_cpu; fi
    say "installing mssr[$KIND,dev] and its dependencies (the first time, some minutes)"
    pip_install -e ".[$KIND,dev]" -c constraints.txt "${TORCH_CPU[@]}"
}

verify() {
    # Empty, so that what is compiled is kept, also in images that forbid it: every process needs it again.
    PYTHONDONTWRITEBYTECODE="" "$VENV/bin/python" - "$KIND" <<'PYTHON'
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

KIND=$(choose_device "$@")
if up_to_date; then exit; fi
wait_for_others
if up_to_date; then exit; fi

say "device: $KIND"
if [[ $KIND == gpu ]]; then check_gpu_machine; fi
make_venv
install
repair
say "importing the main libraries"
versions=$(verify) || die "the main libraries do not import"
write_stamp "$versions"
