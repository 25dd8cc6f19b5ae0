#!/usr/bin/env bash
# Make or update the project's environment: .venv in this checkout, and DeepSpeed's C++ operation on CPU machines.
#
#   bash launch/setup.sh [--dry-run] [EXTRAS]        e.g.  train,deepspeed,demo   or   all,dev      (extras of pyproject.toml)
#
# Run again it is done in a moment; more extras are added to those already there. Settings, all optional:
#   PYTHON            the Python (3.10 or newer) to make .venv from
#   TORCH_SPEC        exactly this torch instead of our choice, e.g. 'torch==2.12.1'. For a driver that is too old for its
#                     CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126 TORCH_SPEC=torch==2.11.0+cu126
#   TORCH_CPU_INDEX   where CPU wheels of torch are, if your pip's own indexes have none
#   FRUGAL_DIST_IMAGE the extras that a container image brings (docker/Dockerfile sets it): then nothing is installed
# Afterwards, programs that use DeepSpeed on CPU need TORCH_EXTENSIONS_DIR=.cache/torch_extensions and .venv/bin on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ROOT=$PWD
VENV=${FRUGAL_DIST_IMAGE:+${VIRTUAL_ENV:?is not set, but FRUGAL_DIST_IMAGE is}}
VENV=${VENV:-$ROOT/.venv}
CACHE=$ROOT/.cache
STAMP=$VENV/.frugal_dist_setup
LOG=$CACHE/setup.log
OP=deepspeed_shm_comm
TORCH_CPU_VERSION=2.13.0
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$CACHE/torch_extensions}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: ERROR: %s\n' "$*" >&2; exit 1; }
mistake() { printf 'setup: ERROR: %s\n' "$*" >&2; exit 2; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
wants() { [[ ",$EXTRAS," == *",$1,"* ]]; }

# --- long steps: always with a clock, the log's last line, and the end of the log when they fail ------------

CHILD=
stop_child() {
    # The child runs in a process group of its own, so that its compilers and downloads go with it.
    [[ -z $CHILD ]] || kill -TERM -- "-$CHILD" 2>/dev/null || true
    printf '\nsetup: interrupted; run the same command again to resume\n' >&2
    exit 130
}
trap stop_child INT TERM HUP

last_line() { grep -v "^== " "$LOG" 2>/dev/null | tail -n 1 | LC_ALL=C tr -cd ' -~' | cut -c 1-60; }

# with_clock TEXT COMMAND...: run COMMAND, its output in $LOG, while showing TEXT and the seconds.
with_clock() {
    local text=$1 start=$SECONDS shown=0 rc=0
    shift
    printf '== %s\n' "$*" >"$LOG"
    set -m
    "$@" >>"$LOG" 2>&1 </dev/null &
    CHILD=$!
    set +m
    while kill -0 "$CHILD" 2>/dev/null; do
        if [[ -t 1 ]]; then
            printf '\r\033[Ksetup: %s: %d s  %s' "$text" "$((SECONDS - start))" "$(last_line)"
        elif ((SECONDS - start >= shown + 60)); then # what pip says last is often half a line: the log has it
            shown=$((SECONDS - start))
            say "$text: $((shown / 60)) min"
        fi
        sleep 0.2
    done
    wait "$CHILD" || rc=$?
    CHILD=
    [[ -t 1 ]] && printf '\r\033[K'
    if ((rc == 0)); then
        say "$text: done in $((SECONDS - start)) s"
    fi
    return "$rc"
}

fail_with_log() {
    printf -- '--- last lines of %s\n' "$LOG" >&2
    tail -n 25 "$LOG" >&2
    die "$1"
}

# --- system packages ----------------------------------------------------------------------------------------

# apt_install WHY PACKAGE: install a missing Debian/Ubuntu package when we may, or say how.
apt_install() {
    if command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
        say "$1: installing $2"
        with_clock "apt-get install $2" bash -c \
            "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $2" ||
            fail_with_log "$1, and installing $2 failed"
    else
        die "$1. Install $2. On Debian and Ubuntu this has all you need: sudo apt-get install python3-venv python3-dev g++"
    fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer found (tried: ${PYTHON:-python3, python3.13 ... python3.10}). Install one, or set PYTHON=/path/to/python3."
}

need_compiler() {
    command -v "${CXX:-c++}" >/dev/null || apt_install "DeepSpeed on CPU needs a C++ compiler, and there is none" g++
    "$VENV/bin/python" - <<'PY' || apt_install "DeepSpeed on CPU needs Python's header files, and they are missing" python3-dev
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
}

# --- the environment ----------------------------------------------------------------------------------------

make_venv() {
    if "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        return
    fi
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null || apt_install "$python lacks the modules venv and ensurepip" python3-venv
    say "making .venv with $("$python" --version) ($python)"
    # --clear: what is there does not run, for example because it was copied or its Python is gone.
    "$python" -m venv --clear "$VENV" || die "python -m venv failed; on Debian and Ubuntu: sudo apt-get install python3-venv"
}

# version_of PACKAGE: its version in .venv, or nothing.
version_of() {
    "$VENV/bin/python" -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1" 2>/dev/null || true
}

# torch_fits RANGE: is a torch of that range here, and not a CPU build on a machine with a GPU?
torch_fits() {
    local found
    found=$(version_of torch)
    [[ -n $found ]] || return 1
    if has_gpu && [[ $found == *+cpu ]]; then
        return 1
    fi
    "$VENV/bin/python" - "$1" "$found" <<'PY'
import sys
from pip._vendor.packaging.requirements import Requirement
sys.exit(not Requirement(sys.argv[1]).specifier.contains(sys.argv[2], prereleases=True))
PY
}

pip_install() { "$VENV/bin/python" -m pip install --no-input "$@"; }

install_torch() {
    local range=${TORCH_SPEC:-$(sed -n 's/^dependencies = \["\(torch[^"]*\)"\]$/\1/p' pyproject.toml)}
    [[ -n $range ]] || die "pyproject.toml no longer states torch's range as this script expects it"
    if torch_fits "$range"; then
        return
    fi
    # Other systems' wheels on PyPI are small; on x86-64 Linux plain torch brings gigabytes of CUDA.
    if [[ -n ${TORCH_SPEC:-} ]] || has_gpu || [[ $(uname -sm) != "Linux x86_64" ]]; then
        with_clock "installing $range" pip_install "$range" || fail_with_log "pip could not install $range"
        return
    fi
    local cpu="torch==$TORCH_CPU_VERSION+cpu"
    with_clock "installing $cpu" pip_install "$cpu" && return
    say "your pip's indexes have no $cpu; trying $TORCH_CPU_INDEX"
    with_clock "installing $cpu" pip_install --retries 1 --timeout 20 --extra-index-url "$TORCH_CPU_INDEX" "$cpu" && return
    local plain="torch==$TORCH_CPU_VERSION"
    say "no CPU build of torch can be reached: taking the default build, with several GB of CUDA. It works without a GPU."
    say "To avoid that, stop with Ctrl-C and set TORCH_CPU_INDEX to an index that has CPU wheels."
    with_clock "installing $plain" pip_install "$plain" || fail_with_log "pip could not install $plain either"
}

# The default wheels have the newest CUDA, for which many clusters' drivers are too old: torch then finds no GPU.
check_gpu() {
    local cuda
    has_gpu && [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || return 0
    cuda=$("$VENV/bin/python" -W ignore -c 'import torch; print(torch.cuda.is_available() or torch.version.cuda)' 2>/dev/null) || return 0
    [[ $cuda == True ]] ||
        say "WARNING: nvidia-smi lists GPUs, but torch finds none: its CUDA is $cuda, and the driver may be too old for it. \
Update the driver, or take an older CUDA (TORCH_SPEC in bash launch/setup.sh --help)."
}

install_project() {
    # Naming torch's exact version keeps pip from exchanging it for another build.
    with_clock "installing frugal_dist${EXTRAS:+ with $EXTRAS}" \
        pip_install "torch==$(version_of torch)" --editable "$ROOT${EXTRAS:+[$EXTRAS]}" ||
        fail_with_log "pip could not install the project"
}

# --- DeepSpeed's C++ operation for CPU ----------------------------------------------------------------------

# A build that was killed leaves its lock behind, and every later build would wait for it for ever, in silence.
clear_stale_lock() {
    [[ -e $TORCH_EXTENSIONS_DIR/$OP/lock ]] || return 0
    set -m
    "$VENV/bin/python" -I "$ROOT/frugal_dist/integrations/build_locks.py" </dev/null &
    CHILD=$!
    set +m
    wait "$CHILD" || true
    CHILD=
}

build_op() {
    local key built
    key="$(version_of torch) $(version_of deepspeed) $("$VENV/bin/python" --version)"
    built=$TORCH_EXTENSIONS_DIR/$OP.built
    clear_stale_lock
    if [[ -e $TORCH_EXTENSIONS_DIR/$OP/$OP.so && $(cat "$built" 2>/dev/null) == "$key" ]]; then
        return
    fi
    need_compiler
    if [[ -e $built ]]; then
        say "torch or DeepSpeed changed: building $OP anew"
        rm -rf "${TORCH_EXTENSIONS_DIR:?}/$OP" "$built"
    fi
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    say "DeepSpeed compiles $OP once on CPU machines; this takes 1 to 4 minutes"
    PATH=$VENV/bin:$PATH DS_ACCELERATOR=cpu with_clock "compiling $OP" "$VENV/bin/python" -c \
        "from deepspeed.accelerator import get_accelerator; get_accelerator().create_op_builder('ShareMemCommBuilder').load()" ||
        fail_with_log "DeepSpeed's $OP does not compile"
    printf '%s' "$key" >"$built"
}

needs_op() { { wants deepspeed || wants all; } && ! has_gpu; }

# --- main ---------------------------------------------------------------------------------------------------

# The stamp's first line tells for what it was made, the second the extras that are in .venv.
fingerprint() { { cat pyproject.toml; printf '%s' "${TORCH_SPEC:-}"; if has_gpu; then echo gpu; fi; } | cksum; }

merge_extras() {
    local requested=$1 installed=
    [[ -e $STAMP ]] && installed=$(sed -n 2p "$STAMP")
    printf '%s,%s' "$requested" "$installed" | tr -d ' ' | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd, -
}

check_extras() {
    local extra
    for extra in ${1//,/ }; do
        grep -q "^$extra = \[" pyproject.toml || mistake "unknown extra \"$extra\"; pyproject.toml has: $(
            sed -n '/^\[project.optional-dependencies\]/,/^\[project.scripts\]/s/^\([a-z]*\) = \[.*/\1/p' pyproject.toml | paste -sd' ' -
        )"
    done
}

# In a container image everything is there, and what is not there cannot be written by every user.
check_image() {
    local extra all have
    all=$(sed -n 's/^all = \["frugal_dist\[\(.*\)\]"\]$/\1/p' pyproject.toml)
    have=,${FRUGAL_DIST_IMAGE/all/$all},
    EXTRAS=${1/all/$all}
    for extra in ${EXTRAS//,/ }; do
        [[ $have == *,$extra,* ]] || mistake "this image was built without the extra \"$extra\" (it has $FRUGAL_DIST_IMAGE); \
build it with --build-arg EXTRAS=$FRUGAL_DIST_IMAGE,$extra"
    done
}

main() {
    local start=$SECONDS dry='' word
    local -a words=()
    for word; do
        case $word in
        -h | --help) sed -n '2,/^set /{/^# \{0,1\}/!d;s///p}' "$ROOT/launch/setup.sh"; exit 0 ;;
        --dry-run) dry=1 ;;
        -*) mistake "unknown option \"$word\"; there are --dry-run and --help" ;;
        *) words+=("$word") ;;
        esac
    done
    ((${#words[@]} < 2)) || mistake "give the extras as one word, separated by commas: $(IFS=,; echo "${words[*]}")"
    set -- "${words[@]}"
    check_extras "${1:-}"
    if [[ -n $dry ]]; then
        EXTRAS=$(merge_extras "${1:-}")
        say "would make or update $VENV with torch and frugal_dist${EXTRAS:+[$EXTRAS]}$(! needs_op || echo ", and compile $OP")"
        return
    fi
    mkdir -p "$CACHE"
    if [[ -n ${FRUGAL_DIST_IMAGE:-} ]]; then
        check_image "${1:-}"
        if needs_op; then
            build_op
        fi
        say "the container image has what is needed: torch $(version_of torch), extras $FRUGAL_DIST_IMAGE"
        return
    fi
    if command -v flock >/dev/null; then
        # Two set-ups at once would spoil each other's environment. The kernel frees this lock with the process.
        exec 9>"$CACHE/setup.lock"
        flock -n 9 || { say "another set-up of this checkout is running; waiting for it"; flock 9; }
    fi
    EXTRAS=$(merge_extras "${1:-}")
    make_venv
    if [[ "$(sed -n 1,2p "$STAMP" 2>/dev/null)" != "$(fingerprint)"$'\n'"$EXTRAS" ]]; then
        say "this takes a few minutes the first time; details in ${LOG#"$ROOT"/}"
        needs_op && need_compiler
        rm -f "$STAMP"
        install_torch
        install_project
        check_gpu
        printf '%s\n%s\n' "$(fingerprint)" "$EXTRAS" >"$STAMP"
    fi
    if needs_op; then
        build_op
    fi
    say "ready in $((SECONDS - start)) s: .venv with Python $("$VENV/bin/python" -c 'import platform; print(platform.python_version())'), torch $(version_of torch)${EXTRAS:+, extras $EXTRAS}"
}

main "$@"
