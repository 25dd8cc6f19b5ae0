"""The sections of gpu_report.py: what is measured, and how.

A section is a function of (bench, report). It looks at ``bench.enough()`` between measurements, and gives each table to
the report as soon as it is there.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import end_to_end
import peers
import torch
from plain_llama import PlainLlama, plain_losses
from step_time import machine, quartiles, take_turns
from torch import Tensor

from frugal_dist import Frugal, split_parameters
from frugal_dist.config import CHOICES
from frugal_dist.planner import LLAMA_SHAPES, LlamaShape
from frugal_dist.planner.layouts import engine_layout
from frugal_dist.planner.plan import make_plan
from frugal_dist.projection import exact_svd, gaussian, svd
from frugal_dist.projection.basis import Basis, add_up_, basis_shapes, down, residual
from frugal_dist.projection.dictionary import column_energies, largest
from frugal_dist.projection.numerics import full_precision
from frugal_dist.projection.subspace import gram_svd, subspace_svd
from frugal_dist.training.metrics.device import surroundings
from frugal_dist.update.kernels import kind_for

DENSITY = 0.25
NEVER = 10**9
Params = list[torch.nn.Parameter]


class Writes(Protocol):
    """A report."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...

    def note(self, text: str) -> None: ...


class Sample(NamedTuple):
    """Milliseconds of two calls: of one on the device, and of one on the host until it returns, the device idle before.

    A stream takes about a thousand launches that wait; then the host waits too: of a call with more of them, on a
    device that is slower than the host, the host's time is about the device's.
    """

    device: float
    host: float


@dataclass(frozen=True)
class Sizes:
    """What is measured. ``steps``: a LLaMA, how many of its layers (0: all), dtype."""

    steps: tuple[tuple[str, int, str], ...]
    matrices: tuple[tuple[int, int], ...]
    models: tuple[str, ...]
    peers: tuple[str, int]
    learning: str
    micro: int
    batch: int
    length: int
    rounds: int
    warmup: int
    buffer: int
    square: int


FULL = Sizes(
    steps=(("1B", 0, "float32"), ("60M", 0, "float32"), ("1B", 0, "bfloat16"), ("7B", 2, "float32")),
    matrices=((512, 512), (1376, 512), (2048, 2048), (5461, 2048), (2048, 5461), (4096, 4096), (11008, 4096)),
    models=("60M", "130M", "1B"), peers=("60M", 0), learning="60M", micro=64, batch=512, length=256, rounds=40,
    warmup=2,
    buffer=1 << 28, square=8192,
)  # fmt: skip
TINY = Sizes(
    steps=(("quick", 1, "float32"), ("quick", 1, "bfloat16")),
    matrices=((48, 32), (32, 48)), models=("tiny",), peers=("quick", 1), learning="tiny", micro=2, batch=4, length=8,
    rounds=1, warmup=0, buffer=1 << 12, square=32,
)  # fmt: skip
SHAPES = {**LLAMA_SHAPES, "tiny": LlamaShape(32, 48, 2, 2, 256)}


def has_events(device: torch.device) -> bool:
    """Whether there is a driver to ask for time and memory."""
    return device.type == "cuda" and torch.cuda.is_available()


LONGEST_SLEEP = 100.0
"""Milliseconds."""


