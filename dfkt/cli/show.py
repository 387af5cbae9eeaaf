"""``python -m dfkt show``: the tables of a study, or of several side by side."""

from __future__ import annotations

import argparse

from dfkt.cli.boundary import say
from dfkt.cli.numbers import whole
from dfkt.config import check_rule

HELP = "print the tables of a study, or of a folder of studies"


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    parser.add_argument("study", help="folder of a study or of several, local or s3://…")
    parser.add_argument(
        "--best", type=whole, help="how many of an arm's best trials to list (default: 5, or 1 of several)"
    )


def run(a: argparse.Namespace) -> int:
    """Print."""
    from dfkt.analysis.pages import folder_page

    check_rule(a.best is None or a.best >= 1, "best >= 1", best=a.best)
    say(folder_page(a.study, a.best))
    return 0
