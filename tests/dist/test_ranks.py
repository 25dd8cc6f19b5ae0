"""No rank alone: what one cannot begin no rank begins, and one that is gone is named. Real processes."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import rank_jobs
import torch
from processes import Fleet
from torch import distributed
from torch.distributed import HashStore

from frugal_dist.notices import RANKS
from frugal_dist.training.distributed import ranks as group
from frugal_dist.training.distributed.place import LAUNCHERS, DistEnv, find_dist_env
from frugal_dist.training.distributed.ranks import _agreed_gpu, gpu_index, process_group


def test_what_works_everywhere_goes_on(fleet: Fleet) -> None:
    assert fleet.run(3, rank_jobs.beginning, {}) == [f"made by {rank}" for rank in range(3)]


def test_a_rank_that_fails_is_heard_by_all(fleet: Fleet) -> None:
    found = fleet.run(3, rank_jobs.beginning, {1: "no such file"})
    assert found[1] == "ValueError: no such file"
    assert found[0] == found[2] == "PeerFailed: rank 1 failed: ValueError: no such file"


def test_what_fails_alike_on_all_ranks_is_said_once(fleet: Fleet) -> None:
    found = fleet.run(3, rank_jobs.beginning, {0: "typo", 1: "typo", 2: "another"})
    assert [text.split(":")[0] for text in found] == ["ValueError", "PeerFailed", "ValueError"]


def test_the_first_of_those_that_live_names_the_missing(fleet: Fleet) -> None:
    found = fleet.run(3, rank_jobs.roll_call, 1, "[gloo/transport/tcp/pair.cc] Connection closed by peer")
    assert found[0].startswith("RankLost: no word from rank 1 (")
    assert found[2].startswith("PeerFailed: no word from rank 1 (")


def test_other_errors_stay_what_they_are(fleet: Fleet) -> None:
    assert fleet.run(2, rank_jobs.roll_call, 1, "out of memory") == ["RuntimeError: out of memory", ""]


def test_a_quick_rank_does_not_meet_the_others_where_they_were(fleet: Fleet) -> None:
    """A comparison trains several times in a process, under launchers whose rank 0 holds the store itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert fleet.run(2, rank_jobs.meeting_twice, port) == [2.0, 2.0]


@pytest.mark.parametrize("batches", [(3, 1), (0, 2)])
def test_a_join_context_is_refused_before_it_begins(batches: tuple[int, int], fleet: Fleet) -> None:
    """On all ranks, also on one that has no batch; not where no rank waits for another."""
    (first, weights), (second, others) = fleet.run(2, rank_jobs.joining, batches)
    for told in (first, second):
        assert len(told) == 4
        assert all(text.startswith("A join context goes on with the ranks that still have") for text in told[:3])
        assert "exhausted" in told[3]
    assert torch.equal(weights, others)
    assert not torch.equal(weights, torch.full_like(weights, 0.5))


def test_a_folder_that_hosts_do_not_share_is_found_before_training(fleet: Fleet, tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir()
    found = fleet.run(3, rank_jobs.sharing, [str(ours), str(other), str(other)])
    assert [text.split(":")[0] for text in found] == ["PeerFailed", "ValueError", "PeerFailed"]
    assert f"{other} on " in found[1] and "choose a --folder" in found[1]
    assert fleet.run(3, rank_jobs.sharing, [str(ours)] * 3) == [""] * 3
    assert not [*ours.iterdir(), *other.iterdir()]


@pytest.mark.parametrize("backend", ["gloo", "fake"])
def test_a_rank_that_failed_alone_does_not_wait_to_leave(backend: str) -> None:
    """NCCL's group is left by all ranks or by none; torch's fake one stands for it here."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # makes the backend known

    place = DistEnv(0, 1, 0, 1, "127.0.0.1", 1, "none")
    for fails in (True, False):
        if not distributed.is_initialized():
            distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        with suppress(ZeroDivisionError), process_group(place):
            assert 1 / (not fails)
        assert distributed.is_initialized() == (fails and backend != "gloo")


def test_each_rank_has_a_gpu_of_its_own() -> None:
    place = DistEnv(5, 8, 1, 4, "node1", 29500, "Slurm")
    assert gpu_index(place, 4) == 1
    assert gpu_index(place, 1) == 0  # the launcher shows each rank only its own
    with pytest.raises(ValueError, match="rank 5 is number 3 of its host"):
        gpu_index(DistEnv(5, 8, 3, 4, "node1", 29500, "Slurm"), 2)


def test_a_rank_without_a_gpu_is_heard_by_all() -> None:
    """On a host with fewer GPUs than ranks, or with a broken driver: told before there is a group."""
    places = [DistEnv(rank, 2, rank, 2, "node1", 29500, "Slurm") for rank in range(2)]
    for counts, expected, words in (
        ((2, 2), [0, 1], "None"),
        ((0, 0), [None, None], "None"),
        ((0, 2), ["ValueError", "PeerFailed"], "rank 0 failed: rank 0 ("),
        ((3, 0), ["PeerFailed", "ValueError"], "sees no GPU, but others do"),
    ):
        store = HashStore()
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(_agreed_gpu, place, count, store) for place, count in zip(places, counts, strict=True)]
            errors = [one.exception() for one in asked]
        found = [type(error).__name__ if error else one.result() for one, error in zip(asked, errors, strict=True)]
        assert found == expected
        assert words in str(errors[expected[0] == "ValueError"])


def test_without_mpi4py_or_an_address_the_error_says_what_to_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(ValueError, match="export MASTER_ADDR"):
        find_dist_env({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"})


def test_the_first_word_is_the_first_ranks_with_every_launcher() -> None:
    """It is said before torch is loaded, by a list of its own."""
    assert tuple(launcher.rank for launcher in LAUNCHERS.values()) == RANKS


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = DistEnv(0, 2, 0, 2, "127.0.0.1", taken.getsockname()[1], "torchrun or deepspeed")
        for name, value in place.environment().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"MASTER_PORT={place.port} is taken"), process_group(place):
            pass


def test_a_long_wait_says_for_what_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    twice = threading.Event()

    def tell(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            twice.set()

    monkeypatch.setattr(group, "tell", tell)
    with group.waiting("nobody"):
        pass
    monkeypatch.setattr(group, "FIRST_WORD", 0.01)
    monkeypatch.setattr(group, "LATER_WORDS", 0.01)
    with group.waiting("other ranks"):
        assert twice.wait(60)
    assert set(said) == {"waiting for other ranks, for 0 min"}
