# shellcheck shell=bash
# What the launch scripts share; they source it. It finds the environment and says what goes to other hosts.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NAME=$(basename "$0")

say() { printf '%s: %s\n' "$NAME" "$*"; }
die() { printf '%s: ERROR: %s\n' "$NAME" "$*" >&2; exit 2; }
# shellcheck source=launch/gpus.sh
source "$ROOT/launch/gpus.sh"

# begin SCRIPT "$@": the comment at SCRIPT's top is its help; then the environment in which everything below runs. WORDS
# becomes "$@" without --dry-run, which makes DRY_RUN 1: all is checked, and what would be started is shown.
begin() {
    local script=$1 word
    NAME=$(basename "$script")
    if [[ $# == 1 || $2 == -h || $2 == --help ]]; then
        sed -n '2,/^set /{/^#SBATCH/d;/^# \{0,1\}/!d;s///p}' "$script"
        exit 0
    fi
    DRY_RUN='' WORDS=()
    for word in "${@:2}"; do
        if [[ $word == --dry-run ]]; then DRY_RUN=1; else WORDS+=("$word"); fi
    done
    ((${#WORDS[@]})) || die "--dry-run of what? RECIPE is missing; --help says more"
    [[ ${WORDS[0]} != -* ]] || die "the recipe comes first, then its keys: bash launch/$NAME RECIPE ${WORDS[0]} ..."
    # The checkout's own environment (launch/setup.sh), or else whatever the caller has activated.
    [[ ! -x $ROOT/.venv/bin/python ]] || export PATH=$ROOT/.venv/bin:$PATH
    command -v frugal-dist >/dev/null ||
        die "frugal-dist is not installed: run \"bash launch/setup.sh train,deepspeed,mpi\", or activate your environment"
    [[ ! -d $ROOT/.cache/torch_extensions ]] ||
        export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$ROOT/.cache/torch_extensions}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun does: ranks share the cores
}

# need COMMAND: it must be there.
need() { command -v "$1" >/dev/null || die "there is no command $1 on this machine; install it"; }

# check_number NAME...: the variables of these names hold whole numbers above 0.
check_number() {
    local name
    for name; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name is \"${!name}\"; give a whole number above 0"
    done
}

# check_hostfile FILE: lines "HOST slots=N", the form that DeepSpeed and Open MPI share.
check_hostfile() {
    [[ -r $1 ]] || die "there is no hostfile \"$1\"; write one line \"HOST slots=RANKS\" per host, and set HOSTFILE"
    local bad
    bad=$(grep -nvE '^[[:space:]]*(#.*)?$|^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$' "$1" | head -n 1) || true
    [[ -z $bad ]] || die "hostfile $1, line $bad: \"HOST slots=RANKS\" is needed"
    [[ -n $(hosts "$1") ]] || die "hostfile $1 names no host"
}

# hosts FILE: "HOST RANKS" per line.
hosts() { sed -n 's/^[[:space:]]*\([^#[:space:]]*\)[[:space:]]*slots=\([0-9]*\).*/\1 \2/p' "$1"; }

# quietly COMMAND...: become DeepSpeed's launcher. Where this host has no GPU it shall not guess, aloud, what to use instead.
# Ranks decide for themselves: they may be on other hosts than this.
quietly() {
    (($(gpus) > 0)) || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    exec "$@"
}

# a_port: one that is free here now. Ports of other hosts cannot be tried: set MASTER_PORT if theirs is taken.
a_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

SENT_TOO='NCCL|GLOO|FI|UCX|HF|TOKENIZERS|CUDA|WANDB|MLFLOW|FRUGAL|PYTORCH|TRITON'
SENT_PROXIES='(https?|ftp|all|no)_proxy|(HTTPS?|FTP|ALL|NO)_PROXY'
# sent: names of the variables that ranks on other hosts need as well. More of them: SEND="NAME1 NAME2".
sent() {
    compgen -e | grep -xE \
        "PATH|LD_LIBRARY_PATH|PYTHON.*|OMP_.*|TORCH.*|DS_ACCELERATOR|MASTER_(ADDR|PORT)|MPI4PY_.*|($SENT_TOO)_.*|$SENT_PROXIES${SEND:+|${SEND// /|}}" |
        grep -vxE 'CUDA_VISIBLE_DEVICES' || true
}

# find_mpirun FLAVOUR: the mpirun of "openmpi", "mpich" or "any"; MPIRUN names one.
find_mpirun() {
    local candidate
    for candidate in ${MPIRUN:-mpirun mpirun.openmpi mpirun.mpich}; do
        if command -v "$candidate" >/dev/null && [[ $1 == any || $(flavour_of "$candidate") == "$1" ]]; then
            command -v "$candidate"
            return
        fi
    done
    die "there is no mpirun ($1; tried: ${MPIRUN:-mpirun, mpirun.openmpi, mpirun.mpich}); install one, or set MPIRUN"
}

# flavour_of MPIRUN: openmpi or mpich.
flavour_of() {
    local text
    text=$("$1" --version 2>/dev/null || true)
    case $text in
    *"Open MPI"* | *OpenRTE* | *PRRTE*) echo openmpi ;;
    *HYDRA* | *MPICH* | *"Intel(R) MPI"*) echo mpich ;;
    *) echo unknown ;;
    esac
}

# allow_root: Open MPI refuses root unless told twice; in containers there is nobody else.
allow_root() { [[ $(id -u) != 0 ]] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; }

# attend COMMAND...: run it as LAUNCHER and return its exit code. TERM, USR1 and INT become `stop SIGNAL`, which the script
# defines, and a lost terminal (HUP, unless nohup keeps it away) becomes `stop TERM`. A process group of its own keeps
# Ctrl-C from the launcher, which would leave its ranks behind.
attend() {
    local code signal signalled=1
    [[ -z ${DRY_RUN:-} ]] || show "$@"
    for signal in TERM USR1 INT HUP; do
        # shellcheck disable=SC2064 # the signal of now
        trap "signalled=1; stop ${signal/HUP/TERM}" "$signal"
    done
    set -m
    "$@" </dev/null &
    LAUNCHER=$!
    set +m
    while ((signalled)); do # a signal ends wait early
        signalled=0 code=0
        wait "$LAUNCHER" || code=$?
    done
    trap - TERM USR1 INT HUP
    return "$code"
}

# show COMMAND...: what --dry-run shows in place of starting it.
show() {
    [[ $(type -t "$1") != function ]] || shift
    printf '%s: would start:' "$NAME"
    printf ' %q' "$@"
    printf '\n'
    exit 0
}

# record RECIPE [--key value ...]: how the run's record ends, and which record that is.
record() {
    python - "$@" <<'PY'
import sys
from pathlib import Path

from frugal_dist.training.metrics.record import METRICS_FILE, of_kind, read_metrics
from frugal_dist.training.recipe import read_recipe

try:
    folder = Path(read_recipe(sys.argv[1], sys.argv[2:]).folder)
    records = read_metrics(folder)
    print(records[-1]["kind"], len(of_kind(records, "run")), (folder / METRICS_FILE).stat().st_mtime_ns)
except (ValueError, IndexError):
    print("nothing")
PY
}

# check RECIPE [--key value ...]: ends the script with 2 if the recipe cannot be trained, or its folder is in use or holds
# another recipe's run: before ranks are started, of which each would say so, and launchers much more. Prints the folder.
check() {
    python - "$@" <<'PY'
import sys
from pathlib import Path

from frugal_dist.training.distributed.run_lock import check_free
from frugal_dist.training.recipe import check_recipe, read_recipe
from frugal_dist.training.resume import check_resumable
from frugal_dist.training.run import FAILURE_FILE

try:
    recipe = read_recipe(sys.argv[1], sys.argv[2:])
    check_recipe(recipe)
    check_resumable(recipe)
    check_free(Path(recipe.folder), lambda text: print(text, file=sys.stderr))
except ValueError as error:
    sys.exit(f"ERROR: {error}")
print(Path(recipe.folder) / FAILURE_FILE)
PY
}

# remember RECIPE [--key value ...]: before the launch, which a mistake in the recipe ends. What an earlier start has
# recorded says nothing about this one. A dry run checks all that shows before the first step, for WORLD ranks if it is set.
remember() {
    say "checking $1 ..." >&2
    if [[ -n ${DRY_RUN:-} ]]; then
        python -m frugal_dist.cli recipe check "$@" ${WORLD:+--ranks "$WORLD"} || exit
        return
    fi
    FAILURE=$(check "$@") || exit 2
    rm -f "$FAILURE"
    BEFORE=$(record "$@")
}

# ended RECIPE [--key value ...]: "finished", "stopped" (saved, as told to), "diverged" or "broken": what this start has
# recorded last.
ended() {
    local now
    now=$(record "$@")
    [[ $now != "$BEFORE" ]] || now=nothing
    case $now in
    summary*) echo finished ;;
    stopped*) echo stopped ;;
    diverged*) echo diverged ;;
    *) echo broken ;;
    esac
}

# verdict CODE RECIPE [--key value ...]: the exit code of a launch whose launcher ended with CODE: 75 if the run has
# stopped as told, 65 if it has diverged. Launchers may end with 0 though their ranks died, or with a code of their own.
verdict() {
    local code=$1 how
    how=$(ended "${@:2}")
    case $how in
    stopped) return 75 ;;
    diverged) return 65 ;; # to resume would end the same
    esac
    if [[ $how == broken && -s ${FAILURE:-} ]]; then # what a rank has said is hard to find in what launchers say after it
        printf '\n%s: ERROR: %s\n' "$NAME" "$(tail -n +2 "$FAILURE")" >&2
        return "$(head -n 1 "$FAILURE")"
    fi
    if [[ $how == broken && $code == 0 ]]; then
        printf '%s: ERROR: the launcher ended well, but the run did not finish: its ranks were killed\n' "$NAME" >&2
        return 1
    fi
    return "$code"
}
