"""How fast a card trains: steps of flow stages and of the task stage beside the card's limits, and several runs at once.

    python benchmarks/gpu.py [--quick] [--steps N] [--repeats N] [--processes N ...] [--minutes M] [--out FOLDER]

ResNet-26 teaches ResNet-8 on 32x32 images in batches of 128, by the flow pairs between group ends, by all flow pairs, and by
soft targets.

loop       our loop, as a run takes its steps without CUDA graphs
replayed   our loop with them, as it takes its steps by default
keeping    replayed, and what the teacher says is kept for later runs (bfloat16)
reading    replayed, by what was kept (bfloat16)
step       the same mathematics as one function, eagerly: what the loop adds is the difference
compiled   that function with the student compiled, as far as the minutes allow
graph      that function captured as one CUDA graph; last

A step's floating-point operations over the rate of a large product, and the bytes that its operations read and write over
the rate of a large copy, are two times; the shares of them in the time that was measured are in the last columns. What
is read from a cache counts as if it were not, so the second may pass 100 %.
Without a CUDA device it says so and ends; `--device cpu --steps 1` shows that the code runs. Figures are appended to
benchmarks/results/gpu-CARD.jsonl, one JSON object a line; a CPU's only where a folder is given.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _common import BATCH, Repeats, in_turns, processor
from _gpu_steps import (
    NUMBERS,
    STAGES,
    CapturedStep,
    Clock,
    Number,
    Setting,
    Step,
    computing,
    loop_repeats,
    step_repeats,
    work_of,
)

from dfkt.store.origin import environment

Case = tuple[str, Number, str]
"""Stage, number and way."""
LOOPS = ("loop", "replayed", "keeping", "reading")
"""Ways of our own loop; what one keeps, the next one reads: they take turns."""
SHARED: tuple[str, Number] = ("dense", "bfloat16")
"""What several processes run at once."""
COMPILED: tuple[tuple[str, Number], ...] = (("dense", "bfloat16"), ("kd", "bfloat16"), ("dense", "tf32"))
SLOWEST_COMPILATION = 60.0
"""Seconds that must be left before a compilation begins, unless one took longer."""
NO_CARD = "benchmarks/gpu.py: torch sees no CUDA device, so nothing was measured"
RESULTS = Path(__file__).parent / "results"
QUICK = {"steps": 10, "repeats": 3, "processes": [1, 4], "minutes": 1.5, "seconds": 1.0}
WHOLE = {"steps": 30, "repeats": 7, "processes": [1, 2, 4, 8], "minutes": 4.0, "seconds": 3.0}


def median_seconds(device: torch.device, work: Callable[[], Any], times: int = 5) -> float:
    """Return the median time of some work, once it was done twice."""
    clock, found = Clock(device), []
    for _ in range(times + 2):
        clock.start()
        work()
        found.append(clock.seconds())
    return statistics.median(found[2:])


def measure_limits(device: torch.device, side: int, megabytes: int) -> tuple[dict[Number, float], float]:
    """Return the card's operations a second in every number, by a product of two squares, and its bytes a second, by a copy."""
    rates: dict[Number, float] = {}
    for number in NUMBERS:
        dtype = torch.bfloat16 if number == "bfloat16" else torch.float32
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with computing(number):
            rates[number] = 2 * side**3 / median_seconds(device, lambda a=left, b=right: a @ b)  # type: ignore[misc]
    source = torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rates, 2 * source.numel() / median_seconds(device, lambda: target.copy_(source))


