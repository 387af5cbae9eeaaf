"""A folder behaves the same wherever it is, and a file is only ever replaced as a whole."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfkt.errors import StudyError
from dfkt.store.files import Storage, is_leftover


def test_what_is_written_is_read_and_replaced_as_a_whole(folder: Storage) -> None:
    folder.write("a", b"first, and longer")
    folder.write("a", b"second")
    assert folder.read("a") == b"second"
    assert folder.exists("a")


def test_what_is_absent_is_none_and_its_deletion_no_error(folder: Storage) -> None:
    assert folder.read("a") is None
    assert not folder.exists("a")
    assert folder.names() == folder.folders() == folder.entries() == []
    folder.delete("a")
    folder.delete_all()


def test_files_and_folders_are_listed_sorted_and_hidden_ones_only_among_all_entries(folder: Storage) -> None:
    for name in ("b", "a", ".hidden"):
        folder.write(name, b"")
    for name in ("y", "x", ".below"):
        folder.sub(name).write("c", b"")
    assert folder.names() == ["a", "b"]
    assert folder.folders() == ["x", "y"]
    assert folder.entries() == [".below", ".hidden", "a", "b", "x", "y"]
    assert folder.sub("x").names() == ["c"]


def test_deletion_takes_one_file_or_all(folder: Storage) -> None:
    folder.write("a", b"")
    folder.sub("x", "y").write("b", b"")
    folder.delete("a")
    assert folder.names() == []
    assert folder.sub("x", "y").names() == ["b"]
    folder.delete_all()
    assert folder.sub("x", "y").names() == []


def test_a_copy_in_another_process_is_the_same_folder(folder: Storage) -> None:
    folder.write("a", b"data")
    copy = pickle.loads(pickle.dumps(folder))
    assert (copy.path, copy.is_local) == (folder.path, folder.is_local)
    assert copy.read("a") == b"data"


def test_a_writable_folder_passes_and_keeps_no_probe(folder: Storage, tmp_path: Path) -> None:
    folder.check_writable()
    assert list((tmp_path / "study").iterdir()) == []


def test_a_probe_is_a_new_file_that_holds_its_name(folder: Storage) -> None:
    names = {folder.probe(), folder.probe()}
    assert len(names) == 2
    assert all(is_leftover(name) and folder.read(name) == name.encode() for name in names)


def test_a_local_path_is_absolute_and_knows_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Storage("~/a").path == Storage("a").path == str(tmp_path / "a")
    assert Storage((tmp_path / "with space").as_uri()).path == str(tmp_path / "with space")


def test_a_uri_is_kept_with_its_options() -> None:
    bucket = Storage("s3://bucket/folder/?region=x")
    assert (bucket.path, bucket.is_local) == ("s3://bucket/folder/?region=x", False)
    assert bucket.sub("a", "b").path == "s3://bucket/folder/a/b?region=x"


def test_an_unknown_uri_is_refused_with_its_name() -> None:
    with pytest.raises(StudyError, match="nowhere://x"):
        Storage("nowhere://x").check_writable()


def test_a_folder_that_cannot_be_written_is_refused_with_path_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    below = Storage(tmp_path / "file" / "study")
    with pytest.raises(StudyError, match=r"file/study is not: .*choose another folder"):
        below.check_writable()
    assert below.read("a") is None
    assert below.names() == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_bytes_and_no_litter(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    folder = Storage(tmp_path)
    folder.write("a", b"old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="disk full"):
        folder.write("a", b"new")
    assert folder.read("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_write_or_probe_leaves_is_known_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """The process is gone: nothing it does from here on happens."""

    def die(*_: Any) -> None:
        raise Killed

    folder = Storage(tmp_path)
    monkeypatch.setattr(os, "unlink", die)
    with pytest.raises(Killed):
        folder.check_writable()
    monkeypatch.setattr(os, "replace", die)
    for step in (folder.check_writable, lambda: folder.write("study.json", b"{}")):
        with pytest.raises(Killed):
            step()
    left = folder.entries()
    assert len(left) == 3
    assert all(map(is_leftover, left))
    assert not any(map(is_leftover, (".lock", ".notes.tmp", ".git", "probe", ".probe-1", "study.json")))


def test_the_lock_excludes_a_second_holder_until_it_is_freed(tmp_path: Path) -> None:
    folder = Storage(tmp_path / "study")
    with folder.lock():
        with pytest.raises(StudyError, match=f"in use by process {os.getpid()} on "), folder.lock():
            pass
        assert folder.names() == []
    with folder.lock():
        pass


def test_the_lock_is_freed_when_its_holder_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from dfkt.store.files import Storage\n"
        "with Storage(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match=f"in use by process {holder.pid} on "), Storage(tmp_path).lock():
            pass
        holder.kill()
    with Storage(tmp_path).lock():
        pass
