"""8-bit moments against full ones, rounded to the nearest code and stochastically: how far steps are off, and the loss.

    OMP_NUM_THREADS=1 python benchmarks/moment_codes.py

Steps: all are shown the same gradients, those of a training with full moments and random ones, whose sizes fall to a
hundredth along a block. AdamW's step of an entry, about 1 lr, is compared with that of full moments. Loss: a small
model learns to continue the bytes of this project's docs with each, from the same weights, on the same batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from frugal_dist.update.eightbit import BLOCK, dequantize, quantize, values_of

CONTEXT, BATCH, LR = 8, 128, 3e-3
Quantize = Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]


def stochastically(values: Tensor, phase: int, signed: bool) -> tuple[Tensor, Tensor]:
    """As ``quantize``, but to either neighbour, so that the value is what is expected."""
    scales = quantize(values, phase, signed)[1]
    table, _, zero = values_of(signed, values.dtype, values.device)
    rising, block = table.roll(zero), torch.arange(phase, phase + values.shape[1]) // BLOCK
    parts = values / torch.where(scales == 0, torch.ones_like(scales), scales)[:, block]
    below = (torch.searchsorted(rising, parts.contiguous(), right=True) - 1).clamp_(0, 254)
    share = (parts - rising[below]) / (rising[below + 1] - rising[below])
    places = below + (torch.rand_like(share) < share)
    return (places if signed else places.maximum((parts > 0).long())).sub(zero).remainder(256).byte(), scales


WAYS: dict[str, Quantize | None] = {"full": None, "nearest": quantize, "stochastic": stochastically}


class Moments:
    """AdamW's of one matrix; ``step`` returns the direction of an update."""

    def __init__(self, example: Tensor, way: Quantize | None) -> None:
        self.way, self.count, self.kept = way, 0, [torch.zeros_like(example) for _ in "mv"]

    def step(self, grad: Tensor) -> Tensor:
        self.count, (first, second) = self.count + 1, self.kept
        self.kept = [first.lerp(grad, 0.1), 0.999 * second + 0.001 * grad.square()]
        rates = [1 - beta**self.count for beta in (0.9, 0.999)]
        step = self.kept[0] / rates[0] / ((self.kept[1] / rates[1]).sqrt() + 1e-8)
        if self.way is not None:  # quantizing again what was dequantized changes nothing: numbers may be kept here
            signs = zip(self.kept, (True, False), strict=True)
            self.kept = [dequantize(*self.way(values, 0, signed), 0, signed) for values, signed in signs]
        return step


def training(way: Quantize | None, seed: int, steps: int, found: list[float]) -> Iterator[list[Tensor]]:
    """Gradients of every step; ``found``: the loss on the last bytes, at the end."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * CONTEXT, 256, bias=False), nn.Tanh(),
                          nn.Linear(256, 256, bias=False))  # fmt: skip
    docs = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    rows = torch.tensor(list(b"".join(path.read_bytes() for path in docs))).unfold(0, CONTEXT + 1, 1)
    moments, order = [Moments(param, way) for param in model.parameters()], torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = rows[torch.randint(len(rows) - 20000, (BATCH,), generator=order)]
        model.zero_grad()
        nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1]).backward()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        yield grads
        with torch.no_grad():
            for param, grad, own in zip(model.parameters(), grads, moments, strict=True):
                param.sub_(own.step(grad), alpha=LR * (1 - step / steps))
    found.append(float(nn.functional.cross_entropy(model(rows[-20000:, :-1]), rows[-20000:, -1]).detach()))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200, help="that are compared")
parser.add_argument("--train", type=int, default=600, help="steps of the trainings")
arguments = parser.parse_args()
sizes, chance = 10.0 ** torch.linspace(0, -4, 512), torch.Generator().manual_seed(0)
noise = ([torch.randn(64, 512, generator=chance) * sizes] for _ in range(arguments.steps))
for source, stream in (("training", training(None, 0, arguments.steps, [])), ("random", noise)):
    shadows: dict[str, list[Moments]] = {}
    far: dict[str, list[list[Tensor]]] = {name: [] for name in WAYS}
    for grads in stream:
        shadows = shadows or {name: [Moments(grad, way) for grad in grads] for name, way in WAYS.items()}
        steps = {n: torch.cat([o.step(g).flatten() for o, g in zip(shadows[n], grads, strict=True)]) for n in WAYS}
        for name, step in steps.items():
            off = (step - steps["full"]).abs()
            far[name].append([off.max(), off.mean(), off.norm() / steps["full"].norm()])
    for name in list(WAYS)[1:]:
        entry, mean, norm = torch.tensor(far[name]).T
        print(f"{source}, {name}: an entry {entry.max():.2f} lr at most, {mean.mean():.4f} lr in the mean; a step "
              f"{norm.mean():.1%}, at most {norm.max():.1%}, the last {norm[-1]:.1%}", flush=True)  # fmt: skip
for name, way in WAYS.items():
    losses: list[float] = []
    for seed in (0, 1):
        sum(1 for _ in training(way, seed, arguments.train, losses))
    print(f"loss, {name}: " + ", ".join(f"{loss:.4f}" for loss in losses), flush=True)
