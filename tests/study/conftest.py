"""What all tests of studies share."""

import functools
import os
from pathlib import Path

import pytest
from study.played import Played, toy

from dfkt.store.origin import environment
from dfkt.study.driver import Run

known = functools.cache(environment)


@pytest.fixture(autouse=True)
def _one_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, commit and hardware are looked up once, not at every opening of a study."""
    monkeypatch.setattr("dfkt.study.opening.environment", known)


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written need not reach the disk: a killed process's files are there without."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """A trial and a final run, as a queue hands them out."""
    return Played(tmp_path, toy()).run().handed