def build_case(case: Case, device: torch.device, steps: int, folder: str) -> Repeats | None:
    """Return a case, ready to be timed, or ``None``, told in a line, where it cannot be built; what is kept lies in a folder."""
    stage, number, way = case
    makers: dict[str, Callable[[Setting], Any]] = {
        "step": Step,
        "graph": CapturedStep,
        "compiled": lambda setting: Step(setting, compiled=True),
    }
    setting = Setting.make(stage, number, device, steps)
    if way in LOOPS:
        replay, kept = way != "loop" and device.type == "cuda", folder if way in ("keeping", "reading") else None
        repeats = loop_repeats(setting, replay=replay, folder=kept, reading=way == "reading")
    else:
        repeats = step_repeats(setting, makers[way], steps)
    try:
        next(repeats)
    except Exception as error:
        print(f"{' '.join(case)}: cannot be run: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return None
    return repeats


def time_cases(cases: list[Case], device: torch.device, steps: int, repeats: int) -> dict[Case, float]:
    """Return seconds per step of those cases that can be run, the medians of turns."""
    with tempfile.TemporaryDirectory() as folder:
        built = {" ".join(case): (case, build_case(case, device, steps, folder)) for case in cases}
        ready = {name: repeats_of for name, (_, repeats_of) in built.items() if repeats_of is not None}
        found = in_turns(ready, steps, repeats)
    return {built[name][0]: statistics.median(seconds) for name, seconds in found.items()}


def time_compiled(device: torch.device, steps: int, repeats: int, deadline: float) -> dict[Case, float]:
    """Return seconds per step with the student compiled, while there is time to compile."""
    found: dict[Case, float] = {}
    longest = SLOWEST_COMPILATION if device.type == "cuda" else 0.0
    for number, (stage, kind) in enumerate(COMPILED):
        if deadline - time.monotonic() < longest:
            left = ", ".join(" ".join(case) for case in COMPILED[number:])
            print(f"compiled: no time left for {left}; --minutes gives more")
            break
        began = time.monotonic()
        found |= time_cases([(stage, kind, "compiled")], device, steps, repeats)
        longest = max(longest, time.monotonic() - began)
    return found


def serve(device: torch.device, steps: int) -> None:
    """Be one of several processes: for every line with seconds, train that long, and say steps and seconds."""
    setting = Setting.make(*SHARED, device, steps)
    repeats = loop_repeats(setting, replay=device.type == "cuda")
    next(repeats)
    print("ready", flush=True)
    for line in sys.stdin:
        began, taken = time.perf_counter(), 0
        while time.perf_counter() - began < float(line):
            next(repeats)
            taken += steps
        print(taken, time.perf_counter() - began, flush=True)


def time_processes(device: torch.device, counts: list[int], steps: int, seconds: float) -> Iterator[tuple[int, float]]:
    """Yield, for so many processes at once, all their steps a second; the others have memory on the card and do nothing."""
    command = [sys.executable, __file__, "--serve", "--device", str(device), "--steps", str(steps)]
    with ExitStack() as stack:
        started = []
        for _ in range(max(counts)):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait, 60)
            stack.callback(process.kill)
            assert process.stdin is not None
            assert process.stdout is not None
            started.append((process.stdin, process.stdout))
        if [line for _, out in started if (line := out.readline()) != "ready\n"]:
            raise SystemExit("A process that was to share the card ended; its error is above.")
        for count in counts:
            for go, _ in started[:count]:
                go.write(f"{seconds}\n")
                go.flush()
            told = [out.readline().split() for _, out in started[:count]]
            yield count, sum(int(taken) / float(took) for taken, took in told)


def to_entries(
    times: dict[Case, float], work: dict[tuple[str, Number], tuple[int, int]], rates: dict[Number, float], copied: float
) -> list[dict[str, Any]]:
    """Return the figures of all cases, as JSON values."""
    entries = []
    for (stage, number, way), seconds in times.items():
        flops, moved = work[stage, number]
        loop = times.get((stage, number, "loop"))
        entries.append({
            "stage": stage, "number": number, "way": way, "ms_per_step": 1000 * seconds, "images_per_second": BATCH / seconds,
            "times_the_loop": None if loop is None else loop / seconds, "flops": flops, "bytes": moved,
            "share_of_products": flops / rates[number] / seconds, "share_of_copies": moved / copied / seconds,
        })  # fmt: skip
    return entries


def print_entries(entries: list[dict[str, Any]]) -> None:
    """Print the table of steps."""
    print(
        f"{'stage':<12}{'number':<10}{'way':<10}{'ms/step':>9}{'images/s':>11}{'x loop':>8}{'products':>10}{'copies':>8}"
    )
    for e in sorted(entries, key=lambda e: (STAGES.index(e["stage"]), NUMBERS.index(e["number"]))):
        ratio = "" if e["times_the_loop"] is None else f"{e['times_the_loop']:.2f}"
        speeds = f"{e['ms_per_step']:>9.3f}{e['images_per_second']:>11.0f}{ratio:>8}"
        shares = f"{e['share_of_products']:>10.1%}{e['share_of_copies']:>8.1%}"
        print(f"{e['stage']:<12}{e['number']:<10}{e['way']:<10}{speeds}{shares}")


