#!/usr/bin/env bash
# Pre-train by recipe on several machines with the DeepSpeed launcher. Start it on one of them.
#
#   HOSTFILE=hostfile bash launch/deepspeed_hostfile.sh RECIPE [--key value ...]
#
# RECIPE is a shipped name or a YAML file; --key value changes any of its keys. The hosts see this checkout, the data and
# the run's folder under the same paths, and ssh to them works without a password. Settings:
#   HOSTFILE        lines "HOST slots=RANKS" (default: hostfile)
#   LAUNCHER        pdsh (default), openmpi, mpich, or slurm (inside an allocation of these hosts)
#   LAUNCHER_ARGS   for it; Open MPI may need "--mca btl_tcp_if_include 10.0.0.0/24 --mca oob_tcp_if_include 10.0.0.0/24"
#   MASTER_ADDR     of the first host, as the others reach it (default: as the hostfile names it)
#   MASTER_PORT     free on that host (default: 29500)
#   SEND            names of more environment variables that the ranks need
# The same command goes on where the last checkpoint was made. A rank that dies ends all. Ctrl-C and SIGTERM save first
# with pdsh only; Slurm does it better: launch/pretrain.sbatch.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
HOSTFILE=${HOSTFILE:-hostfile} LAUNCHER=${LAUNCHER:-pdsh} MASTER_PORT=${MASTER_PORT:-29500}
check_hostfile "$HOSTFILE"
check_number MASTER_PORT
read -r first slots < <(hosts "$HOSTFILE")
number=$(hosts "$HOSTFILE" | wc -l)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

args=("${LAUNCHER_ARGS:-}")
case $LAUNCHER in
pdsh) need pdsh ;;
slurm)
    need srun
    args=("--kill-on-bad-exit=1 --nodes=$number --ntasks-per-node=$slots ${args[0]}")
    ;;
openmpi | mpich)
    # DeepSpeed calls "mpirun", whichever that is: let it be the right one.
    mpirun=$(find_mpirun "$LAUNCHER")
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$mpirun" >"$scratch/mpirun"
    chmod +x "$scratch/mpirun"
    export PATH=$scratch:$PATH
    allow_root
    ;;
*) die "LAUNCHER is \"$LAUNCHER\"; choose pdsh, openmpi, mpich or slurm" ;;
esac
[[ -z ${args[0]// /} ]] && args=() || args=(--launcher_args "${args[0]}")

# DeepSpeed gives few variables to the other hosts; more of them by a file of this form. srun gives all by itself, and
# finds the first host better than we do.
if [[ $LAUNCHER != slurm ]]; then
    export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT
    export DS_ENV_FILE=$scratch/env
    sent | while read -r name; do
        printf '%s=%s\n' "$name" "${!name}"
    done >"$DS_ENV_FILE"
fi

# The program by its path: not every launcher of DeepSpeed can start a module.
code=0
deepspeed --hostfile "$HOSTFILE" --force_multi --launcher "$LAUNCHER" --no_ssh_check --no_local_rank --log_level=error \
    --master_addr "${MASTER_ADDR:-$first}" --master_port "$MASTER_PORT" "${args[@]}" \
    "$(command -v frugal-dist)" pretrain "$1" --engine deepspeed "${@:2}" </dev/null || code=$?
((code)) || confirm "$@" || code=$?
exit "$code"
