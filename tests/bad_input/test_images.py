"""Image sets that cannot be used are refused before anything is trained, in one line that names the file."""

import contextlib
import errno
import io
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import known_sets
import numpy as np
import pytest
from conftest import write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin
from scipy.io import savemat
from torchvision.datasets import cifar, svhn

from dfkt.cli.main import main
from dfkt.config import DataConfig, Placement
from dfkt.data.decode import decode_all, shorter_sides
from dfkt.data.image_set import ImageSet
from dfkt.data.listing import EXTENSIONS
from dfkt.data.load import check_test, load_data, load_test
from dfkt.data.named import PATIENCE
from dfkt.errors import DataError
from dfkt.store.files import Storage
from dfkt.study.config import StudyConfig
from dfkt.study.opening import check_study

Change = Callable[[Path], object]
CAT, TEST_CAT = Path("train/cat/0.png"), Path("test/cat/0.png")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder with train/, val/ and test/ of two classes, with 3, 1 and 1 images each."""
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / "pets" / split / name / f"{i}.png", seed=i)
    return tmp_path / "pets"


def prepare(name: Path | str, root: Path | str, **given: Any) -> ImageSet:
    """Do all that is done with a set before anything is trained on it."""
    config = DataConfig(name=str(name), **given)
    data = load_data(config, root)
    check_test(config, root, data)
    return data


def refused(name: Path | str, root: Path) -> str:
    """Return the line with which a set is refused; nothing stays behind but what was decoded of a whole split."""
    with pytest.raises(DataError) as caught:
        prepare(name, root)
    message = str(caught.value)
    assert message.isprintable()
    assert {path.suffix for path in root.rglob("*") if path.is_file()} <= {".npy", ".lock"}
    assert len([*root.rglob("*.lock")]) <= len([*root.rglob("*.npy")])
    return message


def replaced(name: Path | str, content: bytes) -> Change:
    return lambda pets: (pets / name).write_bytes(content)


def saved(name: Path | str, pixels: Any, kind: str = "TIFF") -> Change:
    return lambda pets: Image.fromarray(pixels).save(pets / name, kind)


def made(name: Path | str, make: Callable[[Path], object]) -> Change:
    """Put something else in the place of a file."""

    def change(pets: Path) -> None:
        (pets / name).unlink(missing_ok=True)
        make(pets / name)

    return change


def bind(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:  # a path to bind to must be short
        made.bind(path.name)


def png(size: tuple[int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("L", size).save(content, "PNG")
    return content.getvalue()


def claiming(width: int, height: int) -> bytes:
    """Return a small PNG file whose header claims another size."""
    content = bytearray(png((1, 1)))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = (PngImagePlugin._crc32(bytes(content[12:29]))).to_bytes(4, "big")
    return bytes(content)


FLOATS, INTS = np.full((8, 8), 0.5, dtype=np.float32), np.full((8, 8), 200, dtype=np.int32)
LINKED = [
    pytest.param(lambda path: path.symlink_to("nowhere.png"), "No such file", id="dangling"),
    pytest.param(lambda path: path.symlink_to(path.name), "symbolic links", id="loop"),
    pytest.param(os.mkfifo, "must be a regular file, but .* is a pipe", id="pipe"),
    pytest.param(bind, "is a socket", id="socket"),
    pytest.param(lambda path: path.symlink_to("/dev/zero"), "is a device", id="device"),
]
BROKEN = [
    pytest.param(b"", "no known kind of image", id="empty"),
    pytest.param(b"once upon a time\n", "no known kind of image", id="text"),
    pytest.param(png((8, 8))[:20], "0.png is not", id="half a header"),
    pytest.param(png((200_000, 1)), "200000x1 pixels", id="long"),
    pytest.param(png((1, 101)), "1x101 pixels", id="high"),
    pytest.param(claiming(100_000, 100_000), "decompression bomb", id="bomb"),
]


@pytest.mark.parametrize("where", [CAT, Path("val/dog/0.png"), TEST_CAT], ids=str)
@pytest.mark.parametrize(("make", "message"), LINKED)
def test_what_is_no_regular_file_is_refused_and_never_opened(pets, tmp_path, where, make, message):
    made(where, make)(pets)
    line = refused(pets, tmp_path / "root")

    assert str(pets / where) in line
    assert re.search(message, line)


@pytest.mark.parametrize("where", [CAT, Path("val/dog/0.png"), TEST_CAT], ids=str)
@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_what_is_no_image_is_refused_in_every_split(pets, tmp_path, where, content, message):
    (pets / where).write_bytes(content)
    line = refused(pets, tmp_path / "root")

    assert str(pets / where) in line
    assert message in line


@pytest.mark.parametrize("where", [CAT, TEST_CAT], ids=str)
@pytest.mark.parametrize("pixels", [FLOATS, INTS], ids=["float", "int"])
def test_pixels_of_32_bits_are_refused(pets, tmp_path, where, pixels):
    (pets / where).unlink()
    Image.fromarray(pixels).save((pets / where).with_suffix(".tif"))

    assert "0.tif is not (pixels of 32 bits have no scale" in refused(pets, tmp_path / "root")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_pixels_of_16_bits_keep_their_upper_eight(pets, tmp_path, kind):
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for path in pets.rglob("*.png"):
        Image.fromarray(pixels).save(path, kind)
    data = prepare(pets, tmp_path / "root")

    assert data.channels == 1
    assert np.array_equal(data.train.images[0, ..., 0].numpy(), pixels >> 8)


def test_16_bits_that_are_not_used_are_told_of(pets, tmp_path):
    draws = np.random.default_rng(0)
    for path in pets.rglob("*.png"):
        Image.fromarray(draws.integers(0, 4096, (8, 8), dtype=np.uint16)).save(path)

    assert "training images hardly differ (std 0.0" in " ".join(prepare(pets, tmp_path / "root").notes)


@pytest.mark.parametrize(
    ("mode", "ending", "channels"),
    [
        *(("1", "png", 1), ("L", "bmp", 1), ("LA", "png", 1), ("L", "pgm", 1), ("P", "png", 3), ("RGBA", "webp", 3)),
        *(("RGBA", "tiff", 3), ("CMYK", "jpg", 3), ("CMYK", "tif", 3), ("YCbCr", "jpeg", 3), ("PA", "tif", 3)),
    ],
)
def test_every_mode_that_converts_rightly_is_taken(tmp_path, mode, ending, channels):
    for split in ("train", "test"):
        for seed, name in enumerate("aabb"):
            pixels = np.full((8, 8, 3), 40 + 50 * seed, dtype=np.uint8)
            write_image(tmp_path / "set" / split / name / f"{seed}.{ending}", mode=mode, pixels=pixels)
    data = prepare(tmp_path / "set", tmp_path / "root")
    test = load_test(DataConfig(name=str(tmp_path / "set")), tmp_path / "root", data)

    assert data.channels == test.images.shape[3] == channels
    means = test.images.float().mean((1, 2, 3))
    assert mode == "1" or (means - means.new_tensor([40, 90, 140, 190])).abs().max() < 30  # a palette is coarse


def test_an_image_cut_off_behind_its_header_is_refused_where_it_is_decoded(pets, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for split in ("train", "val", "test"):
        path = pets / split / "cat/1.jpg"
        write_image(path, pixels=noise)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        if split != "test":
            assert "1.jpg is not (image file is truncated" in refused(pets, tmp_path / "root")
            path.unlink()
    data = prepare(pets, tmp_path / "root")  # a header alone does not tell

    with pytest.raises(DataError, match=r"test/cat/1\.jpg is not \(image file is truncated"):
        load_test(DataConfig(name=str(pets)), tmp_path / "root", data)


def test_images_of_one_pixel_are_taken_and_sizes_that_differ_told_of(pets, tmp_path):
    alike = prepare(pets, tmp_path / "root")
    write_image(pets / CAT, size=(1, 1))
    data = prepare(pets, tmp_path / "root")

    assert not [note for note in alike.notes if "sizes" in note]
    assert data.image_size == (1, 1)
    assert "images of several sizes become 1x1, as the first is (cat/0.png); --image-size sets another" in data.notes
    assert not [note for note in prepare(pets, tmp_path / "root", image_size=8).notes if "sizes" in note]


def test_large_photographs_are_taken_without_a_warning(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    write_image(pets / "train/dog/9.png", size=(8, 8))

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prepare(pets, tmp_path / "root")
    assert seen == []


def denying(call: Callable[[Any], Any], place: Path) -> Callable[[Any], Any]:
    """Return a call that is denied a single path."""

    def refuse(path: Any) -> Any:
        if Path(path) == place:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return call(path)

    return refuse


@pytest.mark.parametrize("where", ["", "train", "train/cat", "val/dog", "test", "test/cat/deeper"])
def test_an_unreadable_folder_is_named(pets, tmp_path, monkeypatch, where):
    (pets / "test/cat/deeper").mkdir()
    monkeypatch.setattr(os, "scandir", denying(os.scandir, pets / where))
    expected = f"Every folder of images must be readable, but {pets / where} is not (Permission denied)."
    assert expected in refused(pets, tmp_path / "root")


@pytest.mark.parametrize("where", [CAT, TEST_CAT], ids=str)
def test_an_unreadable_file_is_named(pets, tmp_path, monkeypatch, where):
    monkeypatch.setattr(Image, "open", denying(Image.open, pets / where))
    assert f"but {pets / where} is not (Permission denied)." in refused(pets, tmp_path / "root")


@pytest.mark.parametrize("up", [".", "..", "../.."])
def test_a_folder_that_holds_itself_is_refused(pets, tmp_path, up):
    (pets / "train/cat/again").symlink_to(up)
    (pets / "train/cat/more").symlink_to(up)

    assert "A folder must not hold itself, but " in refused(pets, tmp_path / "root")


def test_links_to_files_and_folders_elsewhere_are_followed(pets, tmp_path):
    whole = prepare(pets, tmp_path / "root")
    (pets / "train/cat").rename(tmp_path / "cat")
    (pets / "train/cat").symlink_to(tmp_path / "cat")
    (pets / TEST_CAT).rename(tmp_path / "test.png")
    (pets / TEST_CAT).symlink_to(tmp_path / "test.png")

    assert prepare(pets, tmp_path / "root").checksum == whole.checksum


def test_a_link_to_itself_that_is_no_image_is_left_out(pets, tmp_path):
    (pets / "train/cat/odd").symlink_to("odd")
    (pets / "train/odd").symlink_to("odd")

    assert any("2 files are left out" in note for note in prepare(pets, tmp_path / "root").notes)


@pytest.mark.parametrize(
    ("files", "told", "example"),
    [
        (["train/cat/a.txt", "train/cat/b.gif"], "2 files are left out", "train/cat/b.gif"),
        (["train/cat/x.gif"], "1 file is left out", "train/cat/x.gif"),
        (["test/dog/deep/x.heic.txt"], "1 file is left out", "test/dog/deep/x.heic.txt"),
        (["train/README", "train/0.png"], "2 files are left out", "train/0.png"),
        (["val/0.jpg"], "1 file is left out", "val/0.jpg"),
    ],
)
def test_files_that_are_left_out_are_counted_with_an_example(pets, tmp_path, files, told, example):
    for file in files:
        (pets / file).parent.mkdir(exist_ok=True)
        (pets / file).write_bytes(b"")
    notes = [note for note in prepare(pets, tmp_path / "root").notes if "left out" in note]

    assert len(notes) == 1
    assert notes[0].startswith(f"{told}, such as {pets / example}: images lie in ")


def test_folders_beside_train_that_are_no_split_are_told_of(pets, tmp_path):
    for name in ("Validation", "extra", ".hidden"):
        (pets / name).mkdir()

    notes = prepare(pets, tmp_path / "root").notes
    assert "Validation/, extra/ beside train/ not read: splits are train, val, test" in notes


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("folder_stays", [True, False])
def test_a_class_that_a_split_lacks_is_told_of(pets, tmp_path, split, folder_stays):
    (pets / split / "cat/0.png").unlink()
    if not folder_stays:
        (pets / split / "cat").rmdir()
    data = prepare(pets, tmp_path / "root")

    assert f"{split}/ has no images of cat: accuracies there are of the other classes" in data.notes
    assert load_test(DataConfig(name=str(pets)), tmp_path / "root", data).labels.tolist() == [0, 1][split == "test" :]


def empty_test(pets: Path) -> None:
    for image in pets.glob("test/*/*"):
        image.unlink()


def unlabelled_test(pets: Path) -> None:
    empty_test(pets)
    write_image(pets / "test/0.png")


def clear(pets: Path) -> None:
    for image in pets.rglob("*.png"):
        image.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty_test, "The test split must hold images in one folder for each class"),
        (unlabelled_test, "The test split must hold images in one folder for each class"),
        (
            lambda pets: write_image(pets / "test/images/0.png"),
            "Every class of test/ must be in train/ too, but got images",
        ),
        (lambda pets: [(pets / "test" / f"fish{i}").mkdir() for i in range(9)], "fish4 and 4 more in"),
        (lambda pets: (pets / "train/bird").mkdir(), "Every class must have training images, but bird has none"),
        (lambda pets: (pets / "train").rename(pets / "training"), r"A folder with val/ must hold train/ beside it"),
        (clear, "The train split must hold images"),
    ],
)
def test_splits_that_cannot_be_used_are_refused(pets, tmp_path, change, message):
    change(pets)
    assert message in refused(pets, tmp_path / "root")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/pets", "Images are read from local folders"),
        ("file:///tmp/pets", "Images are read from local folders"),
        ("pets.zip", "but got '{tmp}/pets.zip', a file. Unpack it."),
        ("absent", "or an existing folder, but got '{tmp}/absent'."),
        ("~nobody-of-this-name/pets", "or an existing folder"),
        ("nul\0", "or an existing folder"),
        ("long" * 1000, "or an existing folder"),
        ("empty", "must hold one sub-folder for each of two or more classes, but has none"),
    ],
)
def test_data_that_is_no_folder_of_images_is_refused(tmp_path, name, message):
    (tmp_path / "pets.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    local = "://" not in name and not name.startswith("~")

    assert message.format(tmp=tmp_path) in refused(f"{tmp_path}/{name}" if local else name, tmp_path / "root")


@pytest.mark.parametrize("name", [b"two\nlines", b"\xff\xfe", b"\x1b[31mred"])
def test_names_that_no_terminal_shows_are_read_and_escaped(tmp_path, name):
    odd = os.fsdecode(name)
    for split in ("train", "test"):
        for k in range(4):
            write_image(tmp_path / odd / split / ("cat" if k % 2 else odd) / f"{odd}{k}.png", seed=k)
    (tmp_path / odd / "train" / odd / f"{odd}.gif").write_bytes(b"")
    data = prepare(tmp_path / odd, tmp_path / "root")
    assert len(data.train) == 2
    assert "\n".join((data.describe(), *data.notes)).encode().decode().replace("\n", "").isprintable()

    (tmp_path / odd / "test" / odd / f"{odd}0.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / odd, tmp_path / "other")
    assert str(caught.value).isprintable()


def test_the_test_split_is_not_opened_where_its_decoded_images_are_kept(pets, tmp_path, monkeypatch):
    config = DataConfig(name=str(pets))
    data = prepare(pets, tmp_path / "root")
    load_test(config, tmp_path / "root", data)
    opened: list[Path] = []
    whole = Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), whole(path))[1])
    check_test(config, tmp_path / "root", data)
    assert opened == []

    os.utime(pets / TEST_CAT, ns=(1, 1))  # another listing
    check_test(config, tmp_path / "root", data)
    assert opened == [pets / TEST_CAT, pets / "test/dog/0.png"]


def test_probing_the_test_split_decodes_nothing(pets, tmp_path, monkeypatch):
    config = DataConfig(name=str(pets))
    data = load_data(config, tmp_path / "root")
    decoded: list[Any] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    check_test(config, tmp_path / "root", data)

    assert decoded == []
    assert len(list((tmp_path / "root").rglob("*.npy"))) == 2  # train and val


@pytest.mark.parametrize(("name", "count", "size"), [("pets", 6, 1032), ("digits", 145, 1024)])
def test_images_that_do_not_fit_into_memory_are_refused(pets, tmp_path, monkeypatch, name, count, size):
    zeros = np.zeros

    def limited(shape: Any, **given: Any) -> Any:
        if np.prod(shape) > 10**7:
            raise MemoryError
        return zeros(shape, **given)

    monkeypatch.setattr(np, "zeros", limited)
    with pytest.raises(DataError, match=f"All images must fit into memory, but {count} of {size}x{size} do not. Lower"):
        prepare(
            pets if name == "pets" else name, tmp_path / "root", image_size=1024, padding=4
        )  # those padded are copied


def test_a_data_root_that_is_no_local_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="The data root must be a local folder, but got s3://bucket"):
        prepare("mnist", "s3://bucket")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_part_behind(pets, tmp_path, monkeypatch):
    def fill(file: int, images: Any, place: int) -> int:
        if place > 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, images[:100], place)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", fill)
    assert "The data root must be writable, but " in (line := refused(pets, tmp_path / "root"))
    assert "(No space left on device)" in line
    assert not (tmp_path / "root").exists()


def decoded(paths: list[Path]) -> None:
    with tempfile.TemporaryFile() as file:
        decode_all(paths, file, size=4)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(EXTENSIONS),
    st.one_of(st.binary(max_size=200), st.tuples(st.integers(0, 200), st.binary(max_size=8))),
)
def test_whatever_bytes_a_file_has_it_is_an_image_or_named(ending, content):
    """Bytes of all kinds, and whole images of an ending's kind with some bytes of theirs changed."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"0{ending}")
        write_image(path, size=(5, 3), mode="L" if ending == ".pgm" else "RGB")
        if isinstance(content, tuple):
            start, change = content
            whole = path.read_bytes()
            content = whole[:start] + change + whole[start + len(change) :]
        path.write_bytes(content)
        for read in (decoded, shorter_sides):
            try:
                told = f"but {path} is not ({read([path])})"
            except DataError as error:
                told = str(error)
            assert f"but {path} is not (" in told
            assert told.isprintable()


