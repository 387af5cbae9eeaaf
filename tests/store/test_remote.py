"""A folder in a bucket is one like any other, and what fails there and may pass is asked again.

The bucket is moto's, on this machine; it fails as told.
"""

import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from bucket import RESET, Bucket, one_in_ten, served
from store.test_files import (  # noqa: F401  # collected here too, with this file's folder
    test_a_copy_in_another_process_is_the_same_folder,
    test_deletion_takes_one_file_or_all,
    test_files_and_folders_are_listed_sorted_and_hidden_ones_only_among_all_entries,
    test_what_is_absent_is_none_and_its_deletion_no_error,
    test_what_is_written_is_read_and_replaced_as_a_whole,
)

from dfkt.errors import StudyError
from dfkt.store import lock, remote
from dfkt.store.files import Storage, is_leftover, readable

GATEWAY = (502, "BadGateway")  # pyarrow gives up at once when a PUT is answered so


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with served() as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket) -> Iterator[Bucket]:
    """The server, which fails no more after the test."""
    server.requests.clear()
    yield server
    server.fault = lambda request: None


@pytest.fixture
def folder(bucket: Bucket, request: pytest.FixtureRequest) -> Storage:
    return Storage(bucket.uri(f"{abs(hash(request.node.nodeid))}"))


def test_a_folder_of_a_bucket_knows_its_parts(folder: Storage) -> None:
    above, name = folder.split()
    assert above.sub(name).path == folder.path
    folder.sub("trials", "arm=kd").write("part", b"x")
    assert above.sub(name, "trials").folders() == ["arm=kd"]


def test_a_file_tells_by_the_stores_clock_when_it_was_written(folder: Storage) -> None:
    assert folder.modified("a") is None
    folder.write("a", b"")
    written = folder.modified("a")
    assert written is not None
    assert abs(written - time.time()) < 5


def test_one_failed_request_in_ten_loses_and_doubles_nothing(bucket: Bucket, folder: Storage) -> None:
    bucket.fault = one_in_ten(0, "PUT", "POST", "GET", "HEAD", "DELETE")
    for k in range(20):
        folder.write(f"{k:02d}", b"old")
        folder.write(f"{k:02d}", str(k).encode())
        folder.write("one", str(k).encode())
    assert folder.names() == [*(f"{k:02d}" for k in range(20)), "one"]
    assert [folder.read(f"{k:02d}") for k in range(20)] == [str(k).encode() for k in range(20)]
    assert folder.read("one") == b"19"
    for k in range(19):
        folder.delete(f"{k:02d}")
    assert folder.names() == ["19", "one"]
    folder.delete_all()
    assert folder.entries() == []


def test_a_request_that_pyarrow_gives_up_is_made_again(bucket: Bucket, folder: Storage) -> None:
    answers = itertools.chain([GATEWAY] * 3, itertools.repeat(None))
    bucket.fault = lambda request: next(answers)
    folder.write("a", b"data")
    assert len(bucket.requests) == 3 + 3  # an upload takes three requests
    assert folder.read("a") == b"data"


@pytest.mark.slow
def test_a_store_that_is_away_for_20_seconds_is_waited_for(
    bucket: Bucket, folder: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    back = time.monotonic() + 20
    bucket.fault = lambda request: RESET if time.monotonic() < back else None
    folder.write("a", b"data")
    assert 0 <= time.monotonic() - back < 30
    assert folder.read("a") == b"data"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"waiting for {folder.path}, for up to 120 s (OSError: ")


def test_a_store_that_stays_away_is_given_up(bucket: Bucket, folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SECONDS", 1.5)
    bucket.fault = lambda request: GATEWAY
    began = time.monotonic()
    with pytest.raises(OSError, match="HTTP status 502"):
        folder.write("a", b"data")
    assert time.monotonic() - began < 5
    assert 3 <= len(bucket.requests) <= 6


@pytest.mark.parametrize(
    ("status", "code", "cure"),
    [
        (403, "AccessDenied", "they must allow to list, read, write and delete there"),
        (403, "InvalidAccessKeyId", "Correct your credentials"),
        (403, "SignatureDoesNotMatch", "Correct your credentials"),
        (400, "ExpiredToken", "Renew your credentials"),
        (404, "NoSuchBucket", "Create the bucket"),
    ],
)
def test_what_cannot_pass_is_not_tried_again_and_says_what_to_do(
    status: int, code: str, cure: str, bucket: Bucket, folder: Storage
) -> None:
    bucket.fault = lambda request: (status, code)
    with pytest.raises(StudyError, match=cure) as refused:
        folder.check_writable()
    assert "\n" not in str(refused.value)
    assert len(bucket.requests) == 1


def test_a_missing_bucket_and_a_bucket_that_may_not_be_read_are_one_line(bucket: Bucket, folder: Storage) -> None:
    with pytest.raises(StudyError, match=r"NO_SUCH_BUCKET.*Create the bucket"):
        Storage(bucket.uri("x", "not-there")).check_writable()
    bucket.fault = lambda request: (403, "AccessDenied")
    with pytest.raises(StudyError, match=r"ACCESS_DENIED.*Check the URI and your credentials"), readable(folder):
        folder.read("a")


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate", True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.", True),
        ("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 28, Timeout was reached", True),
        ("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 60, SSL peer certificate", False),
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)", True),
        ("503 The server is busy", True),
        ("google::cloud::Status(PERMISSION_DENIED: Permanent error)", False),
        ("AWS Error UNKNOWN (HTTP status 400) during PutObject operation", False),
        ("AWS Error ACCESS_DENIED during PutObject operation: 503 is only part of this name", False),
    ],
)
def test_what_may_pass_is_told_from_what_does_not(text: str, passes: bool) -> None:
    assert remote.may_pass(OSError(text), "s3://bucket/x") is passes


