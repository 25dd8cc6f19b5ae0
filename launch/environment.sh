# shellcheck shell=bash
# shellcheck disable=SC2154 # scratch is the other script's
# How words and variables come through DeepSpeed's launcher for several hosts as they are; deepspeed_hostfile.sh sources
# it. DeepSpeed 0.19.8 quotes them for a shell in some ways only, and also where there is no shell.

# for_remote_shell WORD...: each, ended by a zero byte, so that the shell at the other end of pdsh reads it again as it was.
# DeepSpeed puts words with a space into double quotes, and a backslash before those within; others go as they are.
for_remote_shell() {
    local word
    for word; do
        word=${word//%/%%} # pdsh's own sign
        if [[ $word == *" "* ]]; then
            printf '%s\0' "$(in_quotes "$word")"
        else
            printf '%q\0' "$word"
        fi
    done
}

# in_quotes TEXT: for double quotes, which others add together with the backslash before quotes in it.
# shellcheck disable=SC2001 # bash before 5.2 knows no & in replacements
in_quotes() { sed 's/[\\$`]/\\&/g' <<<"$1"; }

# variables WAY: lines NAME=VALUE of what the ranks on other hosts need, for DeepSpeed's file of variables. It strips
# values, and puts those that are not plain into double quotes, without a look at what is in them.
variables() {
    local name value
    while read -r name; do
        value=${!name}
        [[ $value != *$'\n'* ]] || die "$name has several lines, which DeepSpeed's launcher does not pass on: shorten it, \
unset it, or use launch/mpirun.sh or launch/pretrain.sbatch"
        if [[ $1 == pdsh ]]; then
            value=$(in_quotes "${value//%/%%}")
            value=${value//\"/\\\"}
        fi
        printf '%s=%s\n' "$name" "$value"
    done < <(sent)
}

# read_own_variables: OWN becomes the lines NAME=VALUE of the user's files of variables, those that DeepSpeed would read by
# itself, in its order.
read_own_variables() {
    local name=${DS_ENV_FILE:-.deepspeed_env} file bad found=0
    local -a files=(~/"$name" "./$name")
    [[ $name != /* ]] || files=("$name")
    OWN=()
    for file in "${files[@]}"; do
        [[ -f $file ]] || continue
        found=1
        bad=$(grep -nvE '^\s*(#.*)?$|^\s*[A-Za-z_]\w*\s*=' "$file" | head -n 1) || true
        [[ -z $bad ]] || die "$file, line $bad: \"NAME=VALUE\" is needed"
        mapfile -t -O "${#OWN[@]}" OWN < <(sed -E '/^\s*(#|$)/d; s/^\s*(\w+)\s*=\s*/\1=/; s/\s+$//' "$file")
    done
    ((found)) || [[ -z ${DS_ENV_FILE:-} ]] || die "DS_ENV_FILE is \"$DS_ENV_FILE\", but there is no such file"
}

# stand_in NAME PROGRAM: in $scratch, before all others on PATH, what DeepSpeed calls NAME. It takes the quotes off again
# that no shell will take off, and does not let srun's --export cut values at commas: srun passes all on by itself.
stand_in() {
    local line
    {
        printf '#!/usr/bin/env bash\nprogram=%q\n' "$2"
        [[ -n ${DS_ACCELERATOR:-} ]] || printf 'unset DS_ACCELERATOR # of the launcher, not of the ranks\n'
        [[ $1 != srun ]] || for line in "${OWN[@]}"; do printf 'export %q\n' "$line"; done # which --export would cut
        cat <<'SH'
words=()
while (($#)) && [[ ${2:-} != -u ]]; do # up to "python -u"
    case $1 in
    -x | -genv)
        option=$1 name=${2%%=*} value=${2#*=}
        shift
        [[ $1 != "$name=\""*\" ]] || value=${value:1:-1}
        if [[ $1 == *=* ]]; then words+=("$option" "$name=$value"); else words+=("$option" "$1"); fi
        ;;
    --export=ALL,*) words+=(--export=ALL) ;;
    *) words+=("$1") ;;
    esac
    shift
done
exec "$program" "${words[@]}" "$@"
SH
    } >"$scratch/$1"
    chmod +x "$scratch/$1"
    export PATH=$scratch:$PATH
}
