"""Rules that need whole lines: right on one process, the same on every layout, planned, resumed.

As presets have them they are in test_presets.py; here are the other settings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYOUTS
from selection import taking_turns
from small_matrices import MORE, WITH_EXPERTS, check_layout, check_resume, model_of, train
from test_plan_agrees import ENGINES, check
from torch import Tensor, nn

from frugal_dist import Frugal, FrugalConfig, preset

NONE = {"density": 0.0, "projection": "columns"}
WAYS: dict[str, dict[str, Any]] = {
    "normalized": {"state_free": "normalized"},
    "normalized dct": {"state_free": "normalized", "projection": "dct", "on_refresh": "keep"},
    "normalized_columns 0": {"state_free": "normalized_columns", **NONE},
    "normalized_columns left": {"state_free": "normalized_columns", "side": "left", "on_refresh": "project"},
    "sinkhorn": {"state_free": "sinkhorn", "projection": "dct"},
    "sinkhorn 0": {"state_free": "sinkhorn", **NONE, "projection": "svd"},
    "softsign": {"state_free": "softsign", "on_refresh": "keep"},
    "softsign 0": {"state_free": "softsign", **NONE},
    "scaled": {"state_free": "scaled", "on_refresh": "keep"},
    "scaled reverse": {"state_free": "scaled", "side": "reverse_std", "density": 0.4},
    "racs": {"state_free": "racs", "growth_limit": 1.01, "on_refresh": "keep"},
    "scale": {"combine": "scale", "projection": "random", "on_refresh": "keep"},
    "scale dct": {"combine": "scale", "projection": "dct", "growth_limit": 1.01, "side": "left"},
    "scale_matrix": {"combine": "scale_matrix", "projection": "random", "density": 0.1, "growth_limit": 1.2},
    "muon dct": {"state_full": "muon", "projection": "dct", "on_refresh": "project"},
    "muon sinkhorn": {"state_full": "muon", "projection": "svd", "state_free": "sinkhorn"},
    "normalized_momentum": {"state_full": "normalized_momentum", "projection": "rows", "density": 1.0},
    "scaled dct lion": {"state_free": "scaled", "projection": "dct", "state_full": "lion"},
}


@pytest.mark.parametrize(("way", "layout"), taking_turns(WAYS, LAYOUTS))
def test_every_layout_gives_the_weights_of_one_process(layout: str, way: str) -> None:
    check_layout(layout, WAYS[way], WITH_EXPERTS)


@pytest.mark.parametrize(("way", "layout"), taking_turns(WAYS, ENGINES, every=3))
def test_planned_equals_measured(layout: str, way: str) -> None:
    check(layout, {**MORE, **WAYS[way]})


# --- what one process does, from the papers ---------------------------------------------------------------------------


def rms(matrix: Tensor, dim: int) -> Tensor:
    return matrix.square().mean(dim, keepdim=True).sqrt()


def alternately(matrix: Tensor) -> Tensor:
    for _ in range(5):
        matrix = matrix / rms(matrix, 1)
        matrix = matrix / rms(matrix, 0)
    return matrix


DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalized": lambda rest: rest / rms(rest, 1),
    "normalized_columns": lambda rest: rest / rms(rest, 0),
    "sinkhorn": alternately,
    "softsign": lambda rest: (rest / rest.abs().mean()).clamp(-1.0, 1.0),
}


def one_matrix(shape: tuple[int, int], **options: Any) -> tuple[Frugal, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    named = [("w", weight)]
    return Frugal(named, project=["w"], process_group=None, lr=0.01, update_gap=2, **options), weight


@pytest.mark.parametrize("rule", DIRECTIONS)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (1, 7)])
def test_without_state_the_step_is_the_papers(rule: str, shape: tuple[int, int]) -> None:
    optimizer, weight = one_matrix(shape, state_free=rule, **NONE)
    want = torch.zeros(shape, dtype=torch.float64)
    for seed in range(4):
        torch.manual_seed(seed)
        weight.grad = torch.randn(shape, dtype=torch.float64)
        want -= 0.01 * DIRECTIONS[rule](weight.grad)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [*DIRECTIONS, "scaled"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_beside_a_basis_the_step_is_the_papers(rule: str, shape: tuple[int, int]) -> None:
    optimizer, weight = one_matrix(shape, state_free=rule, density=0.25, on_refresh="keep", state_full="sgdm")
    want, buffer = torch.zeros(shape, dtype=torch.float64), None
    for step in range(5):
        torch.manual_seed(step)
        grad = weight.grad = torch.randn(shape, dtype=torch.float64)
        if step % 2 == 0:
            left, _, right = torch.linalg.svd(grad, full_matrices=False)
            basis = right[:4].T if shape[0] >= shape[1] else left[:, :4]
        tall = shape[0] >= shape[1]
        low = grad @ basis if tall else basis.T @ grad
        buffer = low.clone() if buffer is None else 0.9 * buffer + low
        rest = grad - (low @ basis.T if tall else basis @ low)
        line = 1 if tall else 0
        if rule == "scaled":
            direction = rest * buffer.norm(dim=line, keepdim=True) / (low.norm(dim=line, keepdim=True) + 1e-8)
        else:
            direction = DIRECTIONS[rule](rest)
        want -= 0.01 * ((buffer @ basis.T if tall else basis @ buffer) + direction)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", DIRECTIONS)
def test_a_gradient_of_zeros_moves_nothing(rule: str) -> None:
    optimizer, weight = one_matrix((6, 4), state_free=rule, **NONE)
    for seed in range(2):
        torch.manual_seed(seed)
        weight.grad = torch.randn(6, 4, dtype=torch.float64)
        optimizer.step()
    before, weight.grad = weight.detach().clone(), torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def test_regular_parameters_beside_muon_are_adamws() -> None:
    torch.manual_seed(0)
    matrix, norm = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))
    other = nn.Parameter(norm.detach().clone())
    named, settings = [("matrix", matrix), ("norm", norm)], preset("muon", lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    optimizer = Frugal(named, project=["matrix"], process_group=None, projected_lr_scale=2.0, **settings)
    adamw = torch.optim.AdamW([other], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    for _ in range(3):
        matrix.grad, norm.grad = torch.randn(6, 4), torch.randn(5)
        other.grad = norm.grad.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(norm, other)
    assert set(optimizer.state[matrix]) & {"exp_avg", "exp_avg_sq"} == {"exp_avg"}


# --- resumes and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("portable", [False, True])
def test_a_run_goes_on_where_it_was(way: str, portable: bool, tmp_path: Path) -> None:
    check_resume(WAYS[way], portable, tmp_path)


@pytest.mark.parametrize("projection", ["columns", "rows", "randk", "randperm", "blockwise"])
def test_coordinates_leave_no_whole_lines(projection: str) -> None:
    with pytest.raises(ValueError, match=f"state_free='sinkhorn' needs whole rows.*projection='{projection}'"):
        FrugalConfig(state_free="sinkhorn", projection=projection)


def test_what_scales_the_rest_needs_a_state_full_part() -> None:
    with pytest.raises(ValueError, match=r"state_free='scaled' scales the rest .* density=0 has none"):
        FrugalConfig(state_free="scaled", density=0.0)


def test_what_is_scaled_has_no_rest() -> None:
    with pytest.raises(ValueError, match=r"combine='scale' .* leaves no rest to state_free='sinkhorn'"):
        FrugalConfig(combine="scale", state_free="sinkhorn")
    with pytest.raises(ValueError, match=r"combine='scale_matrix' .* density above 0"):
        FrugalConfig(combine="scale_matrix", density=0.0)
    with pytest.raises(ValueError, match=r"combine='scale' needs whole rows or columns.*projection='columns'"):
        FrugalConfig(combine="scale", projection="columns")


def test_growth_is_limited_where_lines_are_scaled() -> None:
    with pytest.raises(ValueError, match=r"growth_limit=1.01 .* not state_free='sign'"):
        FrugalConfig(growth_limit=1.01)
    with pytest.raises(ValueError, match=r"growth_limit=0.5 must be 0 or at least 1"):
        FrugalConfig(growth_limit=0.5, state_free="scaled")


def test_rules_that_need_lines_do_not_come_or_go_while_training() -> None:
    model, optimizer = model_of({"state_free": "sinkhorn"})
    train(model, optimizer, 1, 2)
    optimizer.param_groups[0]["state_free"] = "sign"
    with pytest.raises(ValueError, match="state_free was changed from 'sinkhorn' to 'sign' while training"):
        train(model, optimizer, 3, 3)
