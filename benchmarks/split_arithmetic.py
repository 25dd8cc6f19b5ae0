"""How many signs of the residual change when svd's products are computed on tensor cores.

    frugal-dist demo prepare --data runs/demo_data
    python benchmarks/split_arithmetic.py --data runs/demo_data --json split.json

Tensor cores multiply TF32 or bf16 numbers and sum in fp32. An fp32 matrix split into a few of those can be multiplied
part by part: 3xTF32 needs three products, bf16 with three parts up to nine. Here this is emulated: the operands are
rounded as the hardware would, their products are exact in fp32, the sum is the CPU's in fp32. A small LLaMA is
trained, a projector is computed, and at several ages of it the residual G - P P'G of real gradients is taken in each
arithmetic. Reported: the share of signs that differ from fp64's and, with "unlike fp32", from fp32's.

"least time" is what the products cost at the peak rates of an H100 SXM's data sheet (dense; TFLOP/s: fp32 66.9, TF32
494.7, bf16 989.4), relative to fp32: a limit, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from frugal_dist.projection import Basis

sys.path.insert(0, str(Path(__file__).parent))
from refresh_quality import Run, exact
from step_time import machine

H100 = {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4}


def to_tf32(values: Tensor) -> Tensor:
    """To the nearest number with 10 explicit bits of mantissa, ties to even."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def to_bf16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


@dataclass(frozen=True)
class Arithmetic:
    """Operands split into ``parts`` numbers of a format; of the products of parts i and j those with i + j <= order."""

    format: str
    parts: int
    order: int

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Small products first, as their sum would be lost beside the large one."""
        own = range(self.parts)
        return sorted(((i, j) for i in own for j in own if i + j <= self.order), key=sum, reverse=True)

    @property
    def least_time(self) -> float:
        return len(self.pairs) * H100["fp32"] / H100[self.format]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self._split(a), self._split(b)
        found = torch.zeros(len(a), b.shape[1])
        for i, j in self.pairs:
            found += left[i] @ right[j]
        return found

    def _split(self, values: Tensor) -> list[Tensor]:
        found, rest = [], values
        for _ in range(self.parts):
            found.append(FORMATS[self.format](rest))
            rest = rest - found[-1]
        return found


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"tf32": to_tf32, "bf16": to_bf16}
ARITHMETICS = {
    "TF32": Arithmetic("tf32", 1, 0),
    "3xTF32": Arithmetic("tf32", 2, 1),
    "bf16": Arithmetic("bf16", 1, 0),
    "bf16x3": Arithmetic("bf16", 2, 1),
    "bf16x6": Arithmetic("bf16", 3, 2),
    "bf16x9": Arithmetic("bf16", 3, 4),
}


def residual_signs(grad: Tensor, basis: Tensor, left: bool, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Signs of G - P P'G (left) or G - G P P'."""
    if left:
        return (grad - product(basis, product(basis.T.contiguous(), grad))).sign()
    return (grad - product(product(grad, basis), basis.T.contiguous())).sign()


def flips(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each arithmetic: shares of signs that differ from those of fp64, and of fp32."""
    run = Run(arguments, 0, projection="columns")
    for _ in range(arguments.warm):
        run.step()
    bases = {name: exact(grad, name, None) for name, grad in run.matrices().items()}
    looks = []
    for age in range(arguments.life):
        if age % arguments.every == 0:
            looks.append(_look(run.matrices(), bases))
        run.step()
    return {
        name: {
            "at the refresh": looks[0][name][1],
            "later": statistics.mean(look[name][1] for look in looks[1:]),
            "unlike fp32": statistics.mean(look[name][0] for look in looks),
        }
        for name in looks[0]
    }


def _look(grads: dict[str, Tensor], bases: dict[str, Basis]) -> dict[str, tuple[float, float]]:
    """For each arithmetic: shares of signs that differ from those of fp32 and fp64 for the gradients of one step."""
    counts = {name: [0, 0] for name in ("fp32", *ARITHMETICS)}
    for name, grad in grads.items():
        basis, left = bases[name].parts[0], bases[name].left is not None
        fp64 = residual_signs(grad.double(), basis.double(), left, torch.matmul)
        fp32 = residual_signs(grad, basis, left, torch.matmul)
        found = {name: residual_signs(grad, basis, left, one.product) for name, one in ARITHMETICS.items()}
        for arithmetic, signs in {"fp32": fp32, **found}.items():
            counts[arithmetic][0] += int((signs != fp32).sum())
            counts[arithmetic][1] += int((signs != fp64).sum())
    entries = sum(grad.numel() for grad in grads.values())
    return {name: (fp32 / entries, fp64 / entries) for name, (fp32, fp64) in counts.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder made by `frugal-dist data prepare`")
    parser.add_argument("--model", default="quick", help="a LLaMA shape of the recipes")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--gap", type=int, default=50, help="update_gap of the training")
    parser.add_argument("--warm", type=int, default=50, help="steps before the projector is computed")
    parser.add_argument("--life", type=int, default=50, help="steps for which it is used")
    parser.add_argument("--every", type=int, default=10, help="look at the signs at every so many steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.warm + arguments.life
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    found = flips(arguments)
    about = machine(torch.device("cpu"))
    print(
        "| arithmetic | products | least time | at the refresh | later | unlike fp32 |\n" + "|---" + "|---:" * 5 + "|"
    )
    for name, shares in found.items():
        one = ARITHMETICS.get(name)
        products, time = (len(one.pairs), one.least_time) if one else (1, 1.0)
        text = " | ".join(f"{100 * share:.3f} %" for share in shares.values())
        print(f"| {name} | {products} | {time:.2f} | {text} |")
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(json.dumps({"machine": about, "settings": settings, "flips": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
