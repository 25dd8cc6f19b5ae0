"""torch.distributed.checkpoint resumes on another number of ranks, whatever the projection, as on one process."""

from __future__ import annotations

from pathlib import Path

import dcp_jobs
import pytest
import torch
from cases import PROJECTIONS, Case, reference
from processes import Fleet

from frugal_dist.checkpoint.parts import LOW
from frugal_dist.checkpoint.reader import Reader

FREE = (("state_free", "scaled"), ("growth_limit", 1.01))
"""A rule that keeps something itself; a 1x9 gradient has no rest to be scaled."""
CASES = [
    *(Case(projection, side, "keep") for projection, side in PROJECTIONS),
    Case("dct", "std", "keep", free="scaled", more=FREE, names=("tall", "wide", "square", "experts")),
    Case("svd", "right", "keep", more=(("moments", "8bit"),)),  # rows are not cut, so that ranks make no difference
    Case("svd", "std", "keep", free="sgd", more=(dcp_jobs.ROUNDED,)),
]
WAYS = [
    ("Shard(0)", 2, "Shard(0)", 3),
    ("replicas, shared state", 2, "replicas, shared state", 2),
    ("HSDP 2x2", 4, "HSDP 2x2", 4),
    ("Shard(0)", 3, "FSDP2 2 x TP 2", 4),
    ("FSDP2 2 x EP 2", 4, "Shard(0)", 2),
]


FEW = [case for case in CASES if case.projection == "columns" or (case.projection, case.side) == ("svd", "std")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("source", "before", "target", "after", "cases"),
    [(*WAYS[0], FEW), *(pytest.param(*way, CASES, marks=pytest.mark.heavy) for way in WAYS)],
)
def test_other_ranks_go_on(
    source: str, before: int, target: str, after: int, cases: list[Case], fleet: Fleet, tmp_path: Path
) -> None:
    cases = [case for case in cases if "TP" not in target or case.projection not in ("columns", "randk")]
    fleet.run(before, dcp_jobs.save_all, source, cases, tmp_path)
    for found in fleet.run(after, dcp_jobs.load_all, target, cases, tmp_path):
        for case, full in zip(cases, found, strict=True):
            want, tolerance = reference(case, dcp_jobs.dtype_of(case)), case.tolerance
            if dcp_jobs.ROUNDED in case.more:
                tolerance = 2**-8
                before_after = [Reader(tmp_path / f"{cases.index(case)}.{when}") for when in ("saved", "loaded")]
                for name in before_after[0].index.tensors:
                    assert torch.equal(*(reader.whole(name) for reader in before_after)), name
                assert any(bool(before_after[1].whole(LOW + name).any()) for name in want)
            assert max(float((full[name] - want[name]).abs().max()) for name in want) < tolerance, case
