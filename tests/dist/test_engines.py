"""torch's real engines in real processes: the weights of one process after 7 steps, to 1e-10 in float64."""

from __future__ import annotations

from pathlib import Path

import engine_jobs
import pipeline_jobs
import pytest
import tables
import torch
from engine_jobs import ENGINES, Job
from processes import Fleet
from selection import mostly_heavy

from frugal_dist import Frugal, checkpoint

PROJECTIONS = [Job(), Job(side="left"), Job("columns"), Job("rows"), Job("randk"), Job("blockwise"), Job("random")]
FAMILY = {
    "dct": Job("dct"),
    # Not "keep", as in the preset: moments would stay as they are when a singular vector's sign turns, and on some
    # machines LAPACK turns one for gradients that differ in the last bit, as these do. Threads, whose bits are equal,
    # have "keep".
    "fira": Job(more=(("on_refresh", "project"), ("state_free", "scaled"), ("growth_limit", 1.01))),
    "sinkgd": Job("columns", more=(("density", 0.0), ("state_free", "sinkhorn"))),
    "muon": Job("columns", more=(("density", 1.0), ("state_full", "muon"))),
    "no gradient on some steps": Job("dct", silent=(1, 3, 4), more=(("state_free", "softsign"),)),
}
AROUND = {
    "accumulation": Job(micro_steps=3),
    "accumulation, columns": Job("columns", micro_steps=3),
    "clipping": Job(clip=0.05),
    "tied embeddings": Job(tied=True),
    "weight-decay groups": Job(decay_groups=True),
    "no gradient on some steps": Job(silent=(1, 3, 4)),
    "frozen, then unfrozen": Job("randk", freeze=(0, 1, 2)),
    "lr and density schedules": Job(schedule=True),
    "density schedule, kept state": Job("columns", schedule=True, more=(("on_refresh", "keep"),)),
}


def check(fleet: Fleet, engine: str, jobs: dict[str, Job], ranks: int) -> None:
    names, found = list(jobs), fleet.run(ranks, engine_jobs.compare, engine, list(jobs.values()))
    for name, *differences in zip(names, *found, strict=True):
        title = "real engines against one process, float64: largest difference"
        tables.note(title, name, f"{engine}, {ranks} ranks", max(differences))
    worst = {name: max(d) for name, *d in zip(names, *found, strict=True)}
    assert max(worst.values()) < 1e-10, worst


def ranks_for(engine: str) -> int:
    return 4 if engine.startswith("HSDP") else 2


@pytest.mark.parametrize("engine", ["FSDP2 2 x TP 2", "HSDP 2x2"])
def test_two_axes(fleet: Fleet, engine: str) -> None:
    """With TP o_proj lies in quarters, q, k and v are cut by rows twice, the others once; 101 rows do not divide."""
    check(fleet, engine, {"svd": Job(), "columns": Job("columns")}, 4)


@pytest.mark.heavy
@pytest.mark.parametrize("projection", ["svd", "columns", "blockwise"])
def test_pipeline_stages_with_fsdp2_in_each(fleet: Fleet, projection: str, tmp_path: Path) -> None:
    """Their checkpoint goes on there, and on one process."""
    job = Job(projection)
    for found in fleet.run(4, pipeline_jobs.difference, job, tmp_path / "saved"):
        tables.note("real engines against one process, float64: largest difference", projection, "two stages", found)
        assert found < 1e-10
    model = engine_jobs.build(job)
    optimizer = engine_jobs.make_optimizer(model, job, process_group=None)
    checkpoint.load(tmp_path / "saved", model, optimizer)
    assert pipeline_jobs.difference_of_the_rest(model, optimizer, job) < 1e-10


OFTEN = ("DDP", "FSDP2")
"""In the default run."""


@pytest.mark.parametrize("engine", mostly_heavy((engine for engine in ENGINES if "TP" not in engine), OFTEN))
def test_every_projection(fleet: Fleet, engine: str) -> None:
    check(fleet, engine, {f"{job.projection} {job.side}": job for job in PROJECTIONS}, ranks_for(engine))


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["DDP, shared state", "FSDP2"])
def test_the_family(fleet: Fleet, engine: str) -> None:
    """Rules whose norms cross ranks, and whole matrices."""
    check(fleet, engine, FAMILY, ranks_for(engine))


@pytest.mark.parametrize("engine", mostly_heavy(["DDP, shared state", "FSDP2", "HSDP 2x2"], OFTEN))
def test_what_happens_around_a_step(fleet: Fleet, engine: str, request: pytest.FixtureRequest) -> None:
    """12 rows divide by 3 micro-steps and 2 or 4 ranks. By default every other of them."""
    some = dict(list(AROUND.items())[:: 1 if request.config.getoption("--heavy") else 2])
    check(fleet, engine, some, ranks_for(engine))


def test_uneven_and_empty_shards(fleet: Fleet) -> None:
    """101 and 97 rows do not divide by 3."""
    check(fleet, "FSDP2", {"svd std": Job(), "randk": Job("randk")}, 3)


def test_accumulation_equals_one_large_batch() -> None:
    """1 x 3 equals 3 x 1 on one process, so on all engines. A LLaMA has parts in fp32, these layers have none."""

    def trained(micro_steps: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(19, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)).double()
        named = [("first.weight", model[0].weight), ("second.weight", model[2].weight)]
        optimizer = Frugal([{"params": named, "projected": True}], process_group=None, **Job().options)
        for rows in torch.randn(engine_jobs.STEPS, 12, 19).double():
            optimizer.zero_grad()
            for part in rows.chunk(micro_steps):
                (model(part).square().mean() / micro_steps).backward()
            optimizer.step()
        return [param.detach() for param in model.parameters()]

    assert max(float((a - b).abs().max()) for a, b in zip(trained(1), trained(3), strict=True)) < 1e-10


def test_mixed_precision_keeps_fp32_masters(fleet: Fleet) -> None:
    job = Job(dtype=torch.float32, more=(("state_free", "sgd"), ("eps", 1e-3)))
    for distance, dtypes in fleet.run(2, engine_jobs.mixed_precision, job):
        assert dtypes == {torch.float32}
        assert distance < 0.1  # bf16 forward and backward; a wrong update would be off by about 1


@pytest.mark.parametrize("engine", ["FSDP2", "DDP"])
def test_bf16_with_remainders_is_fp32_masters(engine: str, fleet: Fleet) -> None:
    job = Job(dtype=torch.float32, more=(("on_refresh", "keep"),))
    assert fleet.run(2, engine_jobs.with_masters, job, engine) == [[], []]


@pytest.mark.parametrize(
    ("kind", "word"),
    [("partial", "a Partial parameter has no values"), ("FSDP1", "FSDP2"), ("FSDP1 with original parameters", "FSDP2")],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(fleet: Fleet, kind: str, word: str) -> None:
    for message in fleet.run(4, engine_jobs.refused, kind):
        assert word in message


@pytest.mark.parametrize("option", ["full_state_dict", "flatten_optimizer_state_dict"])
def test_options_that_lose_parts_of_the_state_are_refused(fleet: Fleet, option: str) -> None:
    for message in fleet.run(2, engine_jobs.saved_with, option):
        assert f"with {option}=True torch.distributed.checkpoint would lose the others' parts" in message


def test_an_optimizer_built_before_fully_shard_says_that_it_does_nothing(fleet: Fleet) -> None:
    for messages in fleet.run(2, engine_jobs.built_too_early):
        assert len(messages) == 1
        assert "built before fully_shard" in messages[0]
