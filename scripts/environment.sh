# What the scripts share that make virtual environments; sourced, not run. They set, before they use it:
#   TITLE       what their lines begin with
#   VENV        the environment, in which STAMP and LOG are
#   KIND        a word: an environment of another kind is made anew
#   MADE_FROM   files of the repository; the same texts again mean that there is nothing to do
# MSSR_TORCH_INDEX=URL   where torch's CPU wheels are, default https://download.pytorch.org/whl/cpu;
#                        used only where it answers, beside what pip is configured with
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TORCH_INDEX=${MSSR_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { echo "[$TITLE] $*"; }
die() {
    echo "[$TITLE] error: $*" >&2
    exit 1
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

# What the environment was made from.
fingerprint() {
    local files=(pyproject.toml constraints.txt scripts/environment.sh scripts/repair_env.py
        scripts/torchvision_cpu_repair.py "${MADE_FROM[@]}")
    echo "$KIND $({ echo "$REPO" && "$VENV/bin/python" -VV && cd "$REPO" && cat "${files[@]}"; } | sha256sum)"
}

# Line 1 of the stamp is the fingerprint, line 2 the versions that were seen.
up_to_date() {
    [[ -f $STAMP && $(head -n 1 "$STAMP") == "$(fingerprint 2>/dev/null)" ]] || return 1
    say "up to date ($KIND, $VENV): $(sed -n 2p "$STAMP")"
}

write_stamp() {
    printf '%s\n%s\n' "$(fingerprint)" "$1" >"$STAMP.partial"
    mv "$STAMP.partial" "$STAMP"
    say "ready in $SECONDS s ($KIND, $VENV): $1"
}

# One set-up at a time. Whoever waited may find the work done, and has to look again.
wait_for_others() {
    command -v flock >/dev/null || return 0
    exec 9<"$REPO/pyproject.toml"
    flock -n 9 || { say "another set-up is running, waiting for it" && flock 9; }
}

make_venv() {
    if [[ -f $STAMP && $(head -n 1 "$STAMP") != "$KIND "* ]]; then
        say "the environment was made for another device than $KIND: making it anew"
        rm -rf "$VENV"
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        local python
        python=$(find_python)
        say "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV" || die "$python -m venv $VENV failed"
    fi
    rm -f "$STAMP"
    : >"$LOG"
}

# Asked without pip, because pip retries an index that does not answer for minutes.
torch_index_answers() {
    local code='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=4).read(1)'
    timeout 6 "$VENV/bin/python" -c "$code" "${TORCH_INDEX%/}/torch/" 2>/dev/null
}

# Sets TORCH_CPU to the arguments by which pip finds torch's CPU wheels.
find_torch_cpu() {
    TORCH_CPU=()
    if torch_index_answers; then
        TORCH_CPU=(--extra-index-url "$TORCH_INDEX")
        say "torch's CPU wheels: $TORCH_INDEX"
    else
        say "torch's CPU wheels: from pip's own configuration, because $TORCH_INDEX does not answer"
        say "  (if pip then finds no torch 2.13.0+cpu: set MSSR_TORCH_INDEX or PIP_FIND_LINKS to a mirror)"
    fi
}

# pip install in the repository, with a line of progress now and then.
pip_install() {
    cd "$REPO"
    local start=$SECONDS ticks=0 status=0 pid
    # Compiling every module beforehand takes longer than all the rest; Python does it for those it imports.
    "$VENV/bin/python" -m pip install --progress-bar off --no-compile "$@" >>"$LOG" 2>&1 &
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

repair() {
    say "checking torchvision, torchaudio and torchcodec"
    "$VENV/bin/python" "$REPO/scripts/repair_env.py" | sed "s/^/[$TITLE]   /"
}
