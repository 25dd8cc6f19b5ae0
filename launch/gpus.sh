# shellcheck shell=bash
# shellcheck disable=SC2034 # PICKED is for the other scripts
# Which GPUs of this host ranks may use; sourced by the other scripts, which bring `die`.

# shown: the entries of CUDA_VISIBLE_DEVICES, one a line; like CUDA, up to the first that names no GPU.
shown() { tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed 's/[[:space:]]//g; /^-1$/Q; /^$/Q'; }

# present: how many GPUs this host has, whether shown to us or not.
present() { { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true; }

# gpus: how many GPUs there are on this host for us to use.
gpus() { if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then shown | wc -l; else present; fi; }

# default_ranks: one per GPU, or one.
default_ranks() {
    local found
    found=$(gpus)
    echo "$((found > 0 ? found : 1))"
}

# pick_gpus RANKS: PICKED becomes the options with which DeepSpeed's launcher gives its ranks GPUs that are ours. With
# --num_gpus it takes 0, 1, ..., whatever CUDA_VISIBLE_DEVICES says; without any option, all that the variable names.
pick_gpus() {
    local ids id
    PICKED=(--num_gpus "$1")
    [[ -n ${CUDA_VISIBLE_DEVICES+set} ]] || return 0
    mapfile -t ids < <(shown)
    if ((${#ids[@]} == 0)); then
        (($(present) == 0)) || die "CUDA_VISIBLE_DEVICES=\"$CUDA_VISIBLE_DEVICES\" hides this machine's GPUs, and DeepSpeed's \
launcher would show them to its ranks again; unset it, or train on the CPU with: bash launch/torchrun.sh RECIPE --engine deepspeed"
        unset CUDA_VISIBLE_DEVICES
        return 0
    fi
    for id in "${ids[@]}"; do
        [[ $id =~ ^[0-9]+$ ]] || die "CUDA_VISIBLE_DEVICES is \"$CUDA_VISIBLE_DEVICES\"; DeepSpeed's launcher knows GPUs by \
number only, not by UUID or MIG name: give numbers (nvidia-smi -L), or run: bash launch/torchrun.sh RECIPE --engine deepspeed"
    done
    (($1 <= ${#ids[@]})) || die "$1 ranks need as many GPUs, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES shows ${#ids[@]}"
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${ids[*]:0:$1}")
    export CUDA_VISIBLE_DEVICES
    PICKED=()
}
