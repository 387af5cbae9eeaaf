"""The peak is the run's, not the process's since it began."""

import numpy as np
import pytest
import torch

from dfkt.training import memory
from dfkt.training.memory import peak_memory, reset_peak_memory

CPU = torch.device("cpu")
LARGE = 128 * 2**20


def allocate() -> None:
    """Touch every page, and let go."""
    assert np.ones(LARGE, dtype=np.uint8)[-1] == 1


@pytest.mark.skipif(peak_memory(CPU) is None, reason="the kernel does not let a process reset its peak")
def test_the_peak_holds_what_was_let_go_and_begins_anew():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    allocate()
    peak = peak_memory(CPU)
    reset_peak_memory(CPU)
    after = peak_memory(CPU)

    assert before is not None
    assert peak is not None
    assert after is not None
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
