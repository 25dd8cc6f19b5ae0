"""torch.distributed.checkpoint resumes on another number of ranks, whatever the projection, as on one process."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import dcp_jobs
import pytest
import torch
import torch.multiprocessing as mp
from cases import PROJECTIONS, Case, reference
from processes import Fleet
from torch.distributed.checkpoint._async_process_executor import _AsyncCheckpointProcess

from frugal_dist.checkpoint.parts import LOW
from frugal_dist.checkpoint.reader import Reader
from frugal_dist.engines.pieces import Pieces

FREE = (("state_free", "scaled"), ("growth_limit", 1.01))
"""A rule that keeps something itself; a 1x9 gradient has no rest to be scaled."""
CASES = [
    *(Case(projection, side, "keep") for projection, side in PROJECTIONS),
    Case("dct", "std", "keep", free="scaled", more=FREE, names=("tall", "wide", "square", "experts")),
    Case("svd", "right", "keep", more=(("moments", "8bit"),)),  # rows are not cut, so that ranks make no difference
    Case("svd", "std", "keep", free="sgd", more=(dcp_jobs.ROUNDED,)),
    # Whole matrices are shared along their longer side, be it the lines' own or not.
    *(Case(projection, "std", "keep", densities=(1.0,)) for projection in ("columns", "rows", "randk")),
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


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_a_container_that_goes_by_names_and_saves_beside_the_next_step(fleet: Fleet, tmp_path: Path) -> None:
    """torchtitan's does: it needs the names when it is saved, and finds what to load by the keys of what is live."""
    cases = [case for case in FEW if not case.more] + [case for case in CASES if ("moments", "8bit") in case.more]
    fleet.run(2, dcp_jobs.save_all, "Shard(0)", cases, tmp_path, True, True)
    for found in fleet.run(3, dcp_jobs.load_all, "Shard(0)", cases, tmp_path, True):
        for case, full in zip(cases, found, strict=True):
            want = reference(case, torch.float64)
            assert max(float((full[name] - want[name]).abs().max()) for name in want) < case.tolerance, case


def test_a_process_that_saves_gets_the_rectangles() -> None:
    """Of an ordinary tensor it would save the first rank's as if it were the whole."""
    own = torch.arange(6.0)
    pieces = Pieces((4, 3), own, [((2, 0), own.view(2, 3))])
    here, there = mp.Pipe()
    _AsyncCheckpointProcess._send(SimpleNamespace(_process_pipe=here), pieces)  # type: ignore[arg-type]
    got = there.recv()
    assert isinstance(got, Pieces) and got.shape == (4, 3)
    ((begin, values),) = got.rectangles
    assert begin == (2, 0) and values.tolist() == own.view(2, 3).tolist()
    assert pickle.loads(pickle.dumps(pieces)).tolist() == own.tolist()  # a rank's own file: its part
