"""Random runs against the plain reference, on one process.

python -m pytest -n 0 tests/unit/test_fuzz.py --fuzz-seed 1000 --fuzz-runs 500
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzzing import Fuzz
from random_runs import Group, Named, Run, draw_run, gradients, prepare, weights
from reference import Bases, Reference, Settings
from torch import Tensor, nn

from frugal_dist import Frugal

BETAS = {"adamw": (0.9, 0.999), "lion": (0.9, 0.99), "sgdm": (0.9, 0.999)}


pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of NaN, of little that is projected
    pytest.mark.timeout(3600),  # with --heavy, or as many runs as one likes
]


def test_one_process_is_the_reference(fuzz: Fuzz) -> None:
    fuzz(draw_run, compare, short=50, long=3000)


def test_a_resumed_run_is_the_same_bit_for_bit(fuzz: Fuzz) -> None:
    fuzz(draw_run, resume, short=40, long=1500)


def build(run: Run, start: Named) -> tuple[Frugal, dict[str, nn.Parameter]]:
    named = {name: nn.Parameter(weight.clone()) for name, weight in start.items()}
    groups = [{**group, "params": [(n, named[n]) for n in group["params"]]} for group in run.of_optimizer()]
    return Frugal(groups, no_decay=list(run.no_decay) or None), named


def train(run: Run, optimizer: Frugal, named: dict[str, nn.Parameter], step: int) -> Named:
    prepare(run, step, optimizer.param_groups, named)
    grads = gradients(run, step)
    for name, parameter in named.items():
        parameter.grad = grads[name].clone() if name in grads else None
    optimizer.step()
    return grads


def compare(run: Run) -> None:
    """Every weight after every step."""
    optimizer, named = build(run, weights(run))
    references = [Plain(group, run, optimizer, named) for group in run.groups]
    begun = False
    for step in range(run.steps):
        grads = train(run, optimizer, named, step)
        begun = begun or any(bool(grad.any()) for grad in grads.values())
        for number, reference in enumerate(references):
            for key in ("lr", "density"):
                value = optimizer.param_groups[number][key]
                reference.settings[key] = value
            if begun:  # engines make a first step of zeros, to create the state
                reference.step(grads)
            for name, expected in reference.weights().items():
                assert_close(named[name], expected, run.tolerance, f"{name} after step {step}")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    distance = float((actual.detach() - expected).nan_to_num().abs().max()) if actual.numel() else 0.0
    apart = bool((actual.isnan() != expected.isnan()).any())
    assert distance <= tolerance and not apart, f"{what} is off by {distance:.1e}" + " (NaN elsewhere)" * apart


class Plain:
    """A group as the reference has it: stacks taken apart into their members."""

    def __init__(self, group: Group, run: Run, optimizer: Frugal, named: dict[str, nn.Parameter]) -> None:
        self.group = group
        self.members = {name: _members(name, shape) if group.projected else [name] for name, shape in group.params}
        options = {"betas": BETAS[group.options["state_full"]], **group.options}
        options["lr_scale"] = options.get("projected_lr_scale", 1.0)
        self.settings: dict[str, Any] = {k: v for k, v in options.items() if k in Settings.__dataclass_fields__}
        parts = self._apart({name: named[name].detach() for name in self.members})
        matrices, regular = (parts, {}) if group.projected else ({}, parts)
        self.reference = Reference(matrices, regular, Settings(**self.settings), self._bases(optimizer, named))
        for parameter in [*self.reference.matrices, *self.reference.regular]:
            parameter.decays = parameter.name.split("[")[0] not in run.no_decay

    def _apart(self, tensors: Named) -> Named:
        return {
            member: tensors[name][i] if self._is_stack(name) else tensors[name]
            for name, members in self.members.items()
            if name in tensors
            for i, member in enumerate(members)
        }

    def step(self, grads: Named) -> None:
        self.reference.settings = Settings(**self.settings)
        self.reference.step(self._apart({name: grads[name] for name in self.members if name in grads}))

    def weights(self) -> Named:
        parts = self.reference.weights()
        return {
            name: parts[name] if not self._is_stack(name) else torch.stack([parts[member] for member in members])
            for name, members in self.members.items()
            if members
        }

    def _is_stack(self, name: str) -> bool:
        return self.group.projected and len(dict(self.group.params)[name]) == 3

    def _bases(self, optimizer: Frugal, named: dict[str, nn.Parameter]) -> Callable[[str], Bases]:
        """What the optimizer drew at a ``random`` refresh."""

        def bases(member: str) -> Bases:
            name = member.split("[")[0]
            state, prefix = optimizer.state[named[name]], "" if member == name else f"{member}/"
            rows, cols = named[name].shape[-2:]
            if self.group.options["side"] == "full":
                return state[f"{prefix}basis_left"].clone(), state[f"{prefix}basis_right"].clone()
            basis = state[f"{prefix}basis"].clone()
            side = {"std": rows >= cols, "reverse_std": rows < cols}.get(self.group.options["side"])
            right = self.group.options["side"] == "right" if side is None else side
            torch.testing.assert_close(
                basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-12
            )
            return (None, basis) if right else (basis, None)

        return bases


def _members(name: str, shape: tuple[int, ...]) -> list[str]:
    """The names of the matrices; the only one of a stack has the stack's."""
    return [f"{name}[{i}]" for i in range(shape[0])] if len(shape) == 3 and shape[0] != 1 else [name]


def resume(run: Run) -> None:
    optimizer, named = build(run, weights(run))
    saved: tuple[Named, bytes] | None = None
    for step in range(run.steps):
        if step == run.resume:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            saved = {name: parameter.detach().clone() for name, parameter in named.items()}, file.getvalue()
        train(run, optimizer, named, step)
    assert saved is not None
    again, others = build(run, saved[0])
    again.load_state_dict(torch.load(io.BytesIO(saved[1]), weights_only=True))
    for step in range(run.resume, run.steps):
        train(run, again, others, step)
    for name, parameter in named.items():
        assert torch.equal(parameter.nan_to_num(), others[name].nan_to_num()), name
