"""How good projectors of svd_method "subspace" and "gram64", of dct and random, and bases kept in bf16, are.

    frugal-dist demo prepare --data runs/demo_data
    python benchmarks/refresh_quality.py --data runs/demo_data --json quality.json

Signs: a small LLaMA is trained with exact SVDs. At a refresh every method computes its projector from the same
gradients, the warm ones from the projector of one period before. Over the projector's life the residuals of each
step's real gradients are taken with either projector; reported is the share of entries whose sign agrees, at the
refresh, over the first tenth of the life and over all of it, and the same for the exact SVD of fp32 against fp64. And
what of a gradient the projectors catch: |down(G)|^2 / |G|^2, the mean of all matrices.

Loss: the same model is trained with each method from the same seeds on the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from frugal_dist import Frugal, split_parameters
from frugal_dist.projection import Basis, down, exact_svd, gram_svd, random_basis, resolve_side, subspace_svd
from frugal_dist.projection.basis import residual
from frugal_dist.projection.dictionary import column_energies, largest
from frugal_dist.training.data.batches import Batches, TokenRows
from frugal_dist.training.data.prepared import open_prepared
from frugal_dist.training.models import build_llama, token_losses

sys.path.insert(0, str(Path(__file__).parent))
from step_time import machine

DENSITY = 0.25
EXACT = "exact"


class Run:
    """A model, its data and its optimizer, one step at a time."""

    def __init__(self, arguments: argparse.Namespace, seed: int, **options: object) -> None:
        data, train, validation = open_prepared(arguments.data)
        torch.manual_seed(seed)
        self.model = build_llama(arguments.model, data.vocab_size, arguments.length)
        self.batches = Batches(TokenRows(train, arguments.length), arguments.batch, seed)
        self.validation = TokenRows(validation, arguments.length)
        options = {"lr": arguments.lr, "density": DENSITY, "update_gap": arguments.gap, **options}
        self.optimizer = Frugal(split_parameters(self.model), process_group=None, seed=seed, **options)
        self.steps, self.done = arguments.steps, 0

    def step(self) -> None:
        warmup = max(1.0, 0.1 * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"] * min(1.0, (self.done + 1) / warmup)
        self.optimizer.zero_grad()
        token_losses(self.model, torch.from_numpy(self.batches.share(self.done, 0, 1))).mean().backward()
        self.optimizer.step()
        self.done += 1

    @torch.no_grad()
    def loss(self, rows: int = 64) -> float:
        found = [token_losses(self.model, torch.from_numpy(self.validation.take([row]))).mean() for row in range(rows)]
        return float(torch.stack(found).mean())

    def matrices(self) -> dict[str, Tensor]:
        names = {original.name for original in self.optimizer.originals if original.projected}
        return {name: p.grad for name, p in self.model.named_parameters() if name in names and p.grad is not None}


def side_of(grad: Tensor) -> str:
    return resolve_side("std", *grad.shape)


def rank_of(grad: Tensor) -> int:
    return round(DENSITY * min(grad.shape))


def exact(grad: Tensor, name: str, warm: Basis | None) -> Basis:
    return exact_svd(grad, side_of(grad), rank_of(grad))


def subspace(grad: Tensor, name: str, warm: Basis | None) -> Basis:
    return subspace_svd(grad, side_of(grad), rank_of(grad), warm, seed=0, name=name, refresh=1)


def gram64(grad: Tensor, name: str, warm: Basis | None) -> Basis:
    return gram_svd(grad, side_of(grad), rank_of(grad))


def in_bf16(grad: Tensor, name: str, warm: Basis | None) -> Basis:
    """Exact, then kept in bf16."""
    return Basis(**{side_of(grad): exact(grad, name, warm).parts[0].bfloat16().float()})


def from_fp64(grad: Tensor, name: str, warm: Basis | None) -> Basis:
    return Basis(**{side_of(grad): exact(grad.double(), name, warm).parts[0].float()})


def from_random(grad: Tensor, name: str, warm: Basis | None) -> Basis:
    return subspace(grad, name, None)


def dct(grad: Tensor, name: str, warm: Basis | None) -> Basis:
    return largest(column_energies(grad, side_of(grad)), rank_of(grad)).shown(*grad.shape, grad.dtype)


def random(grad: Tensor, name: str, warm: Basis | None) -> Basis:
    return random_basis(*grad.shape, side_of(grad), rank_of(grad), seed=0, name=name, refresh=1, dtype=grad.dtype)


METHODS: dict[str, Callable[[Tensor, str, Basis | None], Basis]] = {
    EXACT: exact,
    "exact, of fp64": from_fp64,
    "subspace, warm": subspace,
    "subspace, cold": from_random,
    "gram64": gram64,
    "exact, kept in bf16": in_bf16,
    "dct": dct,
    "random": random,
}


def signs_and_catch(grad: Tensor, basis: Basis) -> tuple[Tensor, float]:
    """The residual's signs, and the share of the gradient's squares that is not in it."""
    low = down(grad, basis)
    return residual(grad, low, basis).sign(), float(low.square().sum() / grad.square().sum())


def agreement(arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """ "signs" and "caught", for each method: the share of residual signs that agree with the exact projector's, and
    that of the gradient that it catches.
    """
    run = Run(arguments, 0, projection="svd")
    for _ in range(arguments.warm * arguments.gap):
        run.step()
    warm, bases = {}, {}
    signs: dict[str, list[float]] = {name: [] for name in METHODS}
    caught: dict[str, list[float]] = {name: [] for name in METHODS}
    looked: list[int] = []
    start = run.done
    for offset in range(2 * arguments.gap):
        run.step()  # the gradients stay until the next one
        grads = run.matrices()
        if run.done == start + 1:
            warm = {name: exact(grad, name, None) for name, grad in grads.items()}
        if offset == arguments.gap:
            for method, compute in METHODS.items():
                bases[method] = {name: compute(grad, name, warm[name]) for name, grad in grads.items()}
        age = offset - arguments.gap
        if age >= 0 and (age % arguments.every == 0 or age < 3):
            looked.append(age)
            found = {method: [signs_and_catch(g, bases[method][n]) for n, g in grads.items()] for method in METHODS}
            entries = sum(grad.numel() for grad in grads.values())
            for method, pairs in found.items():
                equal = [(one == exact).sum() for (one, _), (exact, _) in zip(pairs, found[EXACT], strict=True)]
                signs[method].append(float(sum(equal)) / entries)
                caught[method].append(statistics.mean(share for _, share in pairs))
    early = [i for i, age in enumerate(looked) if age <= arguments.gap // 10]

    def by_age(shares: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        return {
            method: {
                "at the refresh": found[0],
                "first tenth": statistics.mean(found[i] for i in early),
                "whole life": statistics.mean(found),
            }
            for method, found in shares.items()
        }

    return {"signs": by_age(signs), "caught": by_age(caught)}


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"| {title} | " + " | ".join(next(iter(rows.values()))) + " |\n|---|---:|---:|---:|")
    for method, shares in rows.items():
        print(f"| {method} | " + " | ".join(f"{100 * share:.2f} %" for share in shares.values()) + " |", flush=True)
    print()


TRAININGS: dict[str, dict[str, object]] = {
    "exact": {"projection": "svd"},
    "subspace": {"projection": "svd", "svd_method": "subspace"},
    "gram64": {"projection": "svd", "svd_method": "gram64"},
    "dct": {"projection": "dct"},
    "random": {"projection": "random"},
}


def losses(arguments: argparse.Namespace) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.trainings:
            run = Run(arguments, seed, **TRAININGS[name])
            for _ in range(arguments.steps):
                run.step()
            found.setdefault(name, []).append(run.loss())
            print(f"seed {seed}, {name}: validation loss {found[name][-1]:.4f}", file=sys.stderr, flush=True)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder made by `frugal-dist data prepare`")
    parser.add_argument("--model", default="quick", help="a LLaMA shape of the recipes")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--gap", type=int, default=50, help="update_gap")
    parser.add_argument("--warm", type=int, default=2, help="periods trained before the signs are looked at")
    parser.add_argument("--every", type=int, default=5, help="look at the signs at every so many steps")
    parser.add_argument("--steps", type=int, default=300, help="of a training; 0: no trainings")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trainings", nargs="*", default=list(TRAININGS), choices=TRAININGS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    about = machine(torch.device("cpu"))
    shown = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
    found = {"machine": about, "settings": shown, **agreement(arguments)}
    table("residual signs equal to exact's", found["signs"])
    table("caught of the gradient", found["caught"])
    if arguments.steps and arguments.trainings:
        found["losses"] = losses(arguments)
        seeds = range(arguments.seeds)
        print("| training | " + " | ".join(f"seed {s}" for s in seeds) + " |\n|---|" + "---:|" * arguments.seeds)
        for name, values in found["losses"].items():
            print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
