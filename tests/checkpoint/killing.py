"""Real ranks that train and save, and SIGKILL. A program of its own, so that ranks can be forked in no time:

    python killing.py FOLDER DRILL [DRILL ...]

    random,same|steps,KILLS,SEED            two ranks: kill at random moments, go on from what is there
    every,same|steps,STRIDE,RANK,RANKS      kill at every STRIDE-th touch of the disk by one of so many ranks

After each kill new ranks load what is there. It must be the last checkpoint that was reported complete or the one that
was being written, and the run must go on bit for bit as one that was never killed. Prints a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from forks import Body, Ranks, Report
from torch import Tensor, nn

from frugal_dist import Frugal, checkpoint
from frugal_dist.checkpoint import disk

RANKS, SIZE, MATRICES, GAP = 2, 192, 6, 3
ROUND = 40
"""Steps after which a run starts over in an empty folder."""
PATIENCE = 120.0


class Run:
    """One rank's training. ``mode``: "same", one checkpoint that is replaced, or "steps", a folder of them."""

    def __init__(self, root: Path, mode: str) -> None:
        self.root, self.mode, self.done = root, mode, 0
        self.model = nn.ParameterDict({f"w{i}": torch.zeros(SIZE, SIZE + i) for i in range(MATRICES)})
        for number, weight in enumerate(self.model.values()):
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(number))
        self.optimizer = Frugal(
            [{"params": list(self.model.items()), "projected": True}],
            lr=1e-2, projection="columns", density=0.25, update_gap=GAP, state_free="sgd",
        )  # fmt: skip

    def step(self) -> None:
        generator = torch.Generator().manual_seed(1000 + self.done)
        noise = torch.randn(SIZE, SIZE + MATRICES, generator=generator)
        for weight in self.model.values():
            weight.grad = noise[:, : weight.shape[1]] * 0.1 + weight.detach() * 0.01
        self.optimizer.step()
        self.done += 1

    def save(self) -> None:
        if self.mode == "same":
            checkpoint.save(self.root / "one", self.model, self.optimizer, {"done": self.done})
        else:
            checkpoint.save_step(
                self.root, self.done, self.model, self.optimizer, {"done": self.done}, keep_last=2, keep_every=7
            )

    def load(self) -> None:
        """What is there; nothing if no save has ever been completed."""
        if self.mode == "same":
            if (self.root / "one").exists() or (self.root / ".one.old").exists():
                self.done = checkpoint.load(self.root / "one", self.model, self.optimizer)["done"]
        elif (found := checkpoint.load_latest(self.root, self.model, self.optimizer)) is not None:
            self.done = found[0]
            assert found[1] == {"done": self.done}

    def digest(self) -> int:
        """Of all weights and all state of this rank."""
        held: list[Tensor] = [weight.detach() for weight in self.model.values()]
        held += [value for store in self.optimizer.state.values() for _, value in sorted(store.items())]
        crc = self.done
        for tensor in held:
            crc = zlib.crc32(tensor.contiguous().view(-1).numpy().tobytes(), crc)
        return crc


def last(ranks: Ranks, word: str) -> int | None:
    """The highest number that any rank reported with ``word``."""
    return max((number for reports in ranks.reports for said, number in reports if said == word), default=None)


def until_killed(root: Path, mode: str) -> Body:
    """Load, then train and save until the end of the round; every step is reported with a digest."""

    def body(rank: int, report: Report) -> None:
        run = Run(root, mode)
        run.load()
        report(("loaded", run.done))
        report(("digest", run.digest()))
        while run.done < ROUND:
            run.step()
            report(("digest", run.digest()))
            report(("saving", run.done))
            run.save()
            report(("saved", run.done))

    return body


def never_killed(rank: int, report: Report) -> None:
    """The digests of a whole round."""
    run = Run(Path("nowhere"), "same")
    report(("digest", 0))
    while run.done < ROUND:
        run.step()
        report(("digest", run.digest()))


def digests(size: int, scratch: Path) -> list[list[int]]:
    ranks = Ranks(size, never_killed, scratch)
    assert ranks.reap(PATIENCE) == [0] * size, ranks.printed(0)
    return [[number for _, number in reports] for reports in ranks.reports]


def check_digests(ranks: Ranks, want: list[list[int]]) -> None:
    """Whatever step they are at, the run is the one that was never killed."""
    for rank, reports in enumerate(ranks.reports):
        done = None
        for word, number in reports:
            if word == "loaded":
                done = number - 1
            elif word == "digest" and done is not None:
                done += 1
                # Before the first step, state does not exist until somebody asks for it.
                assert done == 0 or number == want[rank][done], f"rank {rank} differs at step {done}"


# --- random moments -----------------------------------------------------------------------------------


