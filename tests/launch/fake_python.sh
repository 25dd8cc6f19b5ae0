#!/usr/bin/env bash
# Stands in for Python in tests of launch/setup.sh: notes every call of pip, installs nothing. Settings:
#   REAL_PYTHON   runs the small scripts that come on standard input
#   CALLS         file to note calls in;  PIP_REFUSES: a regular expression of pip calls that fail
#   FAKE_CUDA     what torch says of CUDA: "True" (the default), or the version with which it finds no GPU
#   FAKE_OP       what compiling does: "ok", "fail" or "hang"
set -euo pipefail
site=$(dirname "$0")/../versions
case "$*" in
    --version) echo "Python 3.11.0" ;;
    "-m venv --clear "*)
        mkdir -p "$4/bin" "$4/versions"
        cp "$0" "$4/bin/python"
        echo "venv" >>"$CALLS"
        ;;
    "-m pip install "*)
        echo "${*:3}" >>"$CALLS"
        if [[ -n ${PIP_REFUSES:-} && "$*" =~ $PIP_REFUSES ]]; then
            echo "ERROR: No matching distribution found"
            exit 1
        fi
        for word in "$@"; do
            [[ $word =~ ^torch==(.*)$ ]] && echo "${BASH_REMATCH[1]}" >"$site/torch"
            [[ $word =~ ^torch\>= ]] && echo 2.13.0 >"$site/torch"
            [[ $word =~ deepspeed|all ]] && echo 0.19.8 >"$site/deepspeed"
        done
        exit 0
        ;;
    *"version(sys.argv[1])"*) cat "$site/${*: -1}" ;;
    *ShareMemCommBuilder*)
        echo "compile" >>"$CALLS"
        mkdir -p "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm"
        case ${FAKE_OP:-ok} in
            fail) echo "shm.cpp: error: no such thing"; exit 1 ;;
            hang) touch "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/lock"; sleep 300 ;;
        esac
        touch "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/deepspeed_shm_comm.so"
        ;;
    "- "* | - | *build_locks.py) exec "$REAL_PYTHON" "$@" ;;
    *cuda.is_available*) echo "${FAKE_CUDA:-True}" ;;
    *python_version*) echo 3.11.0 ;;
    *import*) ;;
    *) echo "fake python was called with: $*" >&2; exit 99 ;;
esac
