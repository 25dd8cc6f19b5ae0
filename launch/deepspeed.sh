#!/usr/bin/env bash
# Pre-train by recipe on this machine with the DeepSpeed launcher.
#
#   bash launch/deepspeed.sh RECIPE [--key value ...]
#   bash launch/deepspeed.sh llama_1b --deepspeed ds_configs/zero2_bf16.json --steps 1000
#
# RECIPE is a shipped name or a YAML file; --key value changes any of its keys. --dry-run checks all but training, and shows what would be started. Settings, all optional:
#   RANKS         ranks (default: one per GPU, or one); CUDA_VISIBLE_DEVICES says which GPUs, by number
#   MASTER_PORT   a port of this machine that is free (default: found)
# The same command resumes where the last checkpoint was made. SIGTERM, SIGUSR1, Ctrl-C and a lost terminal save first; then
# the exit code is 75; 65 if the run diverged. A rank that dies ends all.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
set -- "${WORDS[@]}"
RANKS=${RANKS:-$(default_ranks)} MASTER_PORT=${MASTER_PORT:-$(a_port)}
check_number RANKS MASTER_PORT
pick_gpus "$RANKS"

# DeepSpeed passes signals on to nobody: the ranks, which are its grandchildren, get them from here.
# shellcheck disable=SC2329 # called by attend
stop() {
    local ranks
    mapfile -t ranks < <(pgrep -P "$(pgrep -d, -P "$LAUNCHER")")
    ((${#ranks[@]})) && kill -TERM "${ranks[@]}" 2>/dev/null || kill -TERM -- "-$LAUNCHER" 2>/dev/null || true
}

WORLD=$RANKS
remember "$1" --engine deepspeed "${@:2}"
code=0
attend quietly deepspeed "${PICKED[@]}" --master_port "$MASTER_PORT" --no_local_rank --log_level=error \
    --module frugal_dist.cli pretrain "$1" --engine deepspeed "${@:2}" || code=$?
verdict "$code" "$@"
