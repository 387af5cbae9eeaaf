"""What the methods reach by their reference settings: one teacher, some seeds, `test` opened once at the end of each run.

    python benchmarks/accuracy.py [--methods NAME ...] [--seeds N] [--epochs N] [--at-once N] [--out FOLDER] -- SWITCHES

SWITCHES go to `python -m dfkt teacher` and `distill` alike: --data, --teacher-epochs, --device and others.
Nothing is searched and nothing is chosen, so no split is looked at before its time; a method may do better with settings that
suit the images, which is what a study is for. Neither Ray nor Optuna is needed. Runs are started seed by seed, as many at once
as asked for. With --out, each run is appended to accuracy.jsonl in that folder as it ends.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from dfkt.analysis.estimates import mean_interval
from dfkt.methods.registry import METHODS
from dfkt.store.origin import environment

PROGRAM = [sys.executable, "-m", "dfkt"]
BASE = "scratch"


def parsed() -> argparse.Namespace:
    """Return the switches; those behind ``--`` are the program's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--epochs", default="60", help="of each (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the runs to accuracy.jsonl there")
    parser.add_argument("switches", nargs="*", help="of `python -m dfkt distill`, behind --")
    return parser.parse_args()


def train_teacher(switches: list[str]) -> None:
    """Train the teacher, or find it."""
    done = subprocess.run([*PROGRAM, "teacher", *switches], capture_output=True, text=True, check=False)
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "", flush=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def train(method: str, seed: int, switches: list[str], folder: Path) -> dict[str, Any]:
    """Train and test one student; return what its row says."""
    out, began = folder / f"{method}-{seed}", time.perf_counter()
    command = [*PROGRAM, "distill", "--method", method, "--seed", str(seed), "--out", str(out), *switches]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    result = json.loads((out / "result.json").read_text())
    kept = {name: result[name] for name in ("val_accuracy", "test_accuracy", "device_seconds", "peak_memory_bytes")}
    return {"method": method, "seed": seed, **kept, "process_seconds": time.perf_counter() - began}


def table(rows: list[dict[str, Any]]) -> str:
    """Return accuracies and what they are above scratch, seed by seed, with 95 % intervals."""
    tests = pd.DataFrame(rows).pivot_table(index="seed", columns="method", values="test_accuracy") * 100
    seconds = pd.DataFrame(rows).groupby("method")["device_seconds"].mean()
    lines = [f"{'method':<16}{'seeds':>6}{'test %':>16}{'over scratch, 95 %':>26}{'s a run':>9}"]
    for name in tests:
        found = tests[str(name)].dropna()
        mean, spread = found.mean(), found.std()
        above = (found - tests[BASE]).dropna() if BASE in tests and name != BASE else pd.Series(dtype=float)
        told = ""
        if len(above) > 1:
            middle, low, high = mean_interval(above)
            told = f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"{name:<16}{len(found):>6}{f'{mean:.2f} ± {spread:.2f}':>16}{told:>26}{seconds[str(name)]:>9.0f}")
    return "\n".join(lines)


def main() -> None:
    options = parsed()
    train_teacher(options.switches)
    known, rows = environment(), []
    switches = [*options.switches, "--epochs", options.epochs]
    hardware = {name: known["hardware"][name] for name in ("cpu", "cores", "gpus")}
    origin = {name: known[name] for name in ("commit", "dirty", "versions")} | {
        "hardware": hardware,
        "switches": switches,
    }
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        wanted = [(method, seed) for seed, method in product(range(options.seeds), options.methods)]
        for row in pool.map(lambda pair: train(pair[0], pair[1], switches, Path(folder)), wanted):
            rows.append(row)
            val, test = (100 * row[f"{split}_accuracy"] for split in ("val", "test"))
            told = f"{row['method']} seed {row['seed']}: val {val:.2f} %, test {test:.2f} %"
            print(f"{told}, {row['device_seconds']:.0f} s", flush=True)
            if options.out is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                with (options.out / "accuracy.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(origin | row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