class Bench:
    """The device, how calls are timed on it, and until when."""

    def __init__(self, device: torch.device, tiny: bool, data: Path | None, out: Path) -> None:
        self.device, self.sizes, self.data, self.out = device, TINY if tiny else FULL, data, out
        self.until = math.inf
        self.rates = {"copy": 1e9, "fp32": 1e10, "bf16": 1e11}  # per ms; guesses until "card" has measured them
        self.events = has_events(device)

    def enough(self) -> bool:
        """Whether the time of this section, or of this part of it, has passed."""
        return time.time() >= self.until

    @contextmanager
    def within(self, part: float) -> Iterator[None]:
        """The time that is left counts for this part only."""
        whole, now = self.until, time.time()
        self.until = now + part * max(0.0, whole - now) if math.isfinite(whole) else whole
        try:
            yield
        finally:
            self.until = whole

    def wait(self) -> None:
        if self.events:
            torch.cuda.synchronize(self.device)

    def timed(self, step: Callable[[], object]) -> Sample:
        if not self.events:
            start = time.perf_counter()
            step()
            took = 1e3 * (time.perf_counter() - start)
            return Sample(took, took)
        self.wait()
        start = time.perf_counter()
        step()
        host = 1e3 * (time.perf_counter() - start)
        self.wait()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ahead = min(LONGEST_SLEEP, max(1.0, 2 * host))  # the device sleeps until the host is done, or has queued enough
        torch.cuda._sleep(int(2e6 * ahead))  # cycles, at most about 2e6 in a millisecond
        begin.record()
        step()
        end.record()
        self.wait()
        return Sample(begin.elapsed_time(end), host)

    def median(self, call: Callable[[], object], rounds: int = 7) -> float:
        """Milliseconds on the device."""
        call()
        found = []
        for _ in range(rounds):
            found.append(self.timed(call).device)
            if self.enough():
                break
        return statistics.median(found)

    def waiting(self, call: Callable[[], object]) -> float:
        """Milliseconds until the results are there: of a call in which the host waits for the device. Median of 3."""
        found: list[float] = []
        while len(found) < 4 and not (found and self.enough()):  # the first one has the start of cuSOLVER in it
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            found.append(1e3 * (time.perf_counter() - start))
        return statistics.median(found[1:] or found)

    def turns(self, contenders: Mapping[str, Callable[[], object]], rounds: int = 1000) -> dict[str, list[Sample]]:
        return take_turns(contenders, min(rounds, self.sizes.rounds), self.sizes.warmup, self.timed, self.enough)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.events else 0

    def free(self) -> int:
        """Bytes; a guess where nobody can be asked."""
        return torch.cuda.mem_get_info(self.device)[0] if self.events else 1 << 33

    def cleared(self) -> bool:
        """Memory is given back; False if the device does not answer any more."""
        gc.collect()
        try:
            self.wait()
            if self.events:
                torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True


def about(bench: Bench) -> dict[str, str]:
    """Device, driver, versions, and what is missing."""
    found = {**machine(bench.device), **surroundings()}
    found["device"] = machine(bench.device)["device"] if bench.events or bench.device.type == "cpu" else "pretended"
    if bench.events:
        properties = torch.cuda.get_device_properties(bench.device)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} processors"
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(bench.device)))
        found["CUDA"] = str(torch.version.cuda)
        found["driver"] = _driver()
    names = ("triton", "bitsandbytes", "torchao", "galore-torch", "apollo-torch", "flashoptim")
    found |= {name: _version(name) for name in names}
    missing = [name for name in ("triton", "deepspeed", "transformers") if not importlib.util.find_spec(name)]
    found["missing"] = ", ".join(missing)
    one = torch.zeros(1, 1, device=bench.device)
    found["kernels"] = kind_for(one)
    return found


def _driver() -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


# --- what the card can do --------------------------------------------------------------------------


def card(bench: Bench, report: Writes) -> None:
    """Bandwidth, rates of products, and what a start costs: all floors are computed from these."""
    device, sizes = bench.device, bench.sizes
    source = torch.zeros(sizes.buffer, device=device)
    target = torch.zeros_like(source)
    copied = 8 * sizes.buffer / bench.median(lambda: target.copy_(source))
    n = sizes.square
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    work = 2.0 * n**3
    with full_precision():
        fp32 = work / bench.median(lambda: a @ b, 3)
    low_a, low_b = a.bfloat16(), b.bfloat16()
    bf16 = work / bench.median(lambda: low_a @ low_b, 5)
    one = torch.zeros(1, device=device)
    starts = 100

    def start() -> None:
        for _ in range(starts):
            one.add_(1.0)

    bench.median(start)
    host = statistics.median(bench.timed(start).host for _ in range(5)) / starts
    bench.rates = {"copy": copied, "fp32": fp32, "bf16": bf16}
    rows = [
        ("copy (read and written), GB/s", copied / 1e6),
        ("fp32 product, TFLOP/s", fp32 / 1e9),
        ("bf16 product, TFLOP/s", bf16 / 1e9),
        ("a start from Python, µs", 1e3 * host),
    ]
    report.table("Measured here, the base of all floors below", ("what", "value"), rows)


