"""Where a study or a run shall lie: what cannot be is one line, and what is refused leaves nothing behind."""

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from cli.switches import make_folder
from made import Arm, write_study
from study.played import ABOUT, TAPS, Played, arm, open_study, toy

from dfkt.cli.main import main
from dfkt.errors import StudyError
from dfkt.store import lock
from dfkt.store.files import Storage
from dfkt.store.study_store import hold, read_study
from dfkt.study.opening import open_store
from dfkt.study.search import mend_journal

STUDY = ["study", "--data", "digits", "--student", "resnet8", "--teacher", "resnet8", "--name", "s", "--results", "."]
DISTILL = ["distill", "--method", "scratch", "--data", "digits", "--student", "resnet8", "--out", "s"]
COMMANDS = pytest.mark.parametrize("argv", [STUDY, DISTILL], ids=["study", "distill"])


class Reached(BaseException):
    """Everything that is checked before work begins was passed."""


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained, and no cluster started."""

    def reach(*given: Any, **named: Any) -> None:
        raise Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("dfkt.study.study.cluster", reach)
    monkeypatch.setattr("dfkt.cli.distill.run_job", reach)


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    """The command ends with one line that says so."""
    assert main(argv) == 2, capsys.readouterr()
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 900
    assert said in err, err


def lying(folder: Path) -> dict[str, Any]:
    """Return all that lies in a folder, with what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else p.is_symlink() for p in folder.rglob("*")}


def a_file(place: Path) -> None:
    place.write_text("mine")


def a_dangling_link(place: Path) -> None:
    place.symlink_to("nowhere")


def a_loop(place: Path) -> None:
    place.symlink_to(place.name)


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


WRONG_PLACES: list[tuple[Callable[[Path], None], str]] = [
    (a_file, "needs a folder, but"),
    (a_dangling_link, "is a link that leads nowhere"),
    (a_loop, "is a link that leads nowhere"),
    (a_pipe, "needs a folder, but"),
]


@COMMANDS
@pytest.mark.parametrize(("make", "said"), WRONG_PLACES)
def test_what_is_no_folder_is_refused_as_it_is(
    make: Callable[[Path], None], said: str, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "s")
    refused(capsys, argv, said)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("command", [["show"], ["resume"], ["distill", "--trial"]])
@pytest.mark.parametrize("make", [make for make, _ in WRONG_PLACES] + [Path.mkdir])
def test_where_no_study_is_none_is_read(
    make: Callable[[Path], None], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "s")
    refused(capsys, [*command, "s"], str(tmp_path / "s"))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@COMMANDS
