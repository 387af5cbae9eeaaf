"""``python -m dfkt predict``: what a student says of image files."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from dfkt.cli.boundary import EXIT_FAILED, say
from dfkt.cli.export import find_student
from dfkt.cli.numbers import whole
from dfkt.config import check_rule
from dfkt.data.listing import shown
from dfkt.errors import ConfigError, DfktError, RunError, one_line, tell
from dfkt.store.answers import ENDINGS as TABLES
from dfkt.store.answers import table_bytes
from dfkt.store.files import Storage
from dfkt.students.exported import ENDINGS, Exported, open_exported
from dfkt.students.package import Student, load_student
from dfkt.students.predict import Answer, find_images, predict
from dfkt.training.threads import threads

HELP = "what a student says of image files"


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    parser.add_argument(
        "student",
        metavar="FOLDER|FILE",
        help=f"a student's folder, a study's (its best student), or a file ({', '.join(ENDINGS)}) of `export`",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, and folders of them")
    parser.add_argument("--top", type=whole, default=5, help="classes that are told of each image (default: 5)")
    parser.add_argument("-o", "--out", metavar="FILE", help=f"write them into a table ({', '.join(TABLES)}), too")
    parser.add_argument("--threads", type=whole, default=1, help="CPU threads of the student (default: 1)")


def run(a: argparse.Namespace) -> int:
    """Print, and name what cannot be read; the rest goes on."""
    for name in ("top", "threads"):
        check_rule(getattr(a, name) >= 1, f"{name} >= 1", **{name: getattr(a, name)})
    if a.out is not None:
        check_rule(a.out.endswith(TABLES), f"the table ends in {' or '.join(TABLES)}", out=a.out)
        place, name = Storage(a.out).split()
        check_rule(name not in TABLES, "the table has a name before its ending", out=a.out)
        if place.is_local and not Path(place.path).is_dir():
            raise ConfigError(f"The folder of the table must exist, but {place.path} does not.")
        with _table(a.out, ConfigError):
            place.delete(place.probe())
    paths = find_images(a.images)
    rows, failed = [], 0
    with threads(a.threads):
        for answer in predict(_opened(a.student, a.threads), paths, a.top):
            if answer.error is not None:
                tell(f"failed: {answer.error}")
                failed += 1
                continue
            told = (
                f"{name} {100 * share:.2f} %" for name, share in zip(answer.classes, answer.probabilities, strict=True)
            )
            say("  ".join([shown(answer.path), *told]))
            rows.append(_row(answer))
    if a.out is not None and rows:
        with _table(a.out, RunError):
            place.write(name, table_bytes(pd.DataFrame(rows), Path(name).suffix))
    if failed:
        tell(f"{failed} of {len(paths)} images could not be read")
    return EXIT_FAILED if failed else 0


@contextlib.contextmanager
def _table(out: str, kind: type[DfktError]) -> Iterator[None]:
    """Tell in a line that the table cannot be written."""
    try:
        yield
    except OSError as error:
        raise kind(f"The table must be writable, but {out} is not: {one_line(error)}.") from error


def _opened(text: str, given: int) -> Student | Exported:
    """Return the student of a folder or a file; a folder's computes in float32, as exported ones do."""
    if text.endswith(ENDINGS):
        place, name = Storage(text).split()
        return open_exported(place, name, given)
    return load_student(find_student(Storage(text))[0], "float32")


def _row(answer: Answer) -> dict[str, Any]:
    """Return a row of the table: ``path``, ``class``, ``probability``, ``class_2``, ``probability_2``, …"""
    row: dict[str, Any] = {"path": str(answer.path).encode(errors="backslashreplace").decode()}
    for rank, (name, share) in enumerate(zip(answer.classes, answer.probabilities, strict=True), 1):
        end = "" if rank == 1 else f"_{rank}"
        row |= {f"class{end}": name, f"probability{end}": share}
    return row
