"""A student in a file that runs without dfkt: ``.onnx`` or ``.pt2``, as :mod:`dfkt.students.export` writes them, read back.

Each takes ``images``, float32 ``[N, C, H, W]`` in 0..1, any number of them, and gives ``logits`` ``[N, classes]``; the
normalisation is inside. What it is stands in the file as ``dfkt.NAME: JSON`` in the metadata of ONNX, and as JSON in
``extra/dfkt.json`` of a ``.pt2``: names of :data:`ENTRIES`.
"""

from __future__ import annotations

import importlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfkt.errors import CheckpointError, ConfigError, one_line
from dfkt.store.files import Storage, readable
from dfkt.students.cost import Shape

EXPORTS = {"onnx": "student.onnx", "int8": "student.int8.onnx", "pt2": "student.pt2"}
"""What a student is exported to, and the file's name beside its package."""
ENDINGS = (".onnx", ".pt2")
FORMAT = 1
"""Of the entries."""
ENTRIES = (
    "format", "version", "kind", "input", "network", "classes", "input_size", "mean", "std", "weights", "test_accuracy",
)  # fmt: skip
"""What a file says of itself: ``input`` in words; ``weights`` names those of the package; the accuracy is the file's own, and
``null`` where it was not measured."""
_PREFIX, _EXTRA = "dfkt.", "dfkt.json"


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported student that was opened.

    Attributes:
        about: What it says of itself.
        answer: Takes images in 0..1, ``[N, C, H, W]``, on the CPU; gives logits ``[N, classes]``, float32.
        size: Bytes of the file.
    """

    about: Mapping[str, Any]
    answer: Callable[[Tensor], Tensor]
    size: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of every logit."""
        return tuple(self.about["classes"])

    @property
    def input_size(self) -> Shape:
        """Channels, height and width of an image."""
        channels, height, width = self.about["input_size"]
        return channels, height, width

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.answer(images)


def open_exported(storage: Storage, name: str, threads: int = 1) -> Exported:
    """Return an exported student.

    Args:
        storage: The folder of the file.
        name: The file's; its ending says what it is.
        threads: That ONNX Runtime computes with; a ``.pt2`` takes torch's.

    Raises:
        CheckpointError: If there is no such file, it is damaged, or dfkt did not write it.
        ConfigError: If ONNX Runtime is not installed.
    """
    where = f"{storage.path}/{name}"
    if not name.endswith(ENDINGS):
        raise CheckpointError(f"An exported student must end in {' or '.join(ENDINGS)}, but got {where}.")
    with readable(storage):
        data = storage.read(name)
    if data is None:
        raise CheckpointError(f"An exported student must be a file, but there is none at {where}.")
    return open_bytes(data, where, threads)


def open_bytes(data: bytes, where: str, threads: int = 1) -> Exported:
    """Return an exported student from its file's bytes.

    Args:
        data: The bytes.
        where: What messages call them; its ending says what they are.
        threads: As for :func:`open_exported`.

    Raises:
        CheckpointError: As there.
        ConfigError: As there.
    """
    if where.endswith(".pt2"):
        about = _of_pt2(data, where)  # before torch unpacks what may be anybody's
        return Exported(about, _program(data, where), len(data))
    session = _session(data, where, threads)
    found = session.get_modelmeta().custom_metadata_map
    about = _checked(
        {name.removeprefix(_PREFIX): text for name, text in found.items() if name.startswith(_PREFIX)}, where
    )

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return Exported(about, answer, len(data))


def as_input(images: Tensor) -> Tensor:
    """Return uint8 images ``[N, H, W, C]`` as exported students take them: float32 ``[N, C, H, W]`` in 0..1.

    Example:
        >>> as_input(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)).flatten()
        tensor([0.0000, 0.2000, 1.0000])
    """
    return images.permute(0, 3, 1, 2).float().div_(255).contiguous()


def needed(*names: str) -> list[ModuleType]:
    """Import what exported students need beside dfkt's own dependencies.

    Raises:
        ConfigError: If one is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ConfigError(
            f"Exported students need onnx, onnxruntime and onnxscript, but: {one_line(error)}. pip install 'dfkt[export]'"
        ) from error


def as_properties(about: Mapping[str, Any]) -> dict[str, str]:
    """Return a file's entries as the metadata of ONNX has them."""
    return {f"{_PREFIX}{name}": json.dumps(value, ensure_ascii=False) for name, value in about.items()}


def as_extra(about: Mapping[str, Any]) -> dict[str, str]:
    """Return a file's entries as an extra file of a ``.pt2``."""
    return {_EXTRA: json.dumps(as_properties(about))}


def _session(data: bytes, where: str, threads: int) -> Any:
    (runtime,) = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what is wrong is raised, too
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its kinds of errors have no common name
        raise CheckpointError(f"{where} cannot be read as a student in ONNX: {one_line(error)}.") from error


def _of_pt2(data: bytes, where: str) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            texts = [file.read(name) for name in file.namelist() if name.endswith(f"extra/{_EXTRA}")]
        found = json.loads(texts[0]) if texts else {}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read as a student of torch.export: {one_line(error)}.") from error
    return _checked({name.removeprefix(_PREFIX): text for name, text in dict(found).items()}, where)


def _program(data: bytes, where: str) -> Callable[[Tensor], Tensor]:
    try:
        module = torch.export.load(io.BytesIO(data)).module()
    except Exception as error:  # unpacking raises nearly anything
        raise CheckpointError(f"{where} cannot be read as a student of torch.export: {one_line(error)}.") from error

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            logits: Tensor = module(images)
        return logits

    return answer


def _checked(texts: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return what a file says of itself.

    Raises:
        CheckpointError: If that is not what dfkt writes.
    """
    if "format" not in texts:
        raise CheckpointError(
            f"An exported student must be a file of `dfkt export`, but {where} has not what that writes: neither classes nor "
            "normalisation are known. Export the student's folder anew."
        )
    try:
        about = {name: json.loads(text) for name, text in texts.items()}
        if about["format"] != FORMAT:
            raise CheckpointError(
                f"An exported student's format must be {FORMAT}, but {where} has {about['format']!r:.40}. "
                "Use the dfkt that wrote it."
            )
        ok = not set(ENTRIES) - set(about) and len(about["input_size"]) == 3
        ok = ok and all(type(side) is int and side > 0 for side in about["input_size"])
        ok = ok and bool(about["classes"]) and all(isinstance(name, str) for name in about["classes"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be read as an exported student: {one_line(error)}.") from error
    if not ok:
        raise CheckpointError(f"{where} cannot be read as an exported student: what it says of itself is incomplete.")
    return about
