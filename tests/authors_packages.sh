#!/usr/bin/env bash
# Installs into .venv the optimizers that tests/unit/test_authors.py compares with. Started by tests/run.sh --all.
#
# They are those of the extra "bench" but for bitsandbytes, which these tests do without. What they require is there, or
# is not needed. torchtitan goes into a folder of its own, .cache/torchtitan: it asks for older datasets than ours, which the
# example does not use. Without network the tests are skipped, and say what they lack.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mapfile -t wanted < <(
    .venv/bin/python - <<'PY'
from importlib.metadata import requires

for line in requires("frugal_dist"):
    requirement, _, marker = line.partition(";")
    if marker.strip() == 'extra == "bench"' and not requirement.startswith("bitsandbytes"):
        print(requirement)
PY
)
((${#wanted[@]})) || { printf 'authors packages: pyproject.toml has no extra "bench" any more\n' >&2; exit 1; }
# One of them has no wheel, and is built with the setuptools that is there.
if ! said=$(.venv/bin/python -m pip install --no-input --quiet --no-deps --no-build-isolation "${wanted[@]}" 2>&1 </dev/null); then
    tail -n 3 <<<"$said"
    printf 'authors packages: pip failed; the tests that need these packages are skipped: %s\n' "${wanted[*]}"
fi

apart=.cache/torchtitan titan=(torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing torchdata typeguard tyro)
if [[ ! -d $apart/torchtitan ]] &&
    ! said=$(.venv/bin/python -m pip install --no-input --quiet --no-deps --target "$apart" "${titan[@]}" 2>&1 </dev/null); then
    tail -n 3 <<<"$said"
    printf 'authors packages: pip failed; the test of torchtitan is skipped: %s\n' "${titan[*]}"
fi