# --- a step ----------------------------------------------------------------------------------------


@contextmanager
def any_basis() -> Iterator[None]:
    """Refreshes take random columns at once: what a step costs does not depend on them, and an SVD would take long."""

    def columns(grad: Tensor, side: str, r: int) -> Basis:
        shapes = basis_shapes(side, *grad.shape, r)
        parts = {name: torch.randn(shape, dtype=grad.dtype, device=grad.device) for name, shape in shapes.items()}
        return Basis(**{name: part / math.sqrt(part.shape[0]) for name, part in parts.items()})

    def drawn(rows: int, cols: int, side: str, r: int, *, dtype: torch.dtype, **_: object) -> Basis:
        return columns(torch.empty(rows, cols, dtype=dtype), side, r)

    real = svd.exact_svd, gaussian.random_basis
    svd.exact_svd, gaussian.random_basis = columns, drawn
    try:
        yield
    finally:
        svd.exact_svd, gaussian.random_basis = real


class Contender(NamedTuple):
    """Options of Frugal, bytes moved per entry beside weight and gradient, products of the step, and the goal.

    ``low``: only with bf16 weights.
    """

    options: dict[str, Any]
    state: float
    products: str = ""
    goal: float | None = None
    low: bool = False


KEPT = 16 * DENSITY  # two moments in fp32, read and written
CONTENDERS = {
    "columns": Contender({"projection": "columns"}, KEPT, goal=0.7),
    "rows": Contender({"projection": "rows"}, KEPT, goal=0.7),
    "randk": Contender({"projection": "randk"}, KEPT + 0.125),
    "randperm": Contender({"projection": "randperm"}, KEPT),
    "blockwise": Contender({"projection": "blockwise"}, KEPT),
    "density 0": Contender({"projection": "columns", "density": 0.0}, 0.0, goal=0.55),
    "svd": Contender({"projection": "svd"}, KEPT, "fp32"),
    "svd, bf16x3": Contender({"projection": "svd", "matmul": "bf16x3"}, KEPT, "bf16"),
    "random": Contender({"projection": "random"}, KEPT, "fp32"),
    "svd, Lion": Contender({"projection": "svd", "state_full": "lion"}, KEPT, "fp32"),
    "dct": Contender({"projection": "dct"}, KEPT, "fp32"),
    "columns, 8bit": Contender({"projection": "columns", "moments": "8bit"}, KEPT / 4, low=True),
    "columns, stochastic": Contender({"projection": "columns", "rounding": "stochastic"}, KEPT, low=True),
    "columns, remainder": Contender({"projection": "columns", "rounding": "remainder"}, KEPT + 4, low=True),
}
DRAWN = 2 * 10**8
"""Entries of a model up to which randk is measured: a CPU draws a hundred million in a few seconds."""
TOO_LONG = "the host would draw its entries for half a minute"
OVER_PRODUCTS = 1.3
"""How many times its products' time a step of svd may take."""


def drawn_too_long(name: str, params: Params) -> bool:
    """Whether the host would draw what this contender selects for half a minute."""
    return name == "randk" and sum(param.numel() for param in params) > DRAWN


def frugal(params: Params, gap: int = NEVER, **options: Any) -> Frugal:
    named = [(f"layers.{i}.weight", weight) for i, weight in enumerate(params)]
    settings = {"lr": 1e-6, "density": DENSITY, "update_gap": gap, "process_group": None, **options}
    return Frugal([{"params": named, "projected": True}], **settings)


def fitting(bench: Bench, size: str, layers: int, dtype: torch.dtype, contenders: int) -> int:
    """As many layers as fit into the device's memory together with all states."""
    shapes = peers.shapes_of(size, layers)
    needed = peers.SLACK * sum(rows * cols for rows, cols in shapes) * (2 * dtype.itemsize + 8 + 2.5 * contenders)
    count = len(shapes) // 7
    return max(1, min(count, int(count * 0.9 * bench.free() / needed)))


