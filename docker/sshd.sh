#!/usr/bin/env bash
# An ssh server for `deepspeed --hostfile` over containers, without root: bash docker/sshd.sh (in images: frugal-sshd).
#
# Needs an image built with WITH_SSH=1. One key pair for all nodes, mounted or given:
#   SSH_KEY     private key (default: ~/.ssh/id_ed25519); its public half is the only one that may log in
#   SSH_PORT    port to listen on, the same on every node (default: 2222)
# Host keys are made at every start and never part of the image, so clients cannot know them: ~/.ssh/config, which this
# writes for the nodes' own connections, accepts them. Use it in a network of your own, as between pods or in a cluster.
set -euo pipefail

die() { printf 'sshd: ERROR: %s\n' "$*" >&2; exit 1; }

SSH_PORT=${SSH_PORT:-2222}
SSH_KEY=${SSH_KEY:-$HOME/.ssh/id_ed25519}
command -v sshd >/dev/null || die "no ssh server in this image; build it with --build-arg WITH_SSH=1"
[[ -r $SSH_KEY ]] || die "no readable key SSH_KEY=$SSH_KEY; make one with ssh-keygen -t ed25519 and mount it on all nodes"

STATE=$(mktemp -d)
chmod 700 "$STATE"
mkdir -p "$HOME/.ssh"
chmod 700 "$HOME/.ssh"
# Mounted secrets often have modes that ssh refuses; the copy has the right one.
install -m 600 "$SSH_KEY" "$STATE/key"
ssh-keygen -q -y -f "$STATE/key" >"$STATE/authorized_keys"
ssh-keygen -q -t ed25519 -N '' -f "$STATE/host_key"

cat >"$HOME/.ssh/config" <<CONFIG
Host *
    Port $SSH_PORT
    IdentityFile $STATE/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
CONFIG
chmod 600 "$HOME/.ssh/config"

cat >"$STATE/sshd_config" <<CONFIG
Port $SSH_PORT
HostKey $STATE/host_key
AuthorizedKeysFile $STATE/authorized_keys
PidFile $STATE/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
AcceptEnv *
SetEnv PATH=$PATH
CONFIG
exec "$(command -v sshd)" -D -e -f "$STATE/sshd_config"
