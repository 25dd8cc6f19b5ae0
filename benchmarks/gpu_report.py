"""Everything there is to know about Frugal on this GPU, in one command and a fixed number of minutes.

    python benchmarks/gpu_report.py --minutes 8                          # writes docs/gpu.md and docs/gpu.json
    python benchmarks/gpu_report.py --minutes 8 --out /tmp/report        # the same into another folder
    python benchmarks/gpu_report.py --data pack                          # learning on its train.bin and validation.bin
    python benchmarks/gpu_report.py --device cpu --tiny --out /tmp/try   # a rehearsal: the numbers mean nothing

Needs torch and this checkout, which may be read-only; no network, no DeepSpeed, no transformers. Without Triton it says
so. The sections share the time, and what they find is written at once. One that fails or hangs is reported with its
error, and the next begins, in another process if the device is damaged.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):  # the checkout, also where the package is not installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

SHARES = {"card": 4, "step": 28, "products": 6, "memory": 6, "refresh": 10, "tokens": 18, "peers": 8, "learning": 20}
"""The sections in their order, and how the time is divided among them. What one leaves over the others get."""
GRACE = 20.0
"""Seconds beyond its share after which a section is ended."""
DAMAGED = 3
"""Exit status of a process whose device does not answer any more."""


class Report:
    """What was found so far, in ``gpu.json``, and as text in ``gpu.md`` beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "gpu.json"
        self.found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"sections": {}}

    def begin(self, name: str, seconds: float) -> None:
        section = {"state": "running", "seconds": seconds, "until": time.time() + seconds, "tables": [], "notes": []}
        self.found["sections"][name] = section
        self._name = name
        self.save()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table to the running section, or replace the one of this title."""
        tables = self.found["sections"][self._name]["tables"]
        tables[:] = [one for one in tables if one["title"] != title]
        tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        self.save()

    def note(self, text: str) -> None:
        self.found["sections"][self._name]["notes"].append(text)
        self.save()

    def end(self, name: str, error: str = "") -> None:
        section = self.found["sections"][name]
        section["took"] = round(section["seconds"] - (section.pop("until") - time.time()), 1)
        section["state"] = "failed" if error else "done"
        if error:
            section["error"] = error
        self.save()

    def save(self) -> None:
        for name, text in (("gpu.json", json.dumps(self.found, indent=1) + "\n"), ("gpu.md", as_text(self.found))):
            unfinished = self.folder / f".{name}.unfinished"
            unfinished.write_text(text)
            os.replace(unfinished, self.folder / name)


def as_text(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    about = found.get("about", {})
    lines = ["# On a GPU", ""]
    if found.get("rehearsal"):
        lines += ["**A rehearsal: the numbers mean nothing.**", ""]
    lines += [f"Made by `{found.get('command', '')}`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if value]
    for name, section in found["sections"].items():
        took = f"{section['took']:g} s" if "took" in section else section["state"]
        lines += ["", f"## {name.capitalize()} ({took})"]
        for table in section["tables"]:
            lines += ["", f"{table['title']}", "", f"| {' | '.join(table['columns'])} |"]
            lines += ["|---" + "|---:" * (len(table["columns"]) - 1) + "|"]
            lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in table["rows"]]
        lines += [f"\n{note}" for note in section["notes"]]
        if "error" in section:
            lines += ["", "**Failed:**", "", "```", section["error"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- the process that measures ---------------------------------------------------------------------


def measure(arguments: argparse.Namespace, names: Sequence[str], deadline: float) -> int:
    """Run sections here, until all are done or the device is damaged; what to exit with."""
    import gpu_sections as sections
    import torch

    report = Report(arguments.out)
    torch.manual_seed(0)
    bench = sections.Bench(torch.device(arguments.device), arguments.tiny, arguments.data, arguments.out)
    bench.rates = report.found.get("rates", bench.rates)
    try:
        report.found["about"] = sections.about(bench)
    except Exception as error:  # the sections may still run
        report.found["about"] = {"device": f"{type(error).__name__}: {error}"}
    for place, name in enumerate(names):
        left = max(0.0, deadline - time.time())
        share = left * SHARES[name] / sum(SHARES[other] for other in names[place:])
        report.begin(name, share)
        bench.until = time.time() + share
        try:
            sections.SECTIONS[name](bench, report)
            report.found["rates"] = bench.rates
            report.end(name)
        except (Exception, SystemExit):  # whatever it is, it belongs into the report
            report.end(name, traceback.format_exc())
            print(f"{name} failed:\n{report.found['sections'][name]['error']}", file=sys.stderr)
        if not bench.cleared():
            return DAMAGED
    return 0


# --- the process that watches ----------------------------------------------------------------------


def supervise(arguments: argparse.Namespace) -> None:
    """Start the process that measures, anew after each section that it does not survive."""
    deadline = time.time() + 60 * arguments.minutes
    report = Report(arguments.out)
    report.found = {
        "command": " ".join(["python", "benchmarks/gpu_report.py", *arguments.given]),
        "rehearsal": arguments.tiny,
        "sections": {},
    }
    report.save()
    left = list(arguments.sections)
    while left:
        died = _watch(arguments, left, deadline)
        report = Report(arguments.out)
        for name in left:
            if report.found["sections"].get(name, {}).get("state") == "running":
                report.end(name, died)
        seen = [name for name in left if name in report.found["sections"]]
        left = [name for name in left if name not in seen]
        if not seen:  # it did not come as far as a section
            report.begin(left[0], 0.0)
            report.end(left.pop(0), died)
    failed = [name for name, one in report.found["sections"].items() if one["state"] == "failed"]
    print(f"The report is in {arguments.out / 'gpu.md'}.{' Failed: ' + ', '.join(failed) + '.' if failed else ''}")


def _watch(arguments: argparse.Namespace, names: Sequence[str], deadline: float) -> str:
    """One process that measures, to its end; how it ended. Ends it where a section takes much longer than its share."""
    own = ["--out", str(arguments.out), "--device", arguments.device, "--until", str(deadline)]
    own += ["--tiny"] if arguments.tiny else []
    own += ["--data", str(arguments.data)] if arguments.data else []
    log = arguments.out / "gpu.log"
    with log.open("a") as file:
        begun = file.tell()
        command = [sys.executable, str(HERE / "gpu_report.py"), *own, "--sections", *names]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment(arguments.out))
        ended = ""
        started, seen = time.time(), set[str]()
        while process.poll() is None and not ended:
            time.sleep(0.2)
            sections = Report(arguments.out).found["sections"]
            limit = max((one["until"] for one in sections.values() if "until" in one), default=0.0)
            for name in sections.keys() - seen:
                seen.add(name)
                print(f"{time.time() - started:6.1f} s: {name}", flush=True)
            idle = not limit and time.time() > max(started + 120, deadline)  # between sections, or before the first
            if idle or (limit and time.time() > min(limit, deadline) + GRACE):
                process.kill()
                ended = "It took much longer than its share and was ended."
        status = process.wait()
    with log.open() as file:
        file.seek(begun)
        tail = file.read()[-3000:]
    return f"{ended or f'The process ended with status {status}.'}\n{tail}"


def _environment(out: Path) -> dict[str, str]:
    """No network, and caches where they can be written."""
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false"}
    caches = {key: str(out / "cache" / key.lower()) for key in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")}
    return {**caches, **os.environ, **quiet}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="folder for gpu.md, gpu.json and gpu.log (default: docs)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, two rounds: to try the script")
    parser.add_argument("--sections", nargs="+", default=list(SHARES), choices=SHARES, metavar="SECTION")
    parser.add_argument("--data", type=Path, help="a folder with train.bin and validation.bin or val.bin, uint16")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.given = list(sys.argv[1:] if argv is None else argv)
    arguments.out = _folder(arguments.out or HERE.parent / "docs")
    return arguments


def _folder(wanted: Path) -> Path:
    """Itself, made if need be, or one that can be written to."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=wanted):
            pass
    except OSError as error:
        found = Path(tempfile.mkdtemp(prefix="gpu_report_"))
        print(f"{wanted} cannot be written to ({error}): the report goes to {found}", file=sys.stderr)
        return found
    return wanted.resolve()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.device == "cuda" and not _has_gpu():
        sys.exit("torch finds no GPU here. --device cpu --tiny tries the script, `frugal-dist doctor` says more.")
    if arguments.until is not None:
        sys.exit(measure(arguments, arguments.sections, arguments.until))
    supervise(arguments)


if __name__ == "__main__":
    main()
