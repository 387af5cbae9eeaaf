"""The peak is the run's, not the process's since it began."""

import subprocess
import sys

import pytest
import torch

from dfkt.training import memory
from dfkt.training.memory import peak_memory, reset_peak_memory

CPU = torch.device("cpu")
LARGE = 128 * 2**20


MEASURE = f"""
import numpy as np, torch
from dfkt.training.memory import peak_memory, reset_peak_memory
cpu = torch.device("cpu")
reset_peak_memory(cpu)
print(peak_memory(cpu))
assert np.ones({LARGE}, dtype=np.uint8)[-1] == 1  # touches every page, and lets go
print(peak_memory(cpu))
reset_peak_memory(cpu)
print(peak_memory(cpu))
"""


@pytest.mark.skipif(peak_memory(CPU) is None, reason="the kernel does not let a process reset its peak")
def test_the_peak_holds_what_was_let_go_and_begins_anew():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )  # a heap of its own
    before, peak, after = map(int, done.stdout.split())

    assert before + 0.9 * LARGE < peak < before + 2 * LARGE
    assert after < peak - 0.9 * LARGE


def test_where_the_peak_cannot_be_reset_it_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "absent")
    reset_peak_memory(CPU)

    assert peak_memory(CPU) is None


def test_on_a_gpu_it_is_the_gpus(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: seen.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    reset_peak_memory(torch.device("cuda:1"))

    assert seen == [torch.device("cuda:1")]
    assert peak_memory(torch.device("cuda:1")) == 5