def step(bench: Bench, report: Writes) -> None:
    """All projections between two refreshes, in turns with torch's fused AdamW."""
    report.note(
        "Device: milliseconds of the GPU, everything queued beforehand. Host: until step() returns, the device idle "
        "before; once about a thousand launches are queued it waits, and of a step with more this may be the device's "
        "time. Floor: bytes over the copy's bandwidth, with a basis products over their rate. Medians, in turns, "
        f"density {DENSITY}. The goal of svd is {OVER_PRODUCTS} × its floor, that of others × AdamW."
    )
    for place, (size, layers, kind) in enumerate(bench.sizes.steps):
        if bench.enough():
            report.note(f"No time was left for {size} in {kind}.")
            continue
        dtype = getattr(torch, kind)
        with bench.within(1 / (len(bench.sizes.steps) - place)), any_basis():
            count = sum(dtype == torch.bfloat16 or not one.low for one in CONTENDERS.values())
            _steps_of(bench, report, size, fitting(bench, size, layers, dtype, count), dtype)
        bench.cleared()


def _steps_of(bench: Bench, report: Writes, size: str, layers: int, dtype: torch.dtype) -> None:
    shapes = peers.shapes_of(size, layers)
    params = peers.make_params(shapes, bench.device, dtype)
    adamw = torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True)
    steps: dict[str, Callable[[], object]] = {"AdamW, fused": adamw.step}
    failed = {}
    entries = sum(map(math.prod, shapes))
    for name, one in CONTENDERS.items():
        if one.low and dtype != torch.bfloat16:
            continue
        if drawn_too_long(name, params):
            failed[name] = TOO_LONG
            continue
        try:
            optimizer = frugal(params, **one.options)
            optimizer.step()
            steps[name] = optimizer.step
        except Exception as error:  # one that cannot run must not cost the others
            failed[name] = f"{type(error).__name__}: {error}"
    times = bench.turns(steps)
    base = times["AdamW, fused"]
    rows: list[list[Any]] = []
    for name, samples in times.items():
        low, middle, high = quartiles([one.device / other.device for one, other in zip(samples, base, strict=True)])
        device, host = (statistics.median(getattr(one, key) for one in samples) for key in ("device", "host"))
        floor, goal = floor_of(bench, name, shapes, dtype)
        reached = device / floor if name in CONTENDERS and CONTENDERS[name].products else middle
        verdict = "" if goal is None else "met" if reached <= goal else "MISSED"
        waits = "" if host <= device else "host"
        rows.append([name, device, middle, f"{low:.2f}–{high:.2f}", floor, device / floor, host, goal, verdict, waits])
    columns = (
        "optimizer",
        "device, ms",
        "× AdamW",
        "quartiles",
        "floor, ms",
        "× floor",
        "host, ms",
        "goal",
        "",
        "bound by",
    )
    title = f"LLaMA-{size}, {layers} layers, {len(shapes)} matrices, {entries / 1e6:.0f} M entries, {dtype}"
    report.table(title, columns, rows)
    for name, error in failed.items():
        report.note(f"{name} ({size}, {dtype}) is left out: {error}")


