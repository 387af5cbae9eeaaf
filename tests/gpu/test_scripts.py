"""The benchmark of a card: its steps are the loop's, its figures add up, and without a card it says so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import load_script

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
without_a_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script(ROOT / "benchmarks" / "gpu.py")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150, check=False)


@without_a_card
def test_without_a_card_the_benchmark_says_so_in_a_line() -> None:
    done = run(sys.executable, "benchmarks/gpu.py")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert "sees no CUDA device" in line


@without_a_card
def test_without_a_card_make_gpu_says_in_a_line_what_would_run() -> None:
    done = run("make", "--no-print-directory", "gpu", "VENV=no-such-folder", f"PYTHON={sys.executable}")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert "sees no CUDA device" in line
    assert "pytest -m gpu tests/gpu" in line
    assert "benchmarks/gpu.py" in line


@pytest.mark.parametrize("stage", ["group-ends", "dense", "kd"])
def test_a_step_of_the_benchmark_is_the_loops(benchmark: ModuleType, stage: str) -> None:
    loop, single = (benchmark.Setting.make(stage, "float32", CPU, 2) for _ in range(2))
    record = next(loop.training().run())
    step, batches = benchmark.Step(single), single.batches()
    losses = [step(*next(batches)).item() for _ in range(2)]

    assert sum(losses) / 2 == pytest.approx(record["loss"], rel=1e-5)
    weights = single.student.network.state_dict()
    for name, value in loop.student.network.state_dict().items():
        torch.testing.assert_close(weights[name], value)


def test_figures_of_a_case_add_up_and_say_where_they_come_from(benchmark: ModuleType, tmp_path: Path) -> None:
    cases = [("dense", "float32", way) for way in ("loop", "step")]
    times = benchmark.time_cases(cases, CPU, 1, 1)
    flops, moved = benchmark.work_of(benchmark.Setting.make("dense", "float32", CPU, 1))
    entries = benchmark.to_entries(times, {("dense", "float32"): (flops, moved)}, {"float32": 1e12}, 1e10)
    path = benchmark.append(tmp_path, "NVIDIA H100 80GB HBM3", entries)

    assert path.name == "gpu-nvidia-h100-80gb-hbm3.jsonl"
    kept: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["way"] for entry in kept] == ["loop", "step"]
    for entry in kept:
        assert {"date", "commit", "versions", "card", "cpu"} <= entry.keys()
        seconds = entry["ms_per_step"] / 1000
        assert entry["images_per_second"] * seconds == pytest.approx(128)
        assert entry["share_of_products"] == pytest.approx(flops / 1e12 / seconds)
        assert entry["share_of_copies"] == pytest.approx(moved / 1e10 / seconds)
    assert kept[1]["times_the_loop"] == pytest.approx(kept[0]["ms_per_step"] / kept[1]["ms_per_step"])


@pytest.mark.parametrize("stage", ["group-ends", "dense", "kd"])
def test_what_one_case_keeps_the_next_one_reads(benchmark: ModuleType, stage: str) -> None:
    cases = [(stage, "float32", way) for way in ("keeping", "reading")]
    assert set(benchmark.time_cases(cases, CPU, 1, 2)) == set(cases)
    with pytest.raises(RuntimeError, match="share 0"):
        next(benchmark.loop_repeats(benchmark.Setting.make(stage, "float32", CPU, 1), reading=True))


def test_operations_are_those_of_the_networks_and_of_the_flow_loss(benchmark: ModuleType) -> None:
    """By hand: the convolutions of both networks, of the student's twice more backwards; no classifier is run in a flow stage."""
    flops, moved = benchmark.work_of(benchmark.Setting.make("group-ends", "float32", CPU, 1))
    stem, groups = 32 * 32 * 9 * 3 * 16, 32 * 32 * 9 * 16 * 16
    student = stem + 2 * groups + (groups / 2 + groups) * 2
    teacher = stem + 8 * groups + (groups / 2 + 7 * groups) * 2
    backward = 2 * student - stem  # the images want no gradient
    networks = 2 * 128 * (teacher + student + backward)
    assert networks < flops < 1.1 * networks
    assert moved > 128 * 3 * 32 * 32 * 4