class Moments:
    """When to kill: so long after a save began as saves were seen to last, or up to half as long again."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._durations = [0.1]

    def watch(self, ranks: Ranks) -> None:
        """Let some saves go by, then wait for a random moment of the next; returns early if a rank ends."""
        whole = self._chance.randrange(3)
        started: float | None = None
        while len(ranks.running) == RANKS:
            ranks.read(PATIENCE)
            word, _ = ranks.reports[0][-1] if ranks.reports[0] else ("", 0)
            now = time.monotonic()
            if word == "saving" and started is None:
                started = now
                if whole == 0:
                    break
            elif word != "saving" and started is not None:
                self._durations.append(now - started)
                started, whole = None, whole - 1
        until = time.monotonic() + self._chance.uniform(0.0, 1.5 * median(self._durations[-9:]))
        while (left := until - time.monotonic()) > 0 and len(ranks.running) == RANKS:
            ranks.read(left)


VICTIMS = {"all ranks": (0, 1), "rank 0 alone": (0,), "rank 1 alone": (1,)}
"""A rank that is left over must notice, and end with an error."""


def random_kills(root: Path, mode: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill, load, go on, kill again."""
    chance, scratch = random.Random(seed), root / "scratch"
    want = digests(RANKS, scratch)
    moments, turns = Moments(chance), list(VICTIMS)
    home, complete, found = root / "run0", 0, Counter[str]()
    while found["kills"] < kills:
        ranks = Ranks(RANKS, until_killed(home, mode), scratch)
        moments.watch(ranks)
        finished = len(ranks.running) < RANKS
        victims = turns[found["kills"] % len(turns)]
        if not finished:
            ranks.kill(*VICTIMS[victims])
        statuses = ranks.reap(PATIENCE)
        told = [ranks.printed(rank) for rank in range(RANKS)]
        loaded = last(ranks, "loaded")
        assert loaded is not None, f"a rank failed before it had loaded: {told}"
        assert loaded in (complete, complete + 1), f"step {complete} was complete, {loaded} was found"
        check_digests(ranks, want)
        if finished or statuses == [0] * RANKS:
            assert statuses == [0] * RANKS, told
            home, complete = root / f"run{time.monotonic_ns()}", 0
            continue
        assert 0 not in statuses, f"a rank went on without the other: {statuses}"
        complete = max(last(ranks, "saved") or 0, loaded)
        found["kills"] += 1
        found[victims] += 1
        found["while saving" if (last(ranks, "saving") or 0) > complete else "between saves"] += 1
    return dict(found)


# --- every moment -------------------------------------------------------------------------------------


def every_touch(root: Path, mode: str, stride: int, victim: int, size: int) -> dict[str, Any]:
    """Step 3 is saved; the kill hits step 4's save at its n-th touch of the disk, for one n after the other."""
    scratch, prepared = root / "scratch", root / "prepared"
    want = digests(size, scratch)

    def prepare(rank: int, report: Report) -> None:
        run = Run(prepared, mode)
        for _ in range(3):
            run.step()
            run.save()

    assert Ranks(size, prepare, scratch).reap(PATIENCE) == [0] * size
    found: Counter[int] = Counter()
    touch, survived = 1, False
    while not survived:
        home = root / f"run{touch}"
        shutil.copytree(prepared, home)
        complete, survived = _attempt(home, mode, victim, touch, size, scratch)
        loaded = _look(home, mode, want, scratch)
        assert loaded in {complete, 4}, f"touch {touch}: step {complete} was complete, {loaded} was found"
        left = [entry.name for entry in home.iterdir() if entry.name.startswith(".")]
        assert not left, f"touch {touch}: the next save should have cleared away {left}"
        shutil.rmtree(home)
        if not survived:
            found[loaded] += 1
            touch += stride
    return {"kills": found.total(), "the one before was loaded": found[3], "the new one was loaded": found[4]}


def _attempt(home: Path, mode: str, victim: int, touch: int, size: int, scratch: Path) -> tuple[int, bool]:
    """Save step 4 with a kill; (the step that was reported complete, whether the save ended before the kill came)."""

    def body(rank: int, report: Report) -> None:
        run = Run(home, mode)
        run.load()
        run.step()
        if rank == victim:
            _die_at(touch, home)
        run.save()
        report(("saved", run.done))

    ranks = Ranks(size, body, scratch)
    statuses = ranks.reap(PATIENCE)
    assert statuses[victim] in (0, -signal.SIGKILL), ranks.printed(victim)
    return (4 if last(ranks, "saved") is not None else 3), statuses[victim] == 0


def _look(home: Path, mode: str, want: list[list[int]], scratch: Path) -> int:
    """Load, check, train and save; the step that was found."""

    def body(rank: int, report: Report) -> None:
        run = Run(home, mode)
        run.load()
        report(("loaded", run.done))
        report(("digest", run.digest()))
        run.step()
        report(("digest", run.digest()))
        run.save()

    ranks = Ranks(len(want), body, scratch)
    assert ranks.reap(PATIENCE) == [0] * len(want), f"nothing could be loaded: {ranks.printed(0)}"
    check_digests(ranks, want)
    loaded = last(ranks, "loaded")
    assert loaded is not None
    return loaded


def _die_at(touch: int, home: Path) -> None:
    """From now on count what this process does to files under ``home``, and die just before the given one."""
    seen = 0

    def count(path: object) -> None:
        nonlocal seen
        if isinstance(path, (str, bytes, os.PathLike)) and str(home) in os.fsdecode(path):
            seen += 1
            if seen == touch:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"):
            count(arguments[0])

    write, finish = disk.Output.write, disk.Output.finish

    def counted_write(self: disk.Output, data: bytes | memoryview) -> int:
        written = write(self, data)
        self._file.flush()
        count(self._path)
        return written

    def counted_finish(self: disk.Output) -> disk.Written:
        found = finish(self)
        count(self._path)
        return found

    disk.Output.write, disk.Output.finish = counted_write, counted_finish  # type: ignore[method-assign]
    sys.addaudithook(hook)


def main() -> None:
    torch.set_num_threads(1)
    Run(Path("nowhere"), "same").step()  # whatever is imported late is imported now, once
    folder, *drills = sys.argv[1:]
    for drill in drills:
        kind, mode, *numbers = drill.split(",")
        act = {"random": random_kills, "every": every_touch}[kind]
        print(json.dumps(act(Path(folder) / drill, mode, *map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()
