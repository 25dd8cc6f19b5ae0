"""Triton's interpreter accepts what its compiler refuses: every kernel is compiled here, without a GPU, for an A100, an
H100 and a B200, and no step compiles anything anew.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import re
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from frugal_dist.update.kernels import fused, launch, tables

def compiled(kernel, constants, warps=4, weight="*fp32", grad="*fp32"):
    kinds = {"table": "*i64", "w_ptr": weight, "g_ptr": grad, "rest_ptr": grad, "wide_ptr": "*fp32",
             "starts_ptr": "*i64", **dict.fromkeys(("numel", "rows", "cols", "key0", "key1"), "i32"),
             "m_ptr": "*u8", "v_ptr": "*u8", **dict.fromkeys(("width", "phase", "across", "blocks"), "i32"),
             **{f"{moment}_{what}": "*fp32" for moment in "mv" for what in ("scales", "table", "between")}}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, **launch._AS_WRITTEN}
    found = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options).asm
    assert found["cubin"]
    print(kernel.__name__)
    return found["ptx"]

compiled(fused.sign_above, {})
for tall in (1, tables.HIGH):
    compiled(fused.round_rows, {"TALL": tall}, weight="*bf16")

def check_wide(ptx, aligned):
    assert set(re.findall(r"(ld|st)\\.global\\.v[248]", ptx)) == ({"ld", "st"} if aligned else set())

for aligned, grad in ((False, "*fp32"), (True, "*fp32"), (True, "*bf16")):
    check_wide(compiled(fused.coded, {"ALIGNED": aligned}, grad=grad), aligned)
names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
same, mixed = [(dtype, dtype) for dtype in names], [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
for weight, grad in same + mixed:
    compiled(fused.sign_one, {}, weight=names[weight], grad=names[grad])
    ways = [(aligned, False) for aligned in ((False, True) if weight is grad else (True,))]
    ways += [(True, True)] if weight is torch.bfloat16 else []
    for kind in (launch._SIGN, *launch._KINDS.values()):
        for aligned, noise in ways:
            kinds = {"W": fused.DTYPES[weight], "G": fused.DTYPES[grad], "ALIGNED": aligned, "NOISE": noise}
            ptx = compiled(kind.kernel, {**kinds, **kind.options}, kind.warps)
            check_wide(ptx, aligned)
"""


COUNT = """
from functools import partial

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
JITFunction.__getitem__ = lambda self, grid: partial(self.run, grid=grid, warmup=True)  # compiles, starts nothing

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.coordinates import Columns, Flat, Rows
from frugal_dist.update.eightbit import Packed, blocks_of
from frugal_dist.update.kernels import fused, launch
from frugal_dist.update.kernels.jobs import Noise, TileUpdate
from frugal_dist.update.stochastic_rounding import keys_of

def compiled():
    kernels = [one for one in vars(fused).values() if isinstance(one, JITFunction)]
    return sum(len(caches[0]) for one in kernels for caches in one.device_caches.values())

weights, grad = [torch.zeros(16, 48), torch.zeros(16, 48)], torch.ones(16, 48)
selections = [None, Columns(torch.tensor([0, 3])), Rows(torch.tensor([1, 4]), 48),
              Flat(torch.tensor([5, 9], dtype=torch.int32), 48)]
moments = [() if one is None else [torch.zeros(one.shape(16, 48)) for _ in "mv"] for one in selections]
for step in range(1, 11):
    lr, decay = (1e-3, 0.0, 1.0, 16.0, 0.5)[step % 5], (0.0, 0.1, 1.0)[step % 3]
    config = FrugalConfig(lr=lr, betas=(0.0 if step == 3 else 0.9, 0.999), projection="columns")
    launches = launch.Launches()
    for selection, own in zip(selections, moments):
        for weight in weights[: 1 + step % 2]:
            assert launches.take(TileUpdate(weight, grad, selection, own, step, decay, config))
            noise = Noise(keys_of(0, "w", step), 0, 48)
            assert launches.take(TileUpdate(weight.bfloat16(), grad, selection, own, step, decay, config, noise))
    launches.finish()
    for keys in (keys_of(0, "w", step), (1, 16), (0, (1 << 32) - 1), (1 << 31, 7)):
        assert launch.round_(weights[0].bfloat16(), weights[0], torch.arange(0, 768, 48), keys)
    for rows, width, phase in ((16, 48, 0), (1, 1, 1), (1, 255 + step, 0), (3, 256 * step, 16)):
        own = [Packed(torch.zeros(rows, width, dtype=torch.uint8), torch.zeros(rows, blocks_of(width, phase)), phase,
                      signed) for signed in (True, False)]
        for begin in (0, 1):
            param = torch.zeros(begin + rows * width)[begin:].view(rows, width)
            assert launch.step_codes_([param], [param], [own], step, lr, decay, config)
    for size in (1.0, 0.0, 16.0, 1e-3 / step):
        assert launch.sign_step_(weights[0], grad, size, 1.0 - size)
        assert launch.sign_step_above_(weights[0], grad, grad, size, 1.0 - size, size)
    print(compiled())
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=own, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done


@pytest.mark.parametrize(
    "capability", ["90", pytest.param("80", marks=pytest.mark.heavy), pytest.param("100", marks=pytest.mark.heavy)]
)
def test_every_kernel_compiles_for_cuda(capability: str) -> None:
    """And reads and writes several numbers at a time where it is promised that it may."""
    assert run(COMPILE, capability).stdout.split() == [
        *("sign_above", "round_rows", "round_rows", *["coded"] * 3),
        *("sign_one", *["sign"] * 2, *["lines"] * 4, *["flat"] * 2),
        *("sign_one", *["sign"] * 3, *["lines"] * 6, *["flat"] * 3),
        *("sign_one", *["sign"] * 2, *["lines"] * 4, *["flat"] * 2),
        *("sign_one", *["sign"] * 2, *["lines"] * 4, *["flat"] * 2),
        *("sign_one", "sign", "lines", "lines", "flat"),
    ]


def test_no_step_compiles_anew() -> None:
    """Rates, decay, counts, keys and the number of matrices change from step to step; each kernel is compiled once,
    those that a table describes with and without stochastic rounding, 8-bit moments for aligned tensors and others.
    """
    assert run(COUNT).stdout.split() == ["13"] * 10
