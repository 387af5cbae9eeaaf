"""What a host says of itself is what it has: versions, files, images, folders; nothing of it is left behind."""

import socket
import warnings
from pathlib import Path

import pytest
import torch
from torchvision import datasets

from dfkt.config import KNOWN_SETS
from dfkt.store.files import Storage, is_leftover
from dfkt.study import host
from dfkt.study.host import DOWNLOADED, Data, Question, examine, find_data, forget, read_soon


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.read_soon, "__defaults__", (0.05,))


def test_a_host_says_its_versions_and_no_more_than_it_was_asked() -> None:
    said = examine(Question())
    assert (said.versions["torch"] or "").partition("+")[0] == torch.__version__.partition("+")[0]
    assert said.versions.keys() == {"python", "torch", "ray", "dfkt"}
    assert (said.name, said.sees, said.storage, said.left) == (socket.gethostname(), True, "", "")
    assert (said.data, said.hardware) == ({}, None)


def test_every_change_of_a_file_changes_the_codes_hash(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("1")
    hashes = {host._hash_code(tmp_path)}
    for name, text in (("a.py", "2"), ("b.py", ""), ("sub/b.py", ""), ("a.py", "3")):
        (tmp_path / name).write_text(text)
        hashes.add(host._hash_code(tmp_path))
    (tmp_path / "notes.txt").write_text("no code")
    assert host._hash_code(tmp_path) in hashes
    assert len(hashes) == 5


def test_a_host_that_sees_the_askers_file_leaves_one_of_its_own(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    said = examine(Question(results=storage.path, probe=storage.probe()))
    assert (said.sees, said.storage) == (True, "")
    assert read_soon(storage, said.left)
    assert is_leftover(said.left)
    forget(storage.path, said.left)
    assert storage.read(said.left) is None


@pytest.mark.parametrize("made", [True, False])
def test_a_host_that_does_not_see_it_writes_nothing(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "results"
    if made:
        folder.mkdir()
    said = examine(Question(results=str(folder), probe=f".probe-{32 * 'a'}"))
    assert (said.sees, said.storage, said.left) == (False, "", "")
    assert not list(folder.iterdir()) if made else not folder.exists()


def test_a_file_with_another_content_is_not_the_askers(tmp_path: Path) -> None:
    (tmp_path / ".probe-1").write_bytes(b"")
    assert not read_soon(Storage(str(tmp_path)), ".probe-1", 0)


def test_a_host_that_cannot_write_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    probe = storage.probe()

    def refuse(self: Storage, name: str, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Storage, "write", refuse)
    said = examine(Question(results=storage.path, probe=probe))
    assert said.left == ""
    assert "must be writable" in said.storage
    assert "Permission denied" in said.storage


def test_a_folder_of_images_is_known_by_its_classes(tmp_path: Path) -> None:
    for name in ("dog", "cat", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "notes").write_text("")
    assert find_data(str(tmp_path), "") == Data(classes=("cat", "dog"))
    assert "FileNotFoundError" in find_data(str(tmp_path / "none"), "").fault


def test_images_that_may_not_be_opened_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in find_data(str(tmp_path), "").fault


def test_a_set_that_is_to_be_downloaded_is_told_from_one_that_is_there(tmp_path: Path) -> None:
    assert find_data("digits", str(tmp_path)).there
    for name, place in DOWNLOADED.items():
        assert not find_data(name, str(tmp_path)).there
        (tmp_path / place).mkdir(parents=True)
        assert find_data(name, str(tmp_path)).there


def test_the_sets_lie_where_torchvision_puts_them() -> None:
    assert DOWNLOADED["cifar10"] == datasets.CIFAR10.base_folder
    assert DOWNLOADED["cifar100"] == datasets.CIFAR100.base_folder
    assert DOWNLOADED["mnist"] == f"{datasets.MNIST.__name__}/raw"
    assert DOWNLOADED["svhn"] == datasets.SVHN.split_list["train"][1]
    assert {*DOWNLOADED, "digits"} == {*KNOWN_SETS}


def test_what_torch_says_against_gpus_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old\n(found version 1)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    assert host._gpus() == (0, "UserWarning: The NVIDIA driver on your system is too old (found version 1)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert host._gpus() == (3, "")


def test_a_host_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(host, "DRIVER", tmp_path)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    found = examine(Question(addresses=("203.0.113.1", "127.0.0.1"))).hardware
    assert found is not None
    assert (found.built_in, found.resolves, found.interface) == (2, "127.0.1.1", "lo")
    assert all(0 < free <= total for free, total in found.disks.values())

    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert host._resolved("one") == ""


def test_the_space_of_a_folder_that_is_not_there_is_that_of_the_one_above(tmp_path: Path) -> None:
    assert host._space(str(tmp_path / "a" / "b"))[1] == host._space(str(tmp_path))[1]
