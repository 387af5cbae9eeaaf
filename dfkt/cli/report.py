"""``python -m dfkt report``: one HTML page that says what studies gained, and needs no network."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dfkt.cli.boundary import say
from dfkt.cli.cost import Measuring, add_measuring, of_study
from dfkt.errors import ConfigError, DfktError, InputError, StudyError
from dfkt.store.files import Storage, readable
from dfkt.store.origin import package_version
from dfkt.store.study_file import STUDY_FILE
from dfkt.store.study_store import Study, read_study, studies_below

if TYPE_CHECKING:
    from dfkt.analysis.report import Part

HELP = "write one HTML page of a study, or of several: verdict, figures, what was searched; it needs no network"
ENDING = ".html"
HEAD = 4096
"""Bytes of a file by which it is told whose it is."""


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    parser.add_argument("studies", nargs="+", metavar="FOLDER", help="of a study or of several, local or s3://…")
    parser.add_argument(
        "-o", "--out", metavar="PAGE.html", help="where to (default: the folder's name in the working directory)"
    )
    add_measuring(parser)


def run(a: argparse.Namespace) -> int:
    """Read, measure, write; what of several studies cannot be read stands on the page, and is told at the end."""
    from dfkt.analysis.html import check_plotly
    from dfkt.analysis.report import report

    out = _place(a.out, a.studies)
    check_plotly()
    measuring = Measuring.of(a)
    places = [place for text in a.studies for place in _studies(text)]
    read = [_read(place) for place in places]
    faults = [found for found in read if isinstance(found, StudyError)]
    if len(faults) == len(places):
        raise faults[0]
    now = datetime.now(UTC)
    parts = [_part(*one, measuring, now) for one in zip(_titles(places, read), places, read, strict=True)]
    text = report(parts, now, str(package_version("dfkt"))).encode()
    _write(out, text)
    say(f"{out}: {len(places)} {'study' if len(places) == 1 else 'studies'}, {len(text) / 1e6:.1f} MB")
    if faults:
        raise DfktError(f"{len(faults)} of {len(places)} studies cannot be read: {' '.join(map(str, faults))}")
    return 0


def _place(out: str | None, studies: Sequence[str]) -> Path:
    """Return where the page goes.

    Raises:
        ConfigError: If that is no place for a page, or holds a file that is none of ours.
    """
    from dfkt.analysis.html import is_ours

    if out is None:
        if len(studies) > 1:
            raise ConfigError("A page of several folders needs a name. Give it with -o PAGE.html.")
        out = f"{Storage(studies[0]).split()[1] or 'report'}{ENDING}"
    path = Path(os.path.expanduser(out))
    if path.suffix != ENDING or path.name == ENDING:
        raise ConfigError(f"A page's name must end with {ENDING}, but got {out!r}.")
    if not path.parent.is_dir():
        raise ConfigError(f"A page's folder must exist, but {path.parent} does not.")
    if os.path.lexists(path):
        try:
            with open(path, "rb") as file:
                head = file.read(HEAD).decode(errors="replace")
        except OSError as error:
            raise ConfigError(f"{out} cannot be replaced: {error.strerror}. Take another -o.") from error
        if not is_ours(head):
            raise ConfigError(f"{out} was not written by this command, so it stays. Take another -o, or move it away.")
    return path


def _studies(text: str) -> list[Storage]:
    """Return the study in a folder, or those below it.

    Raises:
        StudyError: If there is none.
    """
    storage = Storage(text)
    with readable(storage):
        found = [storage] if storage.exists(STUDY_FILE) else studies_below(storage)
    if not found:
        raise StudyError(
            f"A folder that is reported on must hold a study ({STUDY_FILE}) or several below it, but {storage.path} holds none."
        )
    return found


def _read(place: Storage) -> Study | StudyError:
    try:
        return read_study(place, "config")
    except StudyError as error:
        return error


def _titles(places: Sequence[Storage], read: Sequence[Study | StudyError]) -> list[str]:
    """Return what the page calls the studies: their names, or their folders' where two have one name."""
    names = [
        place.split()[1] if isinstance(found, StudyError) else found.name
        for place, found in zip(places, read, strict=True)
    ]
    counts = Counter(names)
    return [name if counts[name] == 1 else place.path for name, place in zip(names, places, strict=True)]


def _part(title: str, place: Storage, read: Study | StudyError, measuring: Measuring, now: datetime) -> Part:
    """Return what the page says of a study; time is measured where it is over and its best student is there."""
    from dfkt.analysis.progress import progress
    from dfkt.analysis.report import Part

    if isinstance(read, StudyError):
        return Part(title, place, fault=str(read))
    if not measuring.seconds:
        return Part(title, place, read)
    if not progress(read, now).over:
        why = "No time was measured, since the study is not over: its runs would share the processors."
        return Part(title, place, read, timing=why)
    try:
        return Part(
            title, place, read, costs=measuring.costs(of_study(place, measuring.threads)), timing=measuring.describe()
        )
    except InputError as error:
        return Part(title, place, read, timing=f"No time was measured: {error}")


def _write(out: Path, text: bytes) -> None:
    """Replace the page as a whole."""
    try:
        Storage(out.parent).write(out.name, text)
    except OSError as error:
        raise DfktError(f"{out} cannot be written: {error.strerror}.") from error
