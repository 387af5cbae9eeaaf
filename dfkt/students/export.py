"""A student as a file that runs without dfkt: ONNX, whole or in 8 bits, or a program of torch.export.

What each takes, gives and says of itself: :mod:`dfkt.students.exported`. Each is compared with the student before anyone gets it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkt.errors import CheckpointError, ConfigError, NetworkError, RunError, one_line
from dfkt.store.files import Storage, readable
from dfkt.store.origin import package_version
from dfkt.students.exported import ENTRIES, FORMAT, as_extra, as_properties, needed, open_bytes
from dfkt.students.package import Student

OPSET = 20
TOLERANCE = 1e-4
"""Largest difference to the student's logits, of logits that are 1 or smaller; a share of larger ones."""
BATCHES = (1, 5)
"""Images at a time with which a file is compared."""
CALIBRATION = 256
"""Training images from which the ranges of 8-bit activations are taken."""
_BATCH = 32
_INPUT = "images: float32 [N, C, H, W] in 0..1, normalised inside"


def about(student: Student, kind: str, test_accuracy: float | None = None) -> dict[str, Any]:
    """Return what an exported file says of itself (:data:`~dfkt.students.exported.ENTRIES`).

    Args:
        student: Who is exported.
        kind: ``onnx``, ``int8`` or ``pt2``.
        test_accuracy: The file's own.
    """
    config = student.config
    own, given = config["dfkt"], config["pretrained_cfg"]
    found: dict[str, Any] = {"format": FORMAT, "version": package_version("dfkt"), "kind": kind, "input": _INPUT}
    found |= {"network": own["network"], "classes": list(student.classes), "input_size": list(student.input_size)}
    found |= {"mean": given["mean"], "std": given["std"], "weights": own["weights"], "test_accuracy": test_accuracy}
    return {name: found[name] for name in ENTRIES}


def to_onnx(student: Student) -> Any:
    """Return a student as a checked ``onnx.ModelProto`` that says nothing of itself yet.

    Raises:
        NetworkError: If an operator has no form in ONNX, or Python decides by the values of images what is computed.
        ConfigError: If what that needs is not installed.
    """
    onnx, _ = needed("onnx", "onnxscript")
    program = _traced(student)
    with _quiet():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
        except Exception as error:  # of a kind that torch keeps to itself
            raise _unexportable(student, error) from error
    model = made.model_proto  # type: ignore[union-attr]
    for node in model.graph.node:
        del node.metadata_props[:]  # where in the sources each came from
    onnx.checker.check_model(model, full_check=True)
    return model


def to_int8(model: Any, images: Tensor) -> Any:
    """Return a student in 8 bits: weights per channel, activations by the ranges that some images give (QDQ).

    The normalisation stays as it is.

    Args:
        model: As :func:`to_onnx` returns it.
        images: Training images ``[N, C, H, W]``, float32 in 0..1.

    Raises:
        NetworkError: If ONNX Runtime cannot do that.
    """
    onnx, quantization = needed("onnx", "onnxruntime.quantization")
    (preparing,) = needed("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.batches = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory(prefix="dfkt-") as folder, _quiet():
        prepared, made = Path(folder, "prepared.onnx"), Path(folder, "made.onnx")
        try:
            preparing.quant_pre_process(model, prepared)
            quantization.quantize_static(
                prepared, made, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                nodes_to_exclude=_normalising(onnx.load(prepared)),
            )  # fmt: skip
        except Exception as error:
            raise NetworkError(f"ONNX Runtime must quantise the student, but cannot: {one_line(error)}.") from error
        found = onnx.load(made)
    onnx.checker.check_model(found, full_check=True)
    return found


def onnx_bytes(model: Any, says: Mapping[str, Any]) -> bytes:
    """Return an ``onnx.ModelProto`` as a file that says something of itself."""
    (helper,) = needed("onnx.helper")
    helper.set_model_props(model, as_properties(says))
    return bytes(model.SerializeToString())


def to_pt2(student: Student) -> bytes:
    """Return a student as a file of ``torch.export``; it computes on the CPU.

    Raises:
        NetworkError: If Python decides by the values of images what is computed.
    """
    stream = io.BytesIO()
    with _quiet():
        torch.export.save(_traced(student), stream, extra_files=as_extra(about(student, "pt2")))
    return stream.getvalue()


def compare(student: Student, data: bytes, where: str) -> float:
    """Return the largest difference between a file's logits and the student's.

    Args:
        student: In float32.
        data: The file.
        where: Its name.

    Raises:
        RunError: If it is more than :data:`TOLERANCE`.
    """
    found, largest = open_bytes(data, where), 0.0
    for batch in BATCHES:
        images = torch.rand(batch, *student.input_size, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            wanted, got = student(images), found(images)
        off = float((got - wanted).abs().max())
        if not off <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise RunError(f"An exported student must give the student's logits, but {where} is off by {off:.3g}.")
        largest = max(largest, off)
    return largest


def accuracy(student: Callable[[Tensor], Tensor], images: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Return the share of images whose class is found.

    Args:
        student: Who answers.
        images: Batches ``[B, C, H, W]``, float32 in 0..1, and their labels.
    """
    right = count = 0
    with torch.inference_mode():
        for batch, labels in images:
            right += int((student(batch).argmax(1) == labels).sum())
            count += len(labels)
    return right / count


def check_free(storage: Storage, name: str) -> None:
    """Refuse a place where a file lies that dfkt did not write.

    Raises:
        ConfigError: If so, or the folder is none.
    """
    if storage.is_local and not Path(storage.path).is_dir():
        raise ConfigError(f"The folder of an exported student must exist, but {storage.path} does not.")
    with readable(storage):
        before = storage.read(name)
    if before is not None:
        try:
            open_bytes(before, f"{storage.path}/{name}")
        except CheckpointError as error:
            raise ConfigError(
                f"An exported student replaces none but its like, but {storage.path}/{name} is something else. "
                "Move it away, or take another name with -o."
            ) from error


def _traced(student: Student) -> Any:
    """Return a student as a program for any number of images, without where its lines came from."""
    images = torch.rand(2, *student.input_size)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(student, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        except Exception as error:  # a user's network may do anything
            raise _unexportable(student, error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _unexportable(student: Student, error: Exception) -> NetworkError:
    name = student.config["dfkt"]["network"]["name"]
    chain: BaseException | None = error
    while chain is not None:
        if found := re.search(r"<OpOverload\(op='([\w.]+)'", str(chain)):
            return NetworkError(
                f"A student in ONNX must do what ONNX can, but {name} uses {found[1]}, which it has not."
            )
        chain = chain.__cause__
    return NetworkError(f"A student that is exported must be one program, but {name} is not: {one_line(error)}.")


def _normalising(model: Any) -> list[str]:
    """Return the names of the nodes between the images and the first that is more than a product or a sum."""
    found: list[str] = []
    value = "images"
    while True:
        after = [node for node in model.graph.node if value in node.input]
        if len(after) != 1 or after[0].op_type not in ("Mul", "Add", "Sub", "Div", "Cast"):
            return found
        found.append(after[0].name)
        value = after[0].output[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the user what torch and ONNX Runtime say of themselves while they work."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
