"""Triton's interpreter accepts what its compiler refuses: every kernel is compiled for an H100 here, without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import re
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from frugal_dist.update.kernels import fused, launch

def compiled(kernel, told, constants, warps=4):
    kinds = {"table": "*i64", "w_ptr": told, "g_ptr": told, "rest_ptr": told, "numel": "i32", "cols": "i32"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm
    assert found["cubin"]
    print(kernel.__name__)
    return found["ptx"]

compiled(fused.sign_one, "*fp32", {})
compiled(fused.sign_above, "*fp32", {})
for told, dtype in {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16}.items():
    for kind in (launch._SIGN, *launch._KINDS.values()):
        for aligned in (False, True) if told == "*fp32" else (True,):
            kinds = {"W": fused.DTYPES[dtype], "G": fused.DTYPES[dtype], "ALIGNED": aligned}
            ptx = compiled(kind.kernel, told, {**kinds, **kind.options}, kind.warps)
            assert set(re.findall(r"(ld|st)\\.global\\.v[24]", ptx)) == ({"ld", "st"} if aligned else set()), kind
"""


def test_every_kernel_compiles_for_cuda() -> None:
    """And reads and writes several numbers at a time where it is promised that it may."""
    own = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=own, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("sign_one", "sign_above", *["sign"] * 2, *["lines"] * 4, *["flat"] * 2),
        *["sign", "lines", "lines", "flat"] * 2,
    ]