def test_a_folder_below_a_file_is_refused(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    below = ["file" if word == "." else "file/s" if word == "s" and argv is DISTILL else word for word in argv]
    refused(capsys, below, "must be writable, but")
    assert lying(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("foreign", ["thesis.tex", "trials", "teacher.pt", "study.json.bak", ".git"])
def test_a_folder_that_is_not_a_studys_stays_as_it_is(
    foreign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s" / foreign).mkdir(parents=True)
    refused(capsys, STUDY, f"must be empty or hold a study.json, but {tmp_path}/s holds {foreign}")
    assert [path.name for path in (tmp_path / "s").iterdir()] == [foreign]


def test_a_link_to_a_folder_is_as_good_as_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy("s", arm("scratch"), seeds=1)
    (tmp_path / "far").mkdir()
    (tmp_path / "s").symlink_to("far")
    Played(tmp_path, config).run()
    assert (tmp_path / "far" / "study.json").exists()
    assert main(["show", "s"]) == 0
    assert "s: toys" in capsys.readouterr().out
    with hold(Storage(tmp_path / "far")), pytest.raises(StudyError, match="in use by process"), hold(Storage("s")):
        pass


@pytest.mark.parametrize("name", ["a b", "ä", "a\nb", "100%", "a?b#c", "-x", "a:b", "'\"", "*", "x" * 200])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / name / "blobs", [Arm("scratch", {1: 0.5})])
    assert main(["show", "--", f"./{name}/blobs"]) == 0
    assert "blobs: Blobs" in capsys.readouterr().out
    with hold(Storage(f"./{name}/blobs")):
        pass


@COMMANDS
def test_a_name_that_is_too_long_for_the_disk_is_refused(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "at most 100 letters" if "study" in argv else "File name too long"
    refused(capsys, ["x" * 300 if word == "s" else word for word in argv], said)
    assert list(tmp_path.iterdir()) == []


def a_locks_folder(place: Path) -> None:
    (place / ".lock").mkdir(parents=True)


def a_link_as_lock(place: Path) -> None:
    place.mkdir()
    (place / ".lock").symlink_to("../mine")


@COMMANDS
@pytest.mark.parametrize("make", [a_locks_folder, a_link_as_lock])
def test_a_lock_that_is_no_file_is_left_alone(
    make: Callable[[Path], None], argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    make(tmp_path / "s")
    before = lying(tmp_path)
    refused(capsys, argv, "Its .lock must be a file that you may write")
    assert lying(tmp_path) == before


@COMMANDS
def test_a_lock_of_another_user_is_told(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".lock").write_text("theirs")
    real = os.open

    def opened(path: Any, *given: Any, **named: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *given, **named)

    monkeypatch.setattr(os, "open", opened)
    refused(capsys, argv, "cannot be locked: PermissionError")
    assert lying(tmp_path / "s") == {".lock": b"theirs"}


def test_what_a_foreign_lock_says_is_quoted_on_one_line(tmp_path: Path) -> None:
    with hold(Storage(tmp_path)):
        (tmp_path / ".lock").write_text("line\n" * 1000)
        with pytest.raises(StudyError, match="is in use by line line") as caught, hold(Storage(tmp_path)):
            pass
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


URIS = [
    ("s3://", "A URI names a bucket, s3://BUCKET/FOLDER, but got 's3://"),
    ("s3:///results", "Is a variable in it not set?"),
    ("s3://?region=x", "A URI names a bucket"),
    ("gs://", "A URI names a bucket"),
    ("abfs:///x", "A URI names a bucket"),
    ("s3:/x", "A URI begins with s3://, but got 's3:/x"),
    ("s3:x", "Write ./s3:x"),
    ("S3:x", "A URI begins with s3://"),
    ("file:x", "A URI begins with file://"),
    ("https:/x", "A URI begins with https://"),
    ("file://relative/x", "a URI that pyarrow knows, but got 'file://relative/x"),
    ("http://host/x", "a URI that pyarrow knows"),
    ("nowhere://x", "a URI that pyarrow knows"),
    ("://x", "a URI that pyarrow knows"),
    ("", "must be a path or a URI, but got an empty text"),
]


@pytest.mark.parametrize(("uri", "said"), URIS)
def test_a_uri_that_leads_nowhere_is_one_line_for_every_command(
    uri: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["show", uri], ["resume", uri], [*STUDY[:-1], uri], [*DISTILL[:-1], uri]):
        refused(capsys, argv, said)
    assert list(tmp_path.iterdir()) == []


class Unreachable:
    """A file system that answers nothing, in many lines."""

    def __getattr__(self, name: str) -> Any:
        def fail(*given: Any, **named: Any) -> None:
            raise OSError("When getting information:\n" + "curlCode: 6, Couldn't resolve host name\n" * 89)

        return fail


@pytest.mark.parametrize("uri", ["s3://bucket/x", "hdfs://host:1/x", "abfs://box@account/x", "gs://bucket/x"])
def test_a_remote_folder_that_cannot_be_reached_is_one_line(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dfkt.store.files._from_uri", lambda uri: (Unreachable(), "x"))
    for argv in (["show", uri], ["resume", uri], ["distill", "--trial", uri], [*STUDY[:-1], uri], [*DISTILL[:-1], uri]):
        refused(capsys, argv, "must be readable, but")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError("libjvm\n" * 89), pa.ArrowInvalid("no\nsuch"), pa.ArrowNotImplementedError()]
)
def test_a_file_system_that_cannot_be_opened_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(uri: str) -> None:
        raise error

    monkeypatch.setattr("dfkt.store.files.fs", type("fs", (), {"FileSystem": type("F", (), {"from_uri": fail})}))
    refused(capsys, ["show", "hdfs://host/x"], "a URI that pyarrow knows, but got 'hdfs://host/x'")


def test_a_remote_folder_that_takes_nothing_is_refused_before_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyarrow import fs

    system = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr("dfkt.store.files._from_uri", lambda uri: (system, uri.removeprefix("s3://")))

    def forbid(*given: Any) -> None:
        raise OSError("AWS Error ACCESS_DENIED\nduring PutObject")

    monkeypatch.setattr("dfkt.store.files._put", forbid)
    for argv in ([*STUDY[:-1], "s3://bucket"], [*DISTILL[:-1], "s3://bucket/x"]):
        refused(capsys, argv, "ACCESS_DENIED during PutObject. Check the URI and your credentials")


FULL = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES]


@COMMANDS
@pytest.mark.parametrize("call", ["makedirs", "replace", "ftruncate", "pwrite"])
@pytest.mark.parametrize("code", FULL, ids=[errno.errorcode[code] for code in FULL])
def test_a_disk_that_takes_nothing_is_one_line_and_left_as_it_was(
    code: int,
    call: str,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    refused(capsys, argv, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "a setting": (["--epochs", "0.001"], "stages share"),
    "a network": (["--student", "nonsense"], "Unknown network"),
    "images": (["--data", "nowhere"], "nowhere"),
    "a teacher": (["--teacher-checkpoint", "absent.pt"], "absent.pt"),
    "taps": (["--student-taps", "stem,nonsense"], "nonsense"),
}


@pytest.mark.parametrize("name", list(REFUSED))
@pytest.mark.parametrize("command", [STUDY, ["distill", "--data", "digits", "--student", "resnet8", "--out", "a/b/s"]])
def test_what_is_refused_leaves_neither_file_nor_folder(
    name: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    switches, said = REFUSED[name]
    refused(capsys, [*command, *switches], said)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    refused(capsys, [*command, *switches], said)
    assert sorted(lying(tmp_path)) == ["a", "a/b", "s"]


def test_what_another_program_wrote_meanwhile_stays(tmp_path: Path) -> None:
    with Storage(tmp_path / "a" / "s").lock():
        (tmp_path / "a" / "notes").write_text("mine")
    assert lying(tmp_path / "a") == {"notes": b"mine"}
    with Storage(tmp_path / "b").lock():
        (tmp_path / "b" / "notes").write_text("mine")
    assert sorted(lying(tmp_path / "b")) == [".lock", "notes"]


def test_of_two_processes_that_begin_the_same_study_at_once_one_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold(Storage(tmp_path / "s")):
        for argv in (STUDY, DISTILL):
            refused(capsys, argv, f"in use by process {os.getpid()} on {socket.gethostname()}. Wait for its end")
        assert sorted(lying(tmp_path)) == ["s", "s/.lock"]
        open_store(toy("s"), Storage(tmp_path / "s"), ABOUT, TAPS)
    assert sorted(lying(tmp_path)) == ["s", "s/.lock", "s/study.json"]


def test_a_lock_that_went_between_opening_and_taking_it_holds_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, first = lock.fcntl.flock, Storage(tmp_path).lock()
    first.__enter__()

    def late(handle: int, flags: int) -> None:
        monkeypatch.setattr(lock.fcntl, "flock", flock)
        first.__exit__(None, None, None)  # it wrote nothing, and takes its lock away
        flock(handle, flags)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with Storage(tmp_path).lock():
        assert (tmp_path / ".lock").exists()
        with pytest.raises(StudyError, match="in use by process"), Storage(tmp_path).lock():
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_was_copied_while_it_ran_goes_on_as_a_study_of_its_own(tmp_path: Path) -> None:
    config = toy("s", arm("dfkt", 4), seeds=1)
    running = Played(tmp_path / "one", config).run(limit=2)
    assert running.ask() is not None
    for table in ("trials", "epochs"):
        (tmp_path / "one" / "s" / table / "arm=dfkt" / f".part-00000.parquet.{'0' * 32}.tmp").write_bytes(b"PAR1")
    with hold(Storage(tmp_path / "one" / "s")):
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        journal = tmp_path / "two" / "s" / "optuna.journal"
        journal.write_bytes(journal.read_bytes()[:-9])
        with hold(Storage(tmp_path / "two" / "s")):
            store = open_study(config, tmp_path / "two").store
            mend_journal(store.storage, lambda arm: store.rows("trial", arm), print)
            copied = Played(tmp_path / "two", config).run()
    assert copied.told() == ["dfkt trial 2", "dfkt trial 3", "dfkt seed 1"]
    study = read_study(tmp_path / "two" / "s")
    assert study.trials.number.tolist() == [0, 1, 2, 3]
    assert set(study.trials.state) == {"COMPLETE"}
    assert read_study(tmp_path / "one" / "s").trials.state.tolist() == ["COMPLETE", "COMPLETE", "RUNNING"]


def test_a_copy_under_another_name_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_study(toy("s"), tmp_path)
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    refused(capsys, ["resume", "copy"], "must lie in a folder of its name, but")


def test_a_folder_that_vanishes_between_check_and_start_is_made_again(tmp_path: Path) -> None:
    with hold(Storage(tmp_path / "s")):
        shutil.rmtree(tmp_path / "s")
        open_store(toy("s"), Storage(tmp_path / "s"), ABOUT, TAPS)
    assert sorted(lying(tmp_path)) == ["s", "s/study.json"]


def test_a_folder_of_images_is_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "s" / "train", "ab")
    before = sorted(lying(tmp_path))
    for argv in (STUDY, ["show", "s"], ["resume", "s"]):
        refused(capsys, argv, str(tmp_path / "s"))
    assert sorted(lying(tmp_path)) == before


def test_a_name_that_is_too_long_for_a_file_system_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="File name too long"), hold(Storage(tmp_path / "results" / ("x" * 300))):
        pass
    assert list(tmp_path.iterdir()) == []