def append(folder: Path, card: str, entries: list[dict[str, Any]]) -> Path:
    """Append figures to the card's file, each with where it comes from."""
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    known = environment()
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    versions = {name: known["versions"][name] for name in ("python", "torch", "numpy")}
    origin = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "card": card, "commit": known["commit"], "dirty": known["dirty"],
        "versions": versions | {"cuda": torch.version.cuda, "cudnn": cudnn}, "cpu": processor(), "batch": BATCH,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{slug}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(origin | entry) + "\n" for entry in entries)
    return path


def parsed() -> argparse.Namespace:
    """Return the switches; what is not given is the whole benchmark's, or the quick one's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer steps, repeats, processes and compilations")
    parser.add_argument("--steps", type=int, help="steps per repeat")
    parser.add_argument("--repeats", type=int, help="repeats, the median counts")
    parser.add_argument("--processes", type=int, nargs="+", metavar="N", help="so many runs at once")
    parser.add_argument("--minutes", type=float, help="begin no compilation that would take longer than these")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: benchmarks/results for a card's)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else WHOLE).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def measure(options: argparse.Namespace, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Print all tables one after the other; yield the figures of each, so that none is lost by what comes later."""
    began, on_card = time.monotonic(), device.type == "cuda"
    rates, copied = measure_limits(device, *((8192, 2048) if on_card else (256, 8)))
    told = ", ".join(f"{number} {rate / 1e12:.2f}" for number, rate in rates.items())
    print(f"TFLOP/s of a large product: {told}; a large copy reads and writes {copied / 1e9:.0f} GB/s")
    yield [{"flops_per_second": rates, "bytes_per_second": copied}]
    work = {(s, n): work_of(Setting.make(s, n, device, 1)) for s in STAGES for n in NUMBERS}
    cases: list[Case] = [(s, n, w) for s in STAGES for n in NUMBERS for w in ("loop", "step")]
    times = time_cases(cases, device, options.steps, options.repeats)
    print_entries(entries := to_entries(times, work, rates, copied))
    yield entries
    stage, number = SHARED
    for count, speed in time_processes(device, options.processes, options.steps, options.seconds if on_card else 0.1):
        together = speed * BATCH
        print(
            f"{count} runs at once ({stage}, {number}): {together:.0f} images/s together, {together / count:.0f} each"
        )
        together_of = {"stage": stage, "number": number, "processes": count, "images_per_second": together}
        yield [together_of | {"way": "replayed" if on_card else "loop"}]
    captured = [(s, n, w) for s in STAGES for n in NUMBERS for w in ("replayed", "graph")] if on_card else []
    captured += [(s, "bfloat16", w) for s in STAGES for w in ("keeping", "reading")] if on_card else []
    for ways, found in (
        (("compiled",), time_compiled(device, options.steps, options.repeats, began + 60 * options.minutes)),
        (("replayed", "keeping", "reading", "graph"), time_cases(captured, device, options.steps, options.repeats)),
    ):
        print_entries(entries := [e for e in to_entries(times | found, work, rates, copied) if e["way"] in ways])
        yield entries


def main() -> None:
    options, began = parsed(), time.monotonic()
    device = torch.device(options.device)
    on_card = device.type == "cuda"
    if on_card and not torch.cuda.is_available():
        print(f"{NO_CARD} (--device cpu --steps 1 tries the code).")
        return
    if on_card:
        torch.cuda.set_device(torch.device(device).index or 0)
    else:
        torch.set_num_threads(1)
    if options.serve:
        serve(device, options.steps)
        return
    card = torch.cuda.get_device_name(device) if on_card else f"cpu {processor()}"
    how = f"batch {BATCH}, medians of {options.repeats} x {options.steps} steps"
    print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}, {how}")
    folder, told = options.out or (RESULTS if on_card else None), "not kept"
    for entries in measure(options, device):
        if folder is not None:
            told = f"in {append(folder, card, entries)}"
    print(f"{time.monotonic() - began:.0f} s; figures are {told}")


if __name__ == "__main__":
    main()
