#!/usr/bin/env bash
# Installs what the image tests need from Debian or Ubuntu: buildah, debootstrap. Started by tests/run.sh --all.
#
# Does nothing where both are there, or where it may not (no root, no apt-get): then the tests are skipped, and say why.
set -euo pipefail

say() { printf 'image packages: %s\n' "$*"; }
PATH=$PATH:/usr/sbin:/sbin
packages=()
for name in buildah debootstrap; do
    command -v "$name" >/dev/null || packages+=("$name")
done
((${#packages[@]})) || exit 0
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    say "${packages[*]} missing; installed by root with apt-get, the image tests would run"
    exit 0
fi
say "installing ${packages[*]}"
log=$(mktemp)
{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"; } \
    >"$log" 2>&1 </dev/null || { tail -n 5 "$log"; say "apt-get failed; the image tests are skipped"; }
rm -f "$log"
