#!/usr/bin/env bash
# The test command: sets up .venv if needed, then style, types and tests.
#
#   bash tests/run.sh [--all | --gpu] [-- PYTEST ARGUMENTS]
#
#   --all    also the tests marked heavy (long, or much memory)
#   --gpu    only the tests in tests/gpu, on this machine's GPUs, with what is installed (.venv, or a python with torch, pytest
#            and pytest-timeout). Where there is a GPU, the default command runs them as well.
# Every step runs even when an earlier one failed; the summary at the end and the exit status tell.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

heavy=() gpu=''
while (($#)); do
    case $1 in
    --all) heavy=(--heavy) ;;
    --gpu) gpu=1 ;;
    --) shift; break ;;
    *) printf 'usage: bash tests/run.sh [--all | --gpu] [-- PYTEST ARGUMENTS]\n' >&2; exit 2 ;;
    esac
    shift
done

# On one process: several would compile the same kernels and time each other.
on_gpu() { HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD python -m pytest --gpu tests/gpu "$@"; }
if [[ -n $gpu ]]; then
    [[ ! -d .venv ]] || export PATH=$PWD/.venv/bin:$PATH
    on_gpu "$@"
    exit
fi

export TORCH_EXTENSIONS_DIR=$PWD/.cache/torch_extensions # whatever it was: what is built here is used here
bash launch/setup.sh all,dev || exit
bash tests/launch/packages.sh
if ((${#heavy[@]})); then
    bash tests/launch/image_packages.sh
    bash tests/authors_packages.sh
fi

export PATH=$PWD/.venv/bin:$PATH
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The tensors of tests are small and several processes share the cores: threads would only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

trap "exit 130" INT
summary=() failed=0
step() {
    local name=$1 start=$SECONDS verdict=ok
    shift
    printf '\n== %s\n' "$name"
    "$@" || { verdict=FAILED; failed=1; }
    summary+=("$(printf '%-14s %-7s %4d s' "$name" "$verdict" "$((SECONDS - start))")")
}

step "ruff check" ruff check .
step "ruff format" ruff format --check .
step "mypy" mypy
step "shellcheck" shellcheck -x .ci/run docker/*.sh launch/*.sh launch/*.sbatch tests/*.sh tests/launch/*.sh
# One worker per core, at most 4: most tests start no processes, but some start as many ranks as there are workers.
cores=$(getconf _NPROCESSORS_ONLN) # not nproc, which heeds OMP_NUM_THREADS
workers=$((cores < 4 ? cores : 4))
step "pytest" python -m pytest -n "$workers" --dist loadgroup "${heavy[@]}" "$@"
if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    step "pytest, GPU" on_gpu "$@"
fi

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
((${#heavy[@]})) || printf 'Heavy tests were not run; "bash tests/run.sh --all" does. What was skipped and why stands above.\n'
exit "$failed"
