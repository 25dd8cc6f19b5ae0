#!/usr/bin/env bash
# Pre-train by recipe on several machines with the DeepSpeed launcher. Start it on one of them.
#
#   HOSTFILE=hostfile bash launch/deepspeed_hostfile.sh RECIPE [--key value ...]
#
# RECIPE is a shipped name or a YAML file; --key value changes any of its keys. --dry-run checks all but training, and shows what would be started. The hosts see this checkout, the data and
# the run's folder under the same paths, and ssh to them works without a password. Settings:
#   HOSTFILE        lines "HOST slots=RANKS" (default: hostfile)
#   LAUNCHER        pdsh (default), openmpi, mpich, or slurm (inside an allocation of these hosts)
#   LAUNCHER_ARGS   for it; Open MPI may need "--mca btl_tcp_if_include 10.0.0.0/24 --mca oob_tcp_if_include 10.0.0.0/24"
#   MASTER_ADDR     of the first host, as the others reach it (default: as the hostfile names it)
#   MASTER_PORT     free on that host (default: 29500)
#   SEND            names of more environment variables that the ranks need
#   DS_ENV_FILE     DeepSpeed's own: a file of lines NAME=VALUE for the ranks, here or in the home folder (default:
#                   .deepspeed_env); they win over what this script sends
# The same command resumes where the last checkpoint was made. A rank that dies ends all; the exit code is 65 if the run
# diverged. SIGTERM, SIGUSR1, Ctrl-C and a lost terminal save first with pdsh; then the exit code is 75. With the others they
# are passed on to mpirun or srun, which may end the ranks before they have saved; Slurm does it better: launch/pretrain.sbatch.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
set -- "${WORDS[@]}"
HOSTFILE=${HOSTFILE:-hostfile} LAUNCHER=${LAUNCHER:-pdsh} MASTER_PORT=${MASTER_PORT:-29500}
check_hostfile "$HOSTFILE"
check_number MASTER_PORT
read -r first slots < <(hosts "$HOSTFILE")
number=$(hosts "$HOSTFILE" | wc -l)
way=$LAUNCHER
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# shellcheck source=launch/environment.sh
source "$ROOT/launch/environment.sh"

read_own_variables
args=("${LAUNCHER_ARGS:-}")
case $way in
pdsh) need pdsh ;;
slurm)
    need srun
    stand_in srun "$(command -v srun)"
    args=("--kill-on-bad-exit=1 --nodes=$number --ntasks-per-node=$slots ${args[0]}")
    ;;
openmpi | mpich)
    # DeepSpeed calls "mpirun", whichever that is: let it be the right one.
    stand_in mpirun "$(find_mpirun "$way")"
    [[ $way == mpich ]] || args=("--bind-to none ${args[0]}") # ranks and their threads share the cores as the system likes
    allow_root
    ;;
*) die "LAUNCHER is \"$way\"; choose pdsh, openmpi, mpich or slurm" ;;
esac
[[ -z ${args[0]// /} ]] && args=() || args=(--launcher_args "${args[0]}")

# srun gives all variables by itself, and finds the first host better than we do.
if [[ $way != slurm ]]; then
    export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT
    variables "$way" >"$scratch/env"
fi
for line in "${OWN[@]}"; do printf '%s\n' "$line"; done >>"$scratch/env" # of two lines about a variable the later wins
export DS_ENV_FILE=$scratch/env
words=("$1" --engine deepspeed "${@:2}")
[[ $way != pdsh ]] || mapfile -d '' -t words < <(for_remote_shell "${words[@]}")

# DeepSpeed's launcher does not let ranks save before it ends them.
# shellcheck disable=SC2329 # called by attend
stop() {
    case $way in
    pdsh) # the ranks are children of DeepSpeed's launcher on each host
        PDSH_RCMD_TYPE=ssh pdsh -f 1024 -w "$(hosts "$HOSTFILE" | cut -d' ' -f1 | paste -sd,)" \
            "pgrep -f '^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*--master_port=$MASTER_PORT ' | xargs -r -n1 pkill -TERM -P" &
        ;;
    openmpi) pkill -USR1 -P "$LAUNCHER" ;; # mpirun passes this one on; after TERM it kills
    *) pkill -TERM -P "$LAUNCHER" ;;
    esac
}

WORLD=$(hosts "$HOSTFILE" | awk '{n += $2} END {print n}')
remember "$1" --engine deepspeed "${@:2}"
code=0
# The program by its path: not every launcher of DeepSpeed can start a module.
attend quietly deepspeed --hostfile "$HOSTFILE" --force_multi --launcher "$way" --no_ssh_check --no_local_rank \
    --log_level=error --master_addr "${MASTER_ADDR:-$first}" --master_port "$MASTER_PORT" "${args[@]}" \
    "$(command -v frugal-dist)" pretrain "${words[@]}" || code=$?
verdict "$code" "$@"
