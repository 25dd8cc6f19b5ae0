#!/usr/bin/env bash
# Pre-train a small LLaMA-style model on real English with FRUGAL under DeepSpeed, from nothing but Python.
#
#   bash launch/quickstart.sh [--steps N] [--dry-run]
#
# Makes .venv, prepares text and tokenizer (both only once), then trains on 2 ranks, or on one rank per GPU if there are
# GPUs. The optimizer and ZeRO stage are those of ds_configs/quickstart_zero2.json. Settings, all optional:
#   RUN_DIR     folder for metrics, picture and checkpoint (default: runs/quickstart-DATE-TIME)
#   DATA_DIR    folder of the prepared text (default: .cache/quickstart)
#   CONFIG      another DeepSpeed JSON
set -euo pipefail

# What the caller names is meant from where the caller stands.
for name in RUN_DIR DATA_DIR CONFIG; do
    [[ -z ${!name:-} || ${!name} == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'quickstart: %s\n' "$*"; }
die() { printf 'quickstart: ERROR: %s\n' "$*" >&2; exit 1; }
mistake() { printf 'quickstart: ERROR: %s\n' "$*" >&2; exit 2; }

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

STEPS=() DRY_RUN=''
while (($#)); do
    case $1 in
        --steps)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || mistake "--steps needs a number above 0, found \"${2:-}\""
            STEPS=(--steps "$2")
            shift 2
            ;;
        -h | --help) usage; exit 0 ;;
        --dry-run) DRY_RUN=1; shift ;;
        *) mistake "unknown option \"$1\"; there are --steps N, --dry-run and --help" ;;
    esac
done

RUN_DIR=${RUN_DIR:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}
DATA_DIR=${DATA_DIR:-.cache/quickstart}
CONFIG=${CONFIG:-ds_configs/quickstart_zero2.json}
[[ -r $CONFIG ]] || mistake "there is no DeepSpeed configuration $CONFIG"
[[ ! -e $RUN_DIR/metrics.jsonl ]] || mistake "$RUN_DIR already holds a run; choose another RUN_DIR"
if [[ -n $DRY_RUN ]]; then
    bash launch/setup.sh --dry-run train,deepspeed,demo
    say "would prepare the data in $DATA_DIR, then train with $CONFIG into $RUN_DIR"
    exit 0
fi

# --- every phase runs in a process group of its own, so that stopping leaves nobody behind -------------------------------

CHILD=
stop() {
    local code=$1 attempt
    trap '' INT TERM HUP
    if [[ -n $CHILD ]]; then
        # TERM for all at once: the deepspeed command alone would not pass it on to the ranks.
        kill -TERM -- "-$CHILD" 2>/dev/null || true
        for attempt in {1..100}; do
            kill -0 -- "-$CHILD" 2>/dev/null || break
            sleep 0.1
        done
        ((attempt < 100)) || kill -KILL -- "-$CHILD" 2>/dev/null || true
    fi
    printf '\nquickstart: stopped; the same command starts again\n' >&2
    exit "$code"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

in_group() {
    local rc=0
    set -m
    "$@" </dev/null &
    CHILD=$!
    set +m
    wait "$CHILD" 2>/dev/null || rc=$?
    CHILD=
    return "$rc"
}

# --- 1. environment, 2. data ---------------------------------------------------------------------------------------------

in_group bash launch/setup.sh train,deepspeed,demo || exit $?
export PATH=$PWD/.venv/bin:$PATH
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

in_group frugal-dist demo prepare --data "$DATA_DIR" || die "preparing the data failed"

# --- 3. training ---------------------------------------------------------------------------------------------------------

# ranks: 2 without GPU; else as many as there are GPUs, or fewer where the batch cannot be cut equally.
ranks() {
    python - "$CONFIG" <<'PY'
import json, sys
import torch
batch = json.load(open(sys.argv[1]))["train_batch_size"]
gpus = torch.cuda.device_count()
print(gpus, max(n for n in range(1, (gpus or 2) + 1) if batch % n == 0))
PY
}
read -r GPUS RANKS < <(ranks) || die "cannot read train_batch_size from $CONFIG"
((GPUS > 0)) || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
# shellcheck source=launch/gpus.sh
source launch/gpus.sh
pick_gpus "$RANKS"
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir -p "$RUN_DIR"
say "training on $RANKS ranks ($GPUS GPUs) into $RUN_DIR; DeepSpeed starts in a moment, Ctrl-C stops"

# The launcher's code alone proves nothing: it is 0 when the ranks were killed by a signal. The report is written last.
if ! in_group deepspeed "${PICKED[@]}" --master_port "$PORT" --no_local_rank --log_level=error \
    --module frugal_dist.cli demo train --data "$DATA_DIR" --run "$RUN_DIR" --config "$CONFIG" "${STEPS[@]}" ||
    [[ ! -e $RUN_DIR/report.txt ]]; then
    if [[ -e $RUN_DIR/output.txt ]]; then
        printf -- '--- last lines of %s\n' "$RUN_DIR/output.txt" >&2
        tail -n 30 "$RUN_DIR/output.txt" >&2
    fi
    die "the training failed"
fi
