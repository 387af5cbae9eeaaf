"""Files of what a teacher said: whole or not there, never trusted when damaged, under a budget."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dfkt.training.kept import HEAD, RESERVE, KeptSet, delete_kept

STEPS = 3
NAMES = ["a b", "b c"]


@pytest.fixture
def kept(tmp_path: Path) -> KeptSet:
    return KeptSet(tmp_path, tmp_path / "study" / "set", budget=10**6)


def rows(step: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(step)
    return {"a b": torch.randn(4, 2, 3, generator=draws), "b c": torch.randn(4, 3, 3, generator=draws)}


def write(kept: KeptSet, name: str = "flow-00000") -> Path:
    writer = kept.write(name, STEPS)
    assert writer is not None
    for step in range(STEPS):
        assert writer.add(rows(step)) == (step + 1 < STEPS)
    return writer.path


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_come_back_in_any_order_to_the_last_bit(kept, kind):
    writer = kept.write("flow-00000", STEPS)
    for step in range(STEPS):
        writer.add({name: value.to(kind).transpose(1, 2) for name, value in rows(step).items()})

    file = kept.read("flow-00000", STEPS, NAMES)

    for step in (2, 0, 1):
        found = file.row(step)
        assert list(found) == NAMES
        assert all(torch.equal(found[name], value.to(kind).transpose(1, 2)) for name, value in rows(step).items())


def test_rows_are_views_of_the_file(kept):
    write(kept)
    file = kept.read("flow-00000", STEPS, NAMES)

    first, again = file.row(1)["b c"], file.row(1)["b c"]

    assert first.data_ptr() == again.data_ptr()
    assert first.untyped_storage().data_ptr() == file.mapped.untyped_storage().data_ptr()


def test_a_file_is_not_seen_before_it_is_whole(kept):
    writer = kept.write("flow-00000", STEPS)
    writer.add(rows(0))
    assert kept.read("flow-00000", STEPS, NAMES) is None

    writer.abandon()

    assert os.listdir(kept.folder) == []


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, HEAD),
        lambda path: path.write_bytes(b""),
        lambda path: flip(path, 2),
        lambda path: path.write_bytes(b"[1]".ljust(HEAD)),
        lambda path: path.write_bytes(b'{"format": 1, "steps": 3, "entries": [["a b", [1], "nothing"]]}'.ljust(HEAD)),
    ],
    ids=["short", "head alone", "empty", "no JSON", "other JSON", "other type"],
)
def test_a_damaged_file_is_deleted_and_not_read(kept, damage):
    path = write(kept)
    damage(path)

    assert kept.read("flow-00000", STEPS, NAMES) is None
    assert not path.exists()


def test_a_damaged_row_is_found_when_it_is_read_and_the_file_deleted(kept):
    path = write(kept)
    flip(path, path.stat().st_size - 4 * STEPS - 1)  # in the last row
    file = kept.read("flow-00000", STEPS, NAMES)

    assert file.row(0) is not None
    assert file.row(2) is None
    assert not path.exists()


@pytest.mark.parametrize(("steps", "names"), [(4, NAMES), (STEPS, ["a b"]), (STEPS, ["a b", "other"])])
def test_a_file_of_other_steps_or_entries_is_not_taken(kept, steps, names):
    write(kept)

    assert kept.read("flow-00000", steps, names) is None


def test_one_process_writes_a_file_at_a_time(kept):
    first, other = kept.write("flow-00000", STEPS), kept.write("flow-00001", STEPS)

    assert kept.write("flow-00000", STEPS) is None
    first.abandon()
    second = kept.write("flow-00000", STEPS)
    assert second.add(rows(0))
    for writer in (other, second):
        writer.abandon()


def test_what_a_killed_writer_left_is_written_over(kept):
    code = (
        "import sys, os, torch; from pathlib import Path; from dfkt.training.kept import KeptSet\n"
        "w = KeptSet(Path(sys.argv[1]), Path(sys.argv[2]), 10**6).write('flow-00000', 3)\n"
        "w.add({'x': torch.ones(9999)}); w.file.flush(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(kept.root), str(kept.folder)])
    assert [path.name for path in kept.folder.iterdir()] == ["flow-00000.part"]

    write(kept)

    assert torch.equal(kept.read("flow-00000", STEPS, NAMES).row(1)["a b"], rows(1)["a b"])
    assert [path.name for path in kept.folder.iterdir()] == ["flow-00000.targets"]


def test_those_that_were_not_read_for_the_longest_time_make_room_but_none_of_the_same_set(kept):
    other = KeptSet(kept.root, kept.root / "other" / "set", kept.budget)
    old, new, own = write(other, "flow-00000"), write(other, "flow-00001"), write(kept, "flow-00000")
    for age, path in ((30, own), (20, old), (10, new)):
        os.utime(path, (time.time() - age,) * 2)
    size = own.stat().st_size
    tight = KeptSet(kept.root, kept.folder, budget=3 * size)

    write(tight, "flow-00001")

    assert (old.exists(), new.exists(), own.exists()) == (False, True, True)
    write(tight, "flow-00002")
    assert not new.exists()
    writer = tight.write("flow-00003", STEPS)
    assert not writer.add(rows(0))
    assert own.exists()
    assert not writer.part.exists()


def test_reading_counts_as_use(kept):
    path = write(kept)
    os.utime(path, (1, 1))

    kept.read("flow-00000", STEPS, NAMES)

    assert path.stat().st_mtime > time.time() - 60


def test_some_space_stays_free_whatever_the_budget(kept, monkeypatch):
    usage = type("Usage", (), {"free": RESERVE})
    monkeypatch.setattr("dfkt.training.kept.shutil.disk_usage", lambda path: usage)

    assert not kept.write("flow-00000", STEPS).add(rows(0))
    usage.free += 10**6
    write(kept)


def test_a_disk_that_fills_ends_a_file_without_a_word(kept):
    writer = kept.write("flow-00000", STEPS)
    writer.add(rows(0))
    writer.file.close()
    writer.file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        writer.file.write(b"x")

    assert not writer.add(rows(1))
    assert os.listdir(kept.folder) == []


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")

    assert KeptSet(tmp_path, tmp_path / "file" / "set").write("flow-00000", STEPS) is None
    assert KeptSet(tmp_path, tmp_path / "file" / "set").read("flow-00000", STEPS, NAMES) is None


def test_only_kept_files_and_folders_without_others_are_deleted(kept):
    write(kept)
    writer = kept.write("flow-00001", STEPS)
    mine = kept.root / "study" / "notes.txt"
    mine.write_text("mine")

    delete_kept(kept.root / "study")

    assert [path.name for path in kept.root.rglob("*")] == ["study", "notes.txt"]
    writer.abandon()
    mine.unlink()
    delete_kept(kept.root / "study")
    assert list(kept.root.iterdir()) == []
