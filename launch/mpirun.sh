#!/usr/bin/env bash
# Pre-train by recipe with mpirun, of Open MPI or MPICH. Ranks find each other with mpi4py.
#
#   bash launch/mpirun.sh RECIPE [--key value ...]
#   HOSTFILE=hostfile bash launch/mpirun.sh llama_1b --deepspeed ds_configs/zero2_bf16.json
#
# RECIPE is a shipped name or a YAML file; --key value changes any of its keys. --dry-run checks all but training, and shows what would be started. Settings, all optional:
#   RANKS         ranks in all (default: those of HOSTFILE, or one per GPU of this machine, or one)
#   HOSTFILE      lines "HOST slots=RANKS"; hosts see this checkout, the data and the run's folder under the same paths
#   MPIRUN        which mpirun (default: the first that is found)
#   MPIRUN_ARGS   more for mpirun, such as "--mca btl_tcp_if_include 10.0.0.0/24"
#   MASTER_ADDR   of the host of rank 0, as the others reach it, and MASTER_PORT, free there: instead of mpi4py
#   SEND          names of more environment variables that the ranks need
# The same command resumes where the last checkpoint was made. A rank that dies ends all, and is named: by MPICH sometimes
# only as process and host. Ctrl-C and SIGTERM end the run without saving: MPI gives ranks no time.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "${BASH_SOURCE[0]}" "$@"
set -- "${WORDS[@]}"
mpirun=$(find_mpirun any)
flavour=$(flavour_of "$mpirun")
allow_root
if [[ -n ${HOSTFILE:-} ]]; then
    check_hostfile "$HOSTFILE"
    RANKS=${RANKS:-$(hosts "$HOSTFILE" | awk '{n += $2} END {print n}')}
fi
RANKS=${RANKS:-$(default_ranks)}
check_number RANKS
read -ra more <<<"${MPIRUN_ARGS:-}"

# mpi4py must load the library that this mpirun belongs to.
export MPI4PY_MPIABI=${MPI4PY_MPIABI:-$flavour}
libraries() { PATH=$PATH:/sbin:/usr/sbin ldconfig -p || true; } # Debian has it there, and not on ordinary users' PATH
if [[ $flavour == mpich ]] && ! grep -q 'libmpi\.so\.12 ' < <(libraries); then
    # Debian and Ubuntu give MPICH's library another name than mpi4py looks for. The checkout is seen by all hosts.
    library=$(libraries | sed -n 's/.*libmpich\.so\.12 .*=> //p' | sed -n 1p)
    if [[ -n $library ]]; then
        mkdir -p "$ROOT/.cache/mpich"
        ln -sfn "$library" "$ROOT/.cache/mpich/libmpi.so.12"
        export LD_LIBRARY_PATH=$ROOT/.cache/mpich${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
fi
mapfile -t names < <(sent)
args=(-n "$RANKS")
if [[ $flavour == mpich ]]; then
    [[ -z ${HOSTFILE:-} ]] || args+=(-hosts "$(hosts "$HOSTFILE" | awk '{print $1 ":" $2}' | paste -sd,)")
    args+=(-genvlist "$(IFS=,; echo "${names[*]}")")
else
    args+=(--bind-to none) # ranks and their threads share the cores as the system likes
    if [[ -n ${HOSTFILE:-} ]]; then args+=(--hostfile "$HOSTFILE"); else args+=(--oversubscribe); fi
    for name in "${names[@]}"; do args+=(-x "$name"); done
fi
WORLD=$RANKS
remember "$@"
[[ -z $DRY_RUN ]] || show "$mpirun" "${args[@]}" "${more[@]}" python -u -m frugal_dist.cli pretrain "$@"
exec "$mpirun" "${args[@]}" "${more[@]}" python -u -m frugal_dist.cli pretrain "$@" </dev/null
