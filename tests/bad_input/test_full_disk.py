"""A storage that takes nothing more ends a study in one line; what was finished is kept, and nothing else counts as failed."""

import contextlib
import errno
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RAY_MARKS
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError
from study.played import Played, arm, toy

from dfkt.cli.main import main
from dfkt.errors import FULL, RunError, StudyError, storage_error
from dfkt.store.files import Storage
from dfkt.store.origin import environment
from dfkt.store.study_store import Study, read_study
from dfkt.study.study import _storage_watched

CONFIG = toy("s", arm("scratch", 2), seeds=1, confirm=2)
KNOWN = environment()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are looked up once, and nothing need survive a power cut."""
    monkeypatch.setattr("dfkt.study.opening.environment", lambda: KNOWN)
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Disk:
    """Takes some writes, then none until there is space again.

    Args:
        space: Writes that it takes.
        code: The error of those behind.
    """

    def __init__(self, patch: pytest.MonkeyPatch, space: float, code: int = errno.ENOSPC) -> None:
        self.space, self.used = space, 0
        write = Storage.write

        def limited(storage: Storage, name: str, data: bytes) -> None:
            if self.used >= self.space:
                raise OSError(code, os.strerror(code))
            self.used += 1
            write(storage, name, data)

        patch.setattr(Storage, "write", limited)


def states(study: Study) -> set[str]:
    """Return the states of all runs."""
    return {state for table in (study.trials, study.confirmations, study.finals) for state in table.state}


def finished(study: Study) -> dict[str, list[Any]]:
    """Return arm, number and accuracy of all runs that ended well, by table."""
    tables = {"trials": study.trials, "confirmations": study.confirmations, "finals": study.finals}
    return {
        name: table[table.state == "COMPLETE"][["arm", "number", "last_val_accuracy", "started"]].values.tolist()
        for name, table in tables.items()
    }


def test_whichever_write_is_the_first_that_fails_what_was_finished_stays_and_the_next_run_does_the_rest(
    tmp_path: Path,
) -> None:
    codes = itertools.cycle(FULL)
    for space in itertools.count():
        results = tmp_path / str(space)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, space, next(codes))
            lines: list[str] = []
            with contextlib.suppress(OSError):
                played = Played(results, CONFIG)
                lines = played.lines
                played.run(slots=2)
                assert disk.used == space  # so many writes does the whole study take
                break
        before: dict[str, list[Any]] = {}
        if (results / "s" / "study.json").exists():
            study = read_study(results / "s")
            assert states(study) <= {"COMPLETE", "RUNNING"}
            before = finished(study)
            assert sum(map(len, before.values())) >= len(lines)  # what was told is there
        later = Played(results, CONFIG).run(slots=2)
        study = later.study()
        assert (later.queue.over, later.queue.failures, states(study)) == (True, 0, {"COMPLETE"})
        assert [list(t.number) for t in (study.trials, study.finals)] == [[0, 1], [0]]
        assert study.epochs.groupby("number").size().tolist() == [3, 3]
        after = finished(study)
        assert all(row in after[name] for name, rows in before.items() for row in rows)
    assert space >= 15


@pytest.mark.parametrize("space", range(3))
def test_a_run_whose_end_could_not_be_written_has_not_failed_though_there_is_space_a_moment_later(
    space: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played(tmp_path, CONFIG)
    trial = played.ask()
    disk = Disk(monkeypatch, space)
    monkeypatch.setattr(os, "strerror", lambda code: vars(disk).update(space=100) or "full")  # from the next write on
    played.end(trial)
    assert (disk.space, isinstance(played.queue.broken, OSError)) == ((space, False) if space == 2 else (100, True))
    assert states(played.study()) == ({"COMPLETE"} if space == 2 else {"RUNNING"})


@pytest.mark.parametrize("again", [True, False], ids=["to be started again", "given up"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in a group of workers"])
@pytest.mark.parametrize("code", FULL, ids=errno.errorcode.get)
def test_a_run_that_finds_its_storage_full_ends_the_study_and_has_not_failed(
    code: int, wrapped: bool, again: bool, tmp_path: Path
) -> None:
    played = Played(tmp_path, CONFIG)
    trials = [played.ask(), played.ask()]
    error: Exception = OSError(code, os.strerror(code))
    if wrapped:
        error = RayTaskError("train", "long", WorkerGroupError("failed", {0: error}))
    played.die(trials[0], error, recover=again)

    what, remedy = FULL[code]
    (line,) = str(played.queue.broken).splitlines()
    assert line.startswith(f"{what}: {tmp_path}/s: {os.strerror(code)}; {remedy}, then the same command goes on")
    assert isinstance(played.queue.broken, RunError)
    played.end(trials[1])  # ended meanwhile: to be done again
    assert (played.ask(), played.finished) == (None, True)
    assert (played.lines, states(played.study())) == ([], {"RUNNING"})
    later = Played(tmp_path, CONFIG).run()
    assert sorted(later.study().trials.attempts) == [2, 2]
    assert later.queue.failures == 0


def test_another_error_of_a_runs_storage_is_its_own(tmp_path: Path) -> None:
    played = Played(tmp_path, CONFIG)
    played.die(played.ask(), OSError(errno.EIO, "bad sector"))
    assert (played.queue.broken, states(played.study())) == (None, {"FAIL"})


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space"), "storage full: /s: No space; free space, then the same command goes on"),
        (OSError(errno.EDQUOT, "Over"), "storage quota used up: /s: Over; free space, then the same command goes on"),
        (
            OSError(errno.EROFS, "No", "/s/x"),
            "storage read-only: /s: No; make it writable, then the same command goes on",
        ),
        (OSError(errno.ENOSPC, "No", "/else"), "storage full: /else: No; free space, then the same command goes on"),
        (OSError("no\nway"), "storage failed: /s: OSError: no way; mend it, then the same command goes on"),
    ],
)
def test_a_storage_that_takes_nothing_is_told_on_one_line(error: OSError, text: str) -> None:
    assert str(storage_error(error, "/s")) == text


def test_outside_of_the_runs_too_and_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"^storage full: {tmp_path}: full; "), _storage_watched(str(tmp_path)):
        raise OSError(errno.ENOSPC, "full")
    for error in (OSError(errno.EIO, "bad"), StudyError("bad")):
        with pytest.raises(type(error), match="bad"), _storage_watched(str(tmp_path)):
            raise error


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own that is small."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a small file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def mounted_again(place: Path, option: str) -> None:
    """Change a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(place)], check=True)


