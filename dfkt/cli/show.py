"""``python -m dfkt show``: the tables of a study, or of several side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from dfkt.cli.boundary import say
from dfkt.cli.numbers import whole
from dfkt.config import check_rule
from dfkt.errors import DfktError, StudyError
from dfkt.store.files import Storage, readable
from dfkt.store.study_file import STUDY_FILE
from dfkt.store.study_store import read_study, studies_below

HELP = "print the tables of a study, or of a folder of studies"


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    parser.add_argument("study", help="folder of a study or of several, local or s3://…")
    parser.add_argument(
        "--best", type=whole, help="how many of an arm's best trials to list (default: 5, or 1 of several)"
    )


def run(a: argparse.Namespace) -> int:
    """Print; of several studies those that can be read, and end with what is wrong with the others."""
    from dfkt.analysis.figures import ABOUT_FILE
    from dfkt.analysis.pages import folder_page

    check_rule(a.best is None or a.best >= 1, "best >= 1", best=a.best)
    storage = Storage(a.study)
    with readable(storage):
        one = storage.exists(STUDY_FILE) or storage.exists(ABOUT_FILE)
        if not one and (below := studies_below(storage)):
            _show_all(below, a.best)
        else:
            say(folder_page(storage, a.best))
    return 0


def _show_all(studies: Sequence[Storage], best: int | None) -> None:
    """Print the pages of several studies; a copy goes by its folder's name.

    Raises:
        DfktError: At the end, if some cannot be read.
    """
    from dfkt.analysis.pages import study_page

    pages, faults = [], []
    for place in studies:
        try:
            study = read_study(place, "config")
            pages.append(study_page(replace(study, name=place.split()[1]), best, place))
        except StudyError as error:
            faults.append(str(error))
    if pages:
        say("\n\n\n".join(pages))
    if faults:
        raise DfktError(f"{len(faults)} of {len(studies)} studies cannot be shown: {' '.join(faults)}")
