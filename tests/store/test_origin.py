"""Figures travel with what made them, and with the commit only where it is theirs."""

import json
import subprocess
from pathlib import Path

import pytest

from dfkt.store import origin
from dfkt.store.origin import environment


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    done = subprocess.run(["git", "-C", folder, *name, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_environment_is_what_figures_travel_with() -> None:
    found = json.loads(json.dumps(environment()))
    assert set(found) == {"versions", "commit", "dirty", "hardware", "command"}
    assert found["versions"]["pyarrow"]
    assert found["commit"] is None or len(found["commit"]) == 40
    assert (found["commit"] is None) == (found["dirty"] is None)
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 2**20


def test_the_commit_is_that_of_the_checkout_that_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "dfkt" / "store" / "origin.py"
    source.parent.mkdir(parents=True)
    source.write_text("first\n")
    git(tmp_path, "init", "--quiet")
    monkeypatch.setattr(origin, "__file__", str(source))
    before = environment()
    assert (before["commit"], before["dirty"]) == (None, None)  # as a package installed inside some other checkout

    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    (tmp_path / "new").write_text("not tracked")
    clean = environment()
    assert (clean["commit"], clean["dirty"]) == (git(tmp_path, "rev-parse", "HEAD"), False)

    source.write_text("second\n")
    assert environment()["dirty"]


def test_a_missing_or_failing_tool_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment()
    assert (found["commit"], found["dirty"], found["hardware"]["gpus"]) == (None, None, [])