def floor_of(
    bench: Bench, name: str, shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[float, float | None]:
    """Milliseconds that it must take at least on this card, and the goal."""
    rates, entries = bench.rates, sum(map(math.prod, shapes))
    if name not in CONTENDERS:  # AdamW keeps its moments in the weights' dtype
        return entries * 7 * dtype.itemsize / rates["copy"], None
    one = CONTENDERS[name]
    if not one.products:
        return entries * (3 * dtype.itemsize + one.state) / rates["copy"], one.goal
    flops = sum(6 * rows * cols * round(DENSITY * min(rows, cols)) for rows, cols in shapes)
    return flops * (3 if one.products == "bf16" else 1) / rates[one.products], OVER_PRODUCTS


# --- products --------------------------------------------------------------------------------------


def products(bench: Bench, report: Writes) -> None:
    """The three products of svd by each ``matmul``, their error, and the signs that it costs."""
    columns = ["matrix", *(f"{name}, ms" for name in CHOICES["matmul"]), "× faster", "floor of fp32, ms",
               "error of fp32", "error of bf16x3", "signs unlike fp64's, fp32", "bf16x3"]  # fmt: skip
    rows: list[list[Any]] = []
    for height, width in bench.sizes.matrices:
        if bench.enough():
            report.note(f"No time was left for {height} x {width} and larger ones.")
            break
        r = round(DENSITY * min(height, width))
        grad = gradient(bench, height, width)
        right = height >= width
        square = grad.T @ grad if right else grad @ grad.T
        basis = Basis(**{"right" if right else "left": torch.linalg.qr(square).Q[:, :r].contiguous()})
        out = torch.zeros_like(grad)

        with full_precision():
            times = [bench.median(partial(_all_three, grad, basis, out, one)) for one in CHOICES["matmul"]]
            exact = _rest(grad.double(), basis.to(torch.float64), "fp32")
            found = [_rest(grad, basis, one) for one in CHOICES["matmul"]]
        errors = [float((one.double() - exact).norm() / exact.norm()) for one in found]
        flips = [f"{float((one.sign() != exact.sign()).double().mean()):.2e}" for one in found]
        floor = 6 * height * width * r / bench.rates["fp32"]
        rows.append([f"{height} x {width}", *times, times[0] / times[1], floor, *(f"{e:.1e}" for e in errors), *flips])
        report.table(f"Down, up and residual with r = {DENSITY} of the smaller dim", columns, rows)
        del grad, out, exact, found


def _all_three(grad: Tensor, basis: Basis, out: Tensor, matmul: str) -> Tensor:
    low = down(grad, basis, matmul)
    add_up_(out, low, basis, 1e-3, matmul)
    return residual(grad, low, basis, matmul)


def _rest(grad: Tensor, basis: Basis, matmul: str) -> Tensor:
    return residual(grad, down(grad, basis, matmul), basis, matmul)


def gradient(bench: Bench, rows: int, cols: int) -> Tensor:
    """A matrix whose singular values fall as those of gradients do, about."""
    k = min(rows, cols)
    rank = max(1, k // 8)
    low = torch.randn(rows, rank, device=bench.device) @ torch.randn(rank, cols, device=bench.device)
    return low / math.sqrt(rank) + 0.3 * torch.randn(rows, cols, device=bench.device)


# --- refreshes -------------------------------------------------------------------------------------


def refresh(bench: Bench, report: Writes) -> None:
    """The basis of one matrix by each method. The host waits in most of them: wall time."""
    methods: dict[str, Callable[[Tensor, str, int, Basis], Basis]] = {
        "dct": lambda g, side, r, warm: largest(column_energies(g, side), r),
        "subspace": lambda g, side, r, warm: subspace_svd(g, side, r, warm, seed=0, name="w", refresh=1),
        "gram64": lambda g, side, r, warm: gram_svd(g, side, r),
        "exact": lambda g, side, r, warm: exact_svd(g, side, r),
    }
    columns = ["matrix", *(f"{name}, ms" for name in methods), "exact / subspace"]
    rows: list[list[Any]] = []
    for place, (height, width) in enumerate(bench.sizes.matrices):
        if bench.enough():
            report.note(f"No time was left for {height} x {width} and larger ones.")
            break
        with bench.within(1 / (len(bench.sizes.matrices) - place)):
            grad = gradient(bench, height, width)
            side, r = "right" if height >= width else "left", round(DENSITY * min(height, width))
            with full_precision():
                warm = gram_svd(grad, side, r)
                times = {name: bench.waiting(partial(method, grad, side, r, warm)) for name, method in methods.items()}
        rows.append([f"{height} x {width}", *times.values(), times["exact"] / times["subspace"]])
        report.table("One matrix, r a quarter of the smaller dim, subspace from a basis", columns, rows)


# --- memory ----------------------------------------------------------------------------------------


def memory(bench: Bench, report: Writes) -> None:
    """State against the plan, the peak of a step beyond it, and whether anything grows."""
    columns = [
        "optimizer",
        "state, MB",
        "as planned, MB",
        "AdamW's, MB",
        "peak of a step beyond, MB",
        "grown in 50 steps, MB",
    ]
    size, layers, kind = bench.sizes.steps[0]
    dtype = getattr(torch, kind)
    layers = fitting(bench, size, layers, dtype, 1)
    params = peers.make_params(peers.shapes_of(size, layers), bench.device, dtype)
    rows: list[list[Any]] = []
    with any_basis():
        for name in ("columns", "rows", "blockwise", "density 0", "svd", "svd, bf16x3", "randk"):
            if bench.enough():
                report.note(f"No time was left for {name} and what follows.")
                break
            if drawn_too_long(name, params):
                report.note(f"{name} is left out: {TOO_LONG}")
                continue
            before = bench.allocated()
            optimizer = frugal(params, **CONTENDERS[name].options)
            optimizer.step()
            bench.wait()
            plan = make_plan(optimizer, engine_layout("single"), 1).worst
            own = bench.allocated() - before if bench.events else optimizer.state_bytes().held
            peak, growth = _peak_and_growth(bench, optimizer)
            adamw = 8 * sum(param.numel() for param in params)
            rows.append([name, own / 1e6, (plan.state + plan.selected) / 1e6, adamw / 1e6, peak, growth])
            report.table(f"LLaMA-{size}, {layers} layers, {dtype}", columns, rows)
            del optimizer
            bench.cleared()


def _peak_and_growth(bench: Bench, optimizer: Frugal) -> tuple[float | None, float | None]:
    """In MB."""
    optimizer.step()
    if not bench.events:
        return None, None
    bench.wait()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = bench.allocated()
    optimizer.step()
    bench.wait()
    peak = torch.cuda.max_memory_allocated(bench.device) - before
    for _ in range(50):
        optimizer.step()
    bench.wait()
    return peak / 1e6, (bench.allocated() - before) / 1e6


# --- whole trainings -------------------------------------------------------------------------------

TRAINED = {
    "AdamW": None,
    "columns": {"projection": "columns"},
    "density 0": {"projection": "columns", "density": 0.0},
    "svd": {"projection": "svd"},
    "svd, bf16x3": {"projection": "svd", "matmul": "bf16x3"},
}


def tokens(bench: Bench, report: Writes) -> None:
    """Tokens per second of the recipes, put together from a micro-batch and a step, as end_to_end.py does."""
    report.note(
        "Batches of the recipes' size, bf16 autocast, a plain LLaMA in torch; without refreshes, which have their own "
        "section. Step: with embeddings and head."
    )
    rows: list[list[Any]] = []
    for place, size in enumerate(bench.sizes.models):
        if bench.enough():
            report.note(f"No time was left for {size} and larger ones.")
            break
        with bench.within(1 / (len(bench.sizes.models) - place)), any_basis():
            rows += _tokens_of(bench, size)
        columns = "model", "optimizer", "micro-batch, ms", "step, ms", "tokens/s", "× AdamW", "model TFLOP/s"
        report.table(f"Batch of {bench.sizes.batch} sequences of {bench.sizes.length} tokens", columns, rows)
        bench.cleared()


def model_of(bench: Bench, size: str) -> PlainLlama:
    torch.manual_seed(0)
    with bench.device:
        return PlainLlama(SHAPES[size], bench.sizes.length)


def micro_of(bench: Bench, size: str) -> int:
    """Sequences in a micro-batch: logits in fp32 and their gradient take most, activations about as much again."""
    shape, sizes = SHAPES[size], bench.sizes
    each = sizes.length * (12 * shape.vocab + 60 * shape.layers * shape.hidden)
    fits = int(0.4 * bench.free() / each)
    return max(1, min(sizes.micro, 1 << max(0, fits.bit_length() - 1)))


def _tokens_of(bench: Bench, size: str) -> list[list[Any]]:
    sizes = bench.sizes
    arguments = Namespace(size="60M", micro=micro_of(bench, size), length=sizes.length, batch=sizes.batch,
                          precision="bf16", gap=200)  # fmt: skip
    model = model_of(bench, size)
    whole = end_to_end.Bench(arguments, bench.device, model, plain_losses)
    whole.rows = torch.randint(SHAPES[size].vocab, whole.rows.shape, device=bench.device)
    whole.micro_batch()
    parts: dict[str, Callable[[], Any]] = {"micro-batch": whole.micro_batch}
    for name, options in TRAINED.items():
        optimizer = whole.adamw() if options is None else whole.frugal("", NEVER, process_group=None, **options)
        optimizer.step()
        parts[name] = optimizer.step
    times = bench.turns(parts, 10)
    # Whichever of the two is slower decides: the host runs ahead where it can.
    medians = {name: statistics.median(max(one) for one in samples) for name, samples in times.items()}
    speeds = end_to_end.composed(arguments, 1, medians, list(TRAINED))
    flops = 6 * sum(p.numel() for p in model.parameters())
    return [
        [size, name, medians["micro-batch"], medians[name], speed, speed / speeds["AdamW"], speed * flops / 1e12]
        for name, speed in speeds.items()
    ]


COMPILE = ("AdamW 8-bit (torchao)", "FlashAdamW (flashoptim)", "FusedAdam (DeepSpeed)")
"""By torch.compile, Triton and nvcc: minutes, where it does not hang."""


def others(bench: Bench, report: Writes) -> None:
    """Other optimizers, as far as they are installed, each in turns with fused AdamW; those that compile come last.

    Each has its row before the next begins: a compiler that hangs, or takes the process along, costs one row.
    """
    left_out = {peers.BASE, "Frugal svd", "Frugal svd, gram64", "Fira (pytorch_optimizer)"}  # the SVDs are exact ones
    names = sorted(
        peers.CONTENDERS.keys() - left_out, key=lambda name: (name in COMPILE, list(peers.CONTENDERS).index(name))
    )
    size, layers = bench.sizes.peers
    rows: list[list[Any]] = []
    for name in names:
        if bench.enough():
            report.note(f"No time was left for {name} and what follows.")
            break
        options = ["--size", size, "--layers", str(layers), "--device", bench.device.type, "--refresh-rounds", "0"]
        options += ["--rounds", str(min(15, bench.sizes.rounds)), "--warmup", "2", "--contenders", peers.BASE, name]
        measured = peers.measure(peers.parse(options), bench.device)
        for missing, why in measured.missing.items():
            report.note(f"Not measured: {missing} ({why}).")
        for row in measured.rows[1 if rows else 0 :]:
            peak = None if row.peak is None else row.peak / 1e6
            rows.append([row.name, row.step, row.ratio, row.state / 1e6, peak])
        columns = "optimizer", "step, ms", "× fused AdamW", "state, MB", "peak beyond, MB"
        report.table(f"LLaMA-{size} Linear weights, fp32, wall time with the host's", columns, rows)
        bench.cleared()


# --- learning --------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Training and validation tokens, their number, and what they are."""

    train: Tensor
    validation: Tensor
    vocab: int
    name: str


def read_tokens(bench: Bench) -> Tokens:
    """A token pack, or without one this package's own source and documentation, byte by byte."""
    if bench.data is not None:
        train = _file(bench.data, "train")
        return Tokens(
            train, _file(bench.data, "validation", "val"), 1 + int(train.max()), f"the tokens in {bench.data.name}"
        )
    root = Path(__file__).resolve().parents[1]
    files = [file for folder, ends in (("frugal_dist", "*.py"), ("docs", "*.md"), ("tests", "*.py"))
             for file in sorted((root / folder).rglob(ends))]  # fmt: skip
    data = torch.frombuffer(bytearray(b"\0".join(file.read_bytes() for file in files)), dtype=torch.uint8).int()
    cut = len(data) * 19 // 20
    return Tokens(data[:cut], data[cut:], 256, "this package's own files, by bytes: too little to compare optimizers")


def _file(folder: Path, *names: str) -> Tensor:
    for name in names:
        if (folder / f"{name}.bin").exists():
            data = bytearray((folder / f"{name}.bin").read_bytes())
            return torch.frombuffer(data, dtype=torch.uint16).int()
    raise FileNotFoundError(f"{folder} has no {' or '.join(names)}.bin of uint16 tokens")


LEARNING = {
    "AdamW": None,
    "svd, subspace": {"projection": "svd", "svd_method": "subspace"},
    "columns": {"projection": "columns"},
    "density 0": {"projection": "columns", "density": 0.0},
}
LR = 1e-3


def learning(bench: Bench, report: Writes) -> None:
    """A training with each optimizer: the same steps, as many as the time allows, warm-up and cosine."""
    data = read_tokens(bench)
    size = bench.sizes.learning
    shape = replace(SHAPES[size], vocab=data.vocab)
    micro = min(micro_of(bench, size), 64)
    batch = max(micro, min(128, bench.sizes.batch))
    trial = sum(_trained(bench, data, shape, name, micro, batch, 4)[1] for name in LEARNING) / 4  # without refreshes
    left = max(0.0, bench.until - time.time()) if math.isfinite(bench.until) else 10.0
    steps = max(4, int(0.75 * left / max(trial, 1e-4))) if bench.sizes is FULL else 6
    rows: list[list[Any]] = []
    columns = "optimizer", "loss after 25 %", "50 %", "75 %", "100 %", "validation loss", "s", "tokens/s"
    title = f"LLaMA-{size}, {steps} steps of {batch} x {bench.sizes.length} tokens, lr {LR}, bf16 autocast; {data.name}"
    for name in LEARNING:
        losses, took, validation = _trained(bench, data, shape, name, micro, batch, steps)
        marks = [
            statistics.mean(losses[max(0, end - 10) : end]) for end in (steps * k // 4 for k in (1, 2, 3, 4)) if end
        ]
        rows.append([name, *marks, validation, took, steps * batch * bench.sizes.length / took])
        report.table(title, columns, rows)
        bench.cleared()


def _trained(
    bench: Bench, data: Tokens, shape: LlamaShape, name: str, micro: int, batch: int, steps: int
) -> tuple[list[float], float, float]:
    """Losses, seconds without the first step, validation loss."""
    torch.manual_seed(0)
    with bench.device:
        model = PlainLlama(shape, bench.sizes.length)
    options = LEARNING[name]
    if options is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    else:
        gap = max(4, min(200, steps // 5))
        optimizer = Frugal(
            split_parameters(model), lr=LR, update_gap=gap, process_group=None, **{"density": DENSITY, **options}
        )
    generator = torch.Generator().manual_seed(0)
    kept: list[Tensor] = []
    begun = time.perf_counter()
    for index in range(steps):
        if index == 1:
            bench.wait()
            begun = time.perf_counter()
        rate = LR * min(1.0, (index + 1) / max(1, steps // 10)) * (0.55 + 0.45 * math.cos(math.pi * index / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        losses = []
        for _ in range(batch // micro):
            loss = _loss(bench, model, data.train, micro, generator) * micro / batch
            loss.backward()
            losses.append(loss.detach())
        kept.append(torch.stack(losses).sum())
        optimizer.step()
    bench.wait()
    took = (time.perf_counter() - begun) * steps / max(1, steps - 1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        validation = torch.stack([_loss(bench, model, data.validation, micro, generator) for _ in range(4)]).mean()
    return torch.stack(kept).tolist(), took, float(validation)


def _loss(bench: Bench, model: torch.nn.Module, data: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - bench.sizes.length - 1, (rows, 1), generator=generator)
    batch = data[starts + torch.arange(bench.sizes.length + 1)]
    batch = batch.pin_memory().to(bench.device, non_blocking=True) if bench.events else batch.to(bench.device)
    with torch.autocast(bench.device.type, torch.bfloat16):
        return plain_losses(model, batch).mean()


SECTIONS: dict[str, Callable[[Bench, Writes], None]] = {
    "card": card,
    "step": step,
    "products": products,
    "memory": memory,
    "refresh": refresh,
    "tokens": tokens,
    "peers": others,
    "learning": learning,
}