def test_a_host_without_an_address_is_a_wrong_uri_until_it_has_answered(folder: Storage) -> None:
    error = OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 6, Couldn't resolve host name")
    assert not remote.may_pass(error, "s3://bucket/x?endpoint_override=mistyped")
    folder.exists("a")
    assert remote.may_pass(error, folder.sub("b", "c").path)


def test_a_file_that_another_host_replaced_while_it_was_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So NFS answers; what a broken disk answers is an error at once."""
    calls = []

    def stale(name: str, *given: Any) -> Any:
        calls.append(name)
        if len(calls) < 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return io.BytesIO(b"new")

    monkeypatch.setattr("builtins.open", stale)
    assert Storage(tmp_path).read("a") == b"new"
    assert len(calls) == 3

    def broken(name: str, *given: Any) -> Any:
        calls.append(name)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(OSError, match="Input/output error"):
        Storage(tmp_path).read("a")
    assert len(calls) == 4


def test_a_remote_lock_excludes_a_second_holder_until_it_is_freed(folder: Storage) -> None:
    with folder.lock():
        with (
            pytest.raises(StudyError, match=rf"in use by process {os.getpid()} on .* wrote there \d s ago"),
            folder.lock(),
        ):
            pass
        assert folder.names() == []
        assert len(folder.entries()) == 1
        assert all(map(is_leftover, folder.entries()))
    assert folder.entries() == []
    with folder.lock():
        pass


HOLDER = """
import sys, time
from dfkt.store.files import Storage
lock = Storage(sys.argv[1]).lock()
lock.__enter__()
print("held", flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


def hold_elsewhere(folder: Storage, then: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER, folder.path, then], stdout=subprocess.PIPE, text=True)


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(
    folder: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold_elsewhere(folder, "wait") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match=f"in use by process {holder.pid} on "), folder.lock():
            pass
        holder.kill()
        holder.wait()
    with folder.lock():
        assert len(folder.entries()) == 1
    assert f"taken over from process {holder.pid} on " in capsys.readouterr().err


def test_a_heartbeat_keeps_no_process_alive(folder: Storage) -> None:
    with hold_elsewhere(folder, "end") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert holder.wait(15) == 0


def elsewhere(folder: Storage, seconds: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """Leave a lease of another machine, written so many seconds ago by the store's clock."""
    name = f".lease-{'0' * 32}"
    folder.write(name, json.dumps({"holder": "process 7 on far", "machine": "far", "process": 7}).encode())
    modified = Storage.modified

    def earlier(self: Storage, asked: str) -> float | None:
        found = modified(self, asked)
        return found - seconds if asked == name and found is not None else found

    monkeypatch.setattr(Storage, "modified", earlier)
    return name


def test_a_lease_of_another_machine_holds_until_it_is_stale(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = elsewhere(folder, 60, monkeypatch)
    with pytest.raises(
        StudyError, match=r"in use by process 7 on far, which wrote there 6\d s ago.* is free 1[12]\d s"
    ):
        folder.lock().__enter__()
    assert folder.entries() == [name]
    monkeypatch.undo()
    name = elsewhere(folder, 181, monkeypatch)
    with folder.lock():
        assert name not in folder.entries()
    (line,) = capsys.readouterr().err.splitlines()
    assert "taken over from process 7 on far, which is gone or silent for 18" in line


@pytest.mark.parametrize("data", [b"", b"{half", b"[]", b'{"process": "x", "machine": 3}'])
def test_a_lease_that_cannot_be_read_is_one(data: bytes, folder: Storage) -> None:
    folder.write(f".lease-{'a' * 32}", data)
    with pytest.raises(StudyError, match="in use by another process"), folder.lock():
        pass


def test_a_held_lease_is_written_again_and_again_and_no_more_when_it_is_free(
    folder: Storage, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    before = threading.active_count()
    with folder.lock():
        (name,) = folder.entries()
        bucket.requests.clear()
        for _ in range(200):
            if sum(name in asked and asked.startswith("POST") for asked in bucket.requests) > 4:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("no heartbeat")
    deadline = time.monotonic() + 5
    while any("_beat" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)
    bucket.requests.clear()
    time.sleep(0.3)
    assert (bucket.requests, threading.active_count() <= before + 1) == ([], True)
    assert folder.entries() == []


def test_a_holder_whose_lease_was_taken_over_ends(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(os, "kill", lambda process, number: ended.set() if number == signal.SIGTERM else None)
    with folder.lock():
        for name in folder.entries():
            folder.delete(name)
        assert ended.wait(20)
    assert "was taken over by another process; this one ends" in capsys.readouterr().err


def test_a_holder_that_wakes_late_and_finds_another_lease_ends(
    folder: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "STALE", 0.01)  # every beat is late
    monkeypatch.setattr(os, "kill", lambda process, number: ended.set())
    with folder.lock():
        assert not ended.wait(1)
        folder.write(f".lease-{'b' * 32}", b"{}")
        assert ended.wait(20)


def test_of_several_that_come_at_once_never_do_two_hold_the_folder(folder: Storage) -> None:
    holders: list[int] = []
    most: list[int] = []

    def come(number: int) -> None:
        for _ in range(6):
            with suppress(StudyError), folder.lock():
                holders.append(number)
                most.append(len(holders))
                time.sleep(0.02)
                holders.remove(number)

    threads = [threading.Thread(target=come, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) <= {1}
    with folder.lock():
        pass
