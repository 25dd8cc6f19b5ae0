#!/usr/bin/env bash
# Installs what the launch tests need from Debian or Ubuntu: Slurm, ssh, pdsh, two MPIs. Started by tests/run.sh.
#
# Does nothing where all is there, or where it may not (no root, no apt-get): then it says what is missing, and the tests
# that need it are skipped. No daemon is started.
set -euo pipefail

say() { printf 'packages: %s\n' "$*"; }
declare -A provides=(
    [slurmctld]=slurm-wlm [munged]=munge [sshd]=openssh-server [ssh]=openssh-client [pdsh]=pdsh [ip]=iproute2
    [nsenter]=util-linux [pgrep]=procps [mpirun.openmpi]=openmpi-bin [mpirun.mpich]=mpich
)
PATH=$PATH:/usr/sbin:/sbin
packages=()
for command in "${!provides[@]}"; do
    command -v "$command" >/dev/null || packages+=("${provides[$command]}")
done
((${#packages[@]})) || exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    say "missing for some launch tests: ${packages[*]}; install them as root (apt-get install) to run these tests"
    exit 0
fi

# Debian starts a daemon as soon as it is installed, unless this file forbids it.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
say "installing for the launch tests: ${packages[*]}"
log=$(mktemp)
if { apt-get update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y --no-install-recommends "${packages[@]}"; } \
    >"$log" 2>&1 </dev/null; then
    say "done in $SECONDS s"
else
    tail -n 5 "$log"
    say "apt-get failed; the tests that need these packages are skipped"
fi
rm -f "$log"