def broken_test_study(pets: Path) -> StudyConfig:
    (pets / TEST_CAT).write_bytes(b"text")
    return StudyConfig(name="s", data=DataConfig(name=str(pets)))


def test_a_study_is_refused_for_its_test_split(pets, tmp_path):
    placement = Placement(data_root=str(tmp_path / "root"), teacher_root=str(tmp_path / "teachers"))
    with pytest.raises(DataError, match=r"test/cat/0\.png is not"):
        check_study(broken_test_study(pets), Storage(tmp_path / "s"), placement, lambda line: pytest.fail(line))
    assert not (tmp_path / "s").exists()


def test_a_teacher_is_refused_for_its_test_split(pets, tmp_path, capsys):
    broken_test_study(pets)
    roots = ("--data-root", str(tmp_path / "root"), "--teacher-root", str(tmp_path / "teachers"))
    assert main(["teacher", "--data", str(pets), "--teacher", "resnet8", *roots]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "test/cat/0.png is not (no known kind of image)" in line
    assert not (tmp_path / "teachers").exists()


# torchvision's sets


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """No download succeeds, and small files pass torchvision's checksums; each try notes its timeout."""
    tries: list[float | None] = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(socket.getdefaulttimeout())
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    known_sets.cut_off(monkeypatch, fail)
    return tries


def write_mnist(root: Path, ending: str = "") -> Path:
    known_sets.write_mnist(root / "MNIST/raw", packed=ending == ".gz")
    return root / "MNIST/raw"


def write_cifar(root: Path) -> Path:
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    known_sets.write_cifar(root / "cifar-10-batches-py", files, ("batches.meta", "label_names"), "labels", 10)
    return root / "cifar-10-batches-py"


def write_svhn(root: Path) -> Path:
    root.mkdir(parents=True)
    for part in ("train", "test"):
        images = np.arange(40 * 12, dtype=np.uint8).reshape(2, 2, 3, 40)
        savemat(root / f"{part}_32x32.mat", {"X": images, "y": (np.arange(40) % 10 + 1)[:, None].astype(np.uint8)})
    return root


def known_refused(name: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepare(name, root)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_whole_sets_of_torchvision_are_taken_without_a_download(tmp_path, offline, name):
    {"mnist": write_mnist, "cifar10": write_cifar, "svhn": write_svhn}[name](tmp_path / "root")
    assert prepare(name, tmp_path / "root").num_classes == 10
    assert offline == []


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn"])
def test_without_network_and_files_one_line_says_so(tmp_path, offline, name):
    line = known_refused(name, tmp_path / "root")
    assert "nor downloaded (" in line
    assert "Temporary failure in name resolution" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {*offline} == {PATIENCE}
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_a_data_root_that_cannot_be_written_is_one_line(tmp_path, offline, name):
    (tmp_path / "root").write_text("")
    assert "could be neither read from" in known_refused(name, tmp_path / "root")


HALF: list[Callable[[bytes], bytes]] = [
    lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[:5],
    lambda whole: b"",
    lambda whole: b"text that is as long as nothing else",
]


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("what", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("damage", HALF)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_damaged_files_of_mnist_are_found_before_training(tmp_path, offline, part, what, damage, ending):
    damaged = write_mnist(tmp_path / "root", ending) / f"{part}-{what}-ubyte{ending}"
    damaged.write_bytes(damage(damaged.read_bytes()))
    line = known_refused("mnist", tmp_path / "root")

    assert f"in {tmp_path / 'root'}" in line or f"from {tmp_path / 'root'}" in line
    assert not ending or damaged.name in line
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", HALF)
def test_damaged_files_of_cifar_are_found_before_training(tmp_path, offline, monkeypatch, file, damage):
    damaged = write_cifar(tmp_path / "root") / file
    damaged.write_bytes(damage(damaged.read_bytes()))
    if file == "test_batch":  # never opened before the end: torchvision compares it with its checksum
        monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).name != file)
    assert "CIFAR-10 could be neither read from" in known_refused("cifar10", tmp_path / "root")


@pytest.mark.parametrize("file", ["train_32x32.mat", "test_32x32.mat"])
@pytest.mark.parametrize("damage", HALF)
def test_damaged_files_of_svhn_are_found_before_training(tmp_path, offline, monkeypatch, file, damage):
    damaged = write_svhn(tmp_path / "root") / file
    damaged.write_bytes(damage(damaged.read_bytes()))
    if file == "test_32x32.mat":
        monkeypatch.setattr(svhn, "check_integrity", lambda path, md5=None: Path(path).name != file)
    assert "SVHN could be neither read from" in known_refused("svhn", tmp_path / "root")


def test_a_set_without_a_label_for_each_image_is_refused(tmp_path, offline):
    labels = write_mnist(tmp_path / "root") / "train-labels-idx1-ubyte"
    labels.write_bytes(b"\0\0\x08\x01" + (30).to_bytes(4, "big") + bytes(30))
    assert "must have a label for each image, but has 40 images and 30 labels" in known_refused(
        "mnist", tmp_path / "root"
    )
