"""``python -m dfkt export``: a student as a file that runs without dfkt."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkt.cli.boundary import say
from dfkt.cli.cost import Contender, Measuring, best_package, exported
from dfkt.cli.numbers import number, whole
from dfkt.cli.options import absolute_path
from dfkt.config import KNOWN_SETS, DataConfig, Placement, check_rule, from_dict
from dfkt.data.image_set import ImageSet, Split
from dfkt.data.load import load_data, load_test
from dfkt.data.mapped import Rows
from dfkt.errors import ConfigError, DataError, is_full, one_line, storage_error
from dfkt.store.files import Storage, readable
from dfkt.store.study_file import STUDY_FILE
from dfkt.students.cost import Cost, count
from dfkt.students.export import (
    CALIBRATION,
    about,
    accuracy,
    check_free,
    compare,
    onnx_bytes,
    to_int8,
    to_onnx,
    to_pt2,
)
from dfkt.students.exported import EXPORTS, as_input, open_bytes
from dfkt.students.package import Student, load_student
from dfkt.training.threads import threads

HELP = "a student as a file that runs without dfkt: ONNX, ONNX in 8 bits, or a program of torch.export"
_BATCH = 64


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    parser.add_argument("folder", metavar="FOLDER", help="a student's folder, or a study's: its best student")
    parser.add_argument("--to", choices=[*EXPORTS], required=True, help="int8 is calibrated on training images")
    names = ", ".join(EXPORTS.values())
    parser.add_argument("-o", "--out", metavar="FILE", help=f"the file (default: in the student's folder, {names})")
    group = parser.add_argument_group("images, for int8")
    group.add_argument(
        "--data", help="the images that it was trained on: a set's name, or a folder (default: as trained)"
    )
    group.add_argument("--data-root", help=f"where torchvision's sets are kept (default: {Placement.data_root})")
    group = parser.add_argument_group("measuring, on the CPU")
    group.add_argument(
        "--seconds", type=number, default=2.0, help="for each network and batch size (default: 2); 0 measures no time"
    )
    group.add_argument("--threads", type=whole, default=1, help="CPU threads (default: 1)")


def run(a: argparse.Namespace) -> int:
    """Export, compare, measure, print."""
    from dfkt.analysis.tables import column_notes, cost_cells, text_table

    check_rule(a.seconds >= 0, "seconds >= 0", seconds=a.seconds)
    check_rule(a.threads >= 1, "threads >= 1", threads=a.threads)
    measuring = Measuring(a.seconds, a.threads, torch.device("cpu"), "float32")
    package, trained_on, root = find_student(Storage(a.folder))
    student = load_student(package, "float32")
    place, name = _target(a.out, package, EXPORTS[a.to])
    check_free(place, name)
    with threads(a.threads):
        images = _images(a, student, trained_on, root) if a.to == "int8" else None
        data, rows, said = _made(student, a.to, name, images, a.threads)
        try:
            place.write(name, data)
        except OSError as error:
            if is_full(error):
                raise storage_error(error, place.path) from error
            raise ConfigError(
                f"{place.path} must be writable, but is not: {one_line(error)}. Name a file with -o."
            ) from error
    table = cost_cells(measuring.costs(rows))
    say(f"{text_table(table)}\n\n{column_notes(['MACs'])}")
    if measuring.seconds:
        say(measuring.describe())
    say(f"{place.path}/{name}: {said}.")
    return 0


def find_student(storage: Storage) -> tuple[Storage, dict[str, Any] | None, str | None]:
    """Return the folder of a student that a folder stands for, what a study says of its images, and where sets lay.

    Args:
        storage: A student's folder, or that of a study, whose best student is taken.

    Raises:
        InputError: If the study has none yet, or is damaged.
    """
    with readable(storage):
        if not storage.exists(STUDY_FILE):
            return storage, None, None
    package, study = best_package(storage)
    last = (study.meta.get("sessions") or [{}])[-1]
    return package, study.meta["config"]["data"], (last.get("placement") or {}).get("data_root")


def _target(out: str | None, package: Storage, usual: str) -> tuple[Storage, str]:
    """Return folder and name of the file that is written."""
    if out is None:
        return package, usual
    place, name = Storage(out).split()
    ending = Path(usual).suffix
    check_rule(name.endswith(ending), f"the file ends in {ending}", out=out)
    return place, name


def _images(
    a: argparse.Namespace, student: Student, trained_on: Mapping[str, Any] | None, noted: str | None
) -> tuple[ImageSet, Split]:
    """Return the images that a student was trained on, and those that test it, resized to what it takes.

    Sets lie where the command says, else where they lay when the study went on last.

    Raises:
        DataError: If they are not there, or others.
    """
    known = dict(trained_on or student.config["dfkt"]["data"])
    known.pop("title", None)
    config = replace(from_dict(DataConfig, known), image_size=student.input_size[1])
    if a.data is not None:
        config = replace(config, name=a.data if a.data in KNOWN_SETS else absolute_path(a.data) or a.data)
    root = absolute_path(a.data_root) or noted or Placement.data_root
    try:
        data = load_data(config, root)
        if (data.classes, data.shape) != (student.classes, student.input_size):
            raise DataError(
                f"`classes` and `input_size` must be the student's, {len(student.classes)} and {list(student.input_size)}, "
                f"but {data.title} has {_differing(data, student)}."
            )
        return data, load_test(config, root, data)
    except DataError as error:
        raise DataError(
            f"int8 is calibrated on the student's training images. {error} --data names them, --data-root where sets lie."
        ) from error


def _differing(data: ImageSet, student: Student) -> str:
    if data.shape != student.input_size:
        return str(list(data.shape))
    others = [name for name in data.classes if name not in student.classes]
    return f"{len(data.classes)} classes" + (f", such as {others[0]!r}" if others else "")


def _made(
    student: Student, kind: str, name: str, images: tuple[ImageSet, Split] | None, given: int
) -> tuple[bytes, list[Contender], str]:
    """Return a file's bytes, what is measured, and what is known of the file.

    Args:
        student: Who is exported.
        kind: To what.
        name: The file's.
        images: For ``int8``: those that it was trained on, and those that test it.
        given: CPU threads.
    """
    own = student.config["dfkt"]
    counts = count(student.network, student.input_size)
    cost = Cost(f"student {own['network']['name']}", counts.parameters, counts.macs, own["bytes"], own["test_accuracy"])
    row = Contender(student.network, student.input_size, cost)
    if images is not None:
        return _quantised(student, row, name, images, given)
    data = to_pt2(student) if kind == "pt2" else onnx_bytes(to_onnx(student), about(student, kind))
    off = compare(student, data, name)
    return data, [row, exported(open_bytes(data, name, given), name)], f"its logits are the student's within {off:.1g}"


def _quantised(
    student: Student, row: Contender, name: str, images: tuple[ImageSet, Split], given: int
) -> tuple[bytes, list[Contender], str]:
    """Return the same of a student in 8 bits, tested beside the student itself and its ONNX of 32 bits."""
    (train, test), model = images, to_onnx(student)
    plain = onnx_bytes(model, about(student, "onnx"))
    compare(student, plain, name)
    model = to_int8(model, _spread(train.train, CALIBRATION))
    data = onnx_bytes(model, about(student, "int8"))
    rows = [row]
    for label, made in (("the same in ONNX", plain), (name, data)):
        rows.append(exported(open_bytes(made, name, given), label))
    tests = [accuracy(one, _batches(test)) for one in (student, *(one.network for one in rows[1:]))]
    rows = [replace(one, cost=replace(one.cost, test_accuracy=share)) for one, share in zip(rows, tests, strict=True)]
    used = min(CALIBRATION, len(train.train))
    said = f"calibrated on {used} training images; accuracies of {len(test)} test images"
    return onnx_bytes(model, about(student, "int8", tests[-1])), rows, said


def _spread(split: Split, most: int) -> Tensor:
    """Return some images from all over a split, as exported students take them."""
    chosen = torch.linspace(0, len(split) - 1, min(most, len(split))).long()
    images = split.images
    return as_input(Rows(images.array, images.rows[chosen]).read() if isinstance(images, Rows) else images[chosen])


def _batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in zip(split.images.split(_BATCH), split.labels.split(_BATCH), strict=True):
        yield as_input(images), labels
