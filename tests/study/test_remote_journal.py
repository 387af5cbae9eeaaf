"""A search in a remote folder, killed at any of its writes there, loses no trial and doubles none.

The journal of a remote study is worked on in a copy on this machine and sent now and then, so what lies there may be older
than the tables. The remote folder is a local one behind pyarrow's calls.
"""

from pathlib import Path
from typing import Any

import optuna
import pyarrow.fs
import pytest
from study.played import Played, arm, toy

from dfkt.store import files
from dfkt.store.files import Storage
from dfkt.store.study_store import Study, read_study
from dfkt.study.search import Journal

CONFIG = toy("far", arm("dfkt", 5), seeds=1)
SLOTS = 2


class Killed(BaseException):
    """The process is gone: nothing it does from here on happens."""


class Disk:
    """Counts what is written to the remote folder, and ends the process at one of these writes.

    Attributes:
        left: Writes until the process ends.
        done: Whether that write still arrives.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.system = pyarrow.fs.SubTreeFileSystem(str(folder), pyarrow.fs.LocalFileSystem())
        self.left, self.done, self.put = 10**9, False, files._put
        monkeypatch.setattr(files, "_from_uri", lambda uri: (self.system, uri.removeprefix("far://")))
        monkeypatch.setattr(files, "_put", self.write)

    def write(self, system: Any, path: str, data: bytes) -> None:
        """Write a file, or end the process before or after it."""
        self.left -= 1
        if self.left < 0 or (self.left == 0 and not self.done):
            raise Killed
        self.put(system, path, data)
        if self.left == 0:
            raise Killed


def finished(study: Study) -> dict[int, dict[str, Any]]:
    rows = study.trials[study.trials.state == "COMPLETE"]
    return {row["number"]: row for row in rows.to_dict("records")}


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_killed_at_any_write_a_remote_search_goes_on_with_every_trial_once(
    done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("study.played.Storage", lambda path: Storage(f"far://{Path(path).name}"))
    for write in range(1, 100):
        (folder := tmp_path / str(write)).mkdir()
        disk = Disk(folder, monkeypatch)
        disk.left, disk.done = write, done
        try:
            Played(tmp_path, CONFIG).run(slots=SLOTS)
        except Killed:
            disk.left = 10**9
        else:
            break
        before = read_study("far://far") if (folder / "far" / "study.json").exists() else None
        after = Played(tmp_path, CONFIG).run(slots=SLOTS).study()
        assert list(after.trials.number) == [0, 1, 2, 3, 4], write
        assert set(after.trials.state) | set(after.finals.state) == {"COMPLETE"}
        assert after.epochs.groupby("number").size().tolist() == [3] * 5
        assert after.trials.settings.nunique() == 5
        for number, row in finished(before).items() if before is not None else ():
            assert str(finished(after)[number]) == str(row), write
        for row in before.trials.to_dict("records") if before is not None else ():
            assert after.trials.settings[row["number"]] == row["settings"], write  # what was begun is gone on with
        longer = Played(tmp_path, toy("far", arm("dfkt", 6), seeds=1)).run().study()
        assert list(longer.trials.number) == [0, 1, 2, 3, 4, 5], write
        assert str(longer.trials.head(5)) == str(after.trials), write
        assert len(optuna.load_study(study_name="dfkt", storage=Journal(Storage("far://far")).optuna).trials) == 6
    assert 15 < write < 99
