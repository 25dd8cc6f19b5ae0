#!/usr/bin/env bash
# Pre-train a small LLaMA-style model on real English with FRUGAL under DeepSpeed ZeRO-2, from nothing but Python.
#
#   bash launch/quickstart.sh [--steps N] [--dry-run] [--key value ...]
#
# Makes .venv, prepares text and tokenizer (both only once), runs the recipe reviews_5m with launch/deepspeed.sh, a little
# shorter, and draws its picture. --key value changes any key of the recipe, such as --optimizer.name adamw; the same
# RUN_DIR resumes where it was stopped. Settings, all optional:
#   RUN_DIR     folder for metrics, picture and checkpoints, as --folder (default: runs/quickstart-DATE-TIME)
#   DATA_DIR    folder of the prepared text (default: .cache/quickstart)
#   CONFIG      a DeepSpeed JSON, for another stage; optimizer, batch and precision are the recipe's
#   RANKS       ranks (default: one per GPU, 2 without GPU)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
NAME=quickstart

# What the caller names is meant from where the caller stands.
for name in RUN_DIR DATA_DIR CONFIG; do
    [[ -z ${!name:-} || ${!name} == /* ]] || printf -v "$name" '%s/%s' "$PWD" "${!name}"
done
HERE=$PWD
cd "$ROOT"

DRY_RUN='' CHANGES=()
while (($#)); do
    case $1 in
    -h | --help)
        sed -n '2,/^set /{/^# \{0,1\}/!d;s///p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --dry-run) DRY_RUN=1 ;;
    --steps | --steps=*) # before minutes of installing
        [[ $1 == *=* ]] || { set -- "$1=${2:-}" "${@:3}"; }
        [[ ${1#*=} =~ ^[1-9][0-9]*$ ]] || die "--steps needs a number above 0, found \"${1#*=}\""
        CHANGES+=("$1")
        ;;
    --folder | --folder=*) # that of the picture, too
        [[ $1 == *=* ]] || { set -- "$1=${2:-}" "${@:3}"; }
        RUN_DIR=${1#*=}
        [[ -n $RUN_DIR ]] || die "--folder needs a value: --folder DIR"
        [[ $RUN_DIR == /* ]] || RUN_DIR=$HERE/$RUN_DIR
        ;;
    --?*=*) CHANGES+=("$1") ;;
    --?*)
        (($# > 1)) || die "$1 needs a value: $1 VALUE"
        CHANGES+=("$1" "$2")
        shift
        ;;
    *) die "unknown option \"$1\"; there are --steps N, --dry-run, --help and the recipe's keys, --KEY VALUE" ;;
    esac
    shift
done
RUN_DIR=${RUN_DIR:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}
DATA_DIR=${DATA_DIR:-.cache/quickstart}
[[ -z ${CONFIG:-} || -r $CONFIG ]] || die "there is no DeepSpeed configuration $CONFIG"
if [[ -n $DRY_RUN ]]; then
    bash launch/setup.sh --dry-run train,deepspeed,demo
    say "would prepare the data in $DATA_DIR, then train into $RUN_DIR"
    [[ -x .venv/bin/frugal-dist && -r $DATA_DIR/prepared.json ]] || exit 0 # what a check needs is still to be made
fi

# Every phase ends as a whole: the training saves first.
SIGNAL=''
# shellcheck disable=SC2329 # called by attend
stop() {
    SIGNAL=$1
    kill -TERM -- "-$LAUNCHER" 2>/dev/null || true
}

# phase COMMAND...: it must end well. Exit code after a signal: 75 if the run was saved.
phase() {
    local code=0
    attend "$@" || code=$?
    if [[ -n $SIGNAL ]]; then
        say "stopped; to resume: RUN_DIR=$RUN_DIR bash launch/quickstart.sh ${CHANGES[*]}" >&2
        ((code == 75)) || code=$((128 + $(kill -l "$SIGNAL")))
    fi
    ((code == 0)) || exit "$code"
}

[[ -n $DRY_RUN ]] || phase bash launch/setup.sh train,deepspeed,demo
export PATH=$PWD/.venv/bin:$PATH
[[ -n $DRY_RUN ]] || phase frugal-dist demo prepare --data "$DATA_DIR"

if [[ -z ${RANKS:-} ]]; then
    most=$(gpus)
    for RANKS in 8 4 2 1; do ((RANKS > (most > 0 ? most : 2))) || break; done # which divide the batch
fi
export RANKS
training=(
    bash launch/deepspeed.sh reviews_5m --folder "$RUN_DIR" --data.path "$DATA_DIR" --data.epochs 10
    --steps 500 --batch 8 --optimizer.lr 1.5e-3 --clip 1 --precision fp32 --evaluate_every 125 --evaluation_tokens 32768
    ${CONFIG:+--deepspeed "$CONFIG"} "${CHANGES[@]}"
)
[[ -z $DRY_RUN ]] || exec "${training[@]}" --dry-run
say "training on $RANKS ranks into $RUN_DIR; DeepSpeed starts in a moment, Ctrl-C saves and stops"
phase "${training[@]}"
phase frugal-dist plot "$RUN_DIR"
say "metrics: $RUN_DIR/metrics.jsonl; a model for transformers: .venv/bin/frugal-dist export $RUN_DIR --out DIR"
say "next: bash launch/quickstart.sh --optimizer.name adamw (or galore, frugal-columns), then frugal-dist plot of both runs"
