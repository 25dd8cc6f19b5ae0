#!/usr/bin/env bash
# Pre-train by recipe with torchrun, on one machine or several. On several, start it on every one of them.
#
#   bash launch/torchrun.sh RECIPE [--key value ...]
#   bash launch/torchrun.sh llama_60m --engine ddp
#   NODES=2 MASTER=node1:29500 bash launch/torchrun.sh llama_1b --engine fsdp2        # on both machines
#
# RECIPE is a shipped name or a YAML file; --key value changes any of its keys. --dry-run checks all but training, and shows what would be started. Machines see the run's folder under the
# same path. Settings, all optional:
#   RANKS      ranks on each machine (default: one per GPU, or one)
#   NODES      machines
#   MASTER     HOST:PORT of one of the machines, where all can reach it; a port that is free there
#   JOB        a name that the machines of one run share, if several runs use the same MASTER
#   RESTARTS   how often all ranks start again, from the last checkpoint, after one died (default: 0)
#   GRACE      seconds that ranks get to save after SIGTERM (default: 120; with torch 2.11 always 30)
# The same command resumes where the last checkpoint was made. SIGTERM, SIGUSR1, Ctrl-C and a lost terminal save first; then
# the exit code is 75; 65 if the run diverged. A rank that dies is named in torchrun's report, and ends all or starts all again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
set -- "${WORDS[@]}"
RANKS=${RANKS:-$(default_ranks)} NODES=${NODES:-1} GRACE=${GRACE:-120} RESTARTS=${RESTARTS:-0}
check_number RANKS NODES GRACE
[[ $RESTARTS =~ ^[0-9]+$ ]] || die "RESTARTS is \"$RESTARTS\"; give a whole number"
if ((NODES > 1)); then
    [[ ${MASTER:-} == *:* ]] || die "NODES is $NODES, so MASTER must be HOST:PORT of one of the machines, the same on all"
else
    MASTER=${MASTER:-localhost:0}
fi

# Without this a restart finds the store of the ranks before it, and hangs (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE # which torch 2.11 ignores; its option would be an error there

# shellcheck disable=SC2329 # called by attend
stop() { kill "-$1" "$LAUNCHER" 2>/dev/null || true; } # torchrun passes it on; it may just have ended

# told ARGUMENTS...: become torchrun, without the traceback that it ends with when it is told to stop.
told() {
    exec python -c '# torchrun
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException as error:
    sys.exit(128 + error.sigval)' "${@:2}"
}

WORLD=$((RANKS * NODES))
remember "$@"
code=0
attend told torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "${JOB:-frugal}" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    -m frugal_dist.cli pretrain "$@" || code=$?
((code == 0)) || verdict "$code" "$@" # torchrun itself ends with 1 whatever its ranks say
