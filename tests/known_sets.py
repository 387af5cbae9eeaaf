"""Small files in the formats of torchvision's sets, and torchvision without a network."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torchvision.datasets import cifar, mnist, svhn


def cut_off(monkeypatch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> None:
    """Let small files pass torchvision's checksums, and call ``fail`` instead of every download."""
    for module, name in ((cifar, "download_and_extract_archive"), (mnist, "download_and_extract_archive")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(svhn, "download_url", fail)
    for module in (cifar, mnist, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def pixels(count: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_cifar(folder: Path, files: list[str], meta: tuple[str, str], key: str, classes: int) -> None:
    folder.mkdir(parents=True)
    entry = {"data": pixels(2 * classes, 3072), key: list(range(classes)) * 2}
    content = pickle.dumps(entry, protocol=2)
    old = content.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # dtype flags as 0 and 1, as in the real files
    assert old != content
    for file in files:
        (folder / file).write_bytes(old)
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class {i}" for i in range(classes)]}, protocol=2))


def write_mnist(raw: Path, *, packed: bool) -> None:
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images, labels = pixels(count, 28, 28), (np.arange(count) % 10).astype(np.uint8)
        sizes = np.array([count, 28, 28], dtype=">i4").tobytes()
        files = {"images-idx3": b"\0\0\x08\x03" + sizes + images.tobytes()}
        files["labels-idx1"] = b"\0\0\x08\x01" + sizes[:4] + labels.tobytes()
        for name, content in files.items():
            path = raw / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
