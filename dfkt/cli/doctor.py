"""``python -m dfkt doctor``: what a study would stumble over, on this machine or on a cluster's."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from dfkt.cli.boundary import EXIT_FAILED, say
from dfkt.cli.options import absolute_path
from dfkt.config import KNOWN_SETS
from dfkt.errors import ConfigError, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dfkt.study.findings import Finding

HELP = "find what a study would stumble over, on this machine or on all of a cluster's"


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="descriptions of clusters (cluster.yaml): are they filled in? Nothing else",
    )
    parser.add_argument(
        "--results", default="results", help="folder that shall hold studies, local or s3://… (default: results)"
    )
    parser.add_argument("--data", help="images that all machines shall see: a set's name, or a folder")
    parser.add_argument("--data-root", help="where torchvision's sets are kept (default: ~/.cache/dfkt/data)")
    parser.add_argument("--address", help="Ray cluster to ask (default: RAY_ADDRESS, or the one of this machine)")


def run(a: argparse.Namespace) -> int:
    """Look, and say what was found; 1 if a study would fail."""
    began = time.monotonic()
    if a.files:
        return _tell(_read_files(a.files), f"{', '.join(a.files)}: ")
    from dfkt.study.doctor import look

    data = a.data if a.data in KNOWN_SETS else absolute_path(a.data)
    report = look(a.results, data, data_root=absolute_path(a.data_root), address=a.address)
    many = f"{report.asked} machine{'s' * (report.asked != 1)} asked in {time.monotonic() - began:.0f} s: "
    return _tell(report.findings, many)


def _tell(findings: Sequence[Finding], asked: str) -> int:
    failing = sum(finding.fails for finding in findings)
    for finding in findings:
        say(finding.describe())
    counts = [(failing, "that fail", "that fails"), (len(findings) - failing, "to know of", "to know of")]
    found = " and ".join(f"{n} finding{'s' * (n > 1)} {many if n > 1 else one}" for n, many, one in counts if n)
    say(f"{asked}{found or 'nothing found'}")
    return EXIT_FAILED if failing else 0


def _read_files(names: Sequence[str]) -> list[Finding]:
    """Return what descriptions of clusters leave to the user.

    Raises:
        ConfigError: If one cannot be read.
    """
    from dfkt.study.findings import find_marks

    found: list[Finding] = []
    for name in names:
        try:
            with open(name, encoding="utf-8") as file:
                found += find_marks(name, file.read())
        except (OSError, ValueError) as error:
            raise ConfigError(f"A cluster's file must be readable, but {name} is not: {one_line(error)}.") from error
    return found