SMALL = (
    "study --data digits --smoke --trials 2 --seeds 1 --baselines scratch --confirm 0 --epochs 2 --teacher-epochs 1 "
    "--teacher resnet8 --teacher-width 0.5 --student-width 0.5 --name s --gpus-per-worker 0"
)


class TestWithRay:
    """Real studies on real file systems that are too small."""

    pytestmark = RAY_MARKS

    def test_a_study_on_a_full_disk_says_so_and_goes_on_with_space(
        self, disk: Path, home: Path, address: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Whether teacher, checkpoint, table or journal find no space."""
        given = ["--results", str(disk), "--teacher-root", str(home / "teachers"), "--address", address]
        for size in ("160k", "352k"):
            mounted_again(disk, f"size={size}")
            assert main([*SMALL.split(), *given]) == 1
            said = capfd.readouterr()
            (line,) = said.err.splitlines()
            assert line.startswith(f"failed: storage full: {disk}")
            assert line.endswith(": No space left on device; free space, then the same command goes on")
            assert "Traceback" not in said.out
            before = read_study(disk / "s")
            assert states(before) <= {"COMPLETE", "RUNNING"}

        mounted_again(disk, "size=20m")
        assert main([*SMALL.split(), *given]) == 0
        said = capfd.readouterr()
        assert said.err == ""
        after = read_study(disk / "s")
        assert (len(after.trials), len(after.finals), states(after)) == (2, 2, {"COMPLETE"})
        assert all(row in finished(after)[name] for name, rows in finished(before).items() for row in rows)
