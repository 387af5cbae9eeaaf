"""A study of seconds that really trains: of digits, three arms, eleven runs."""

from __future__ import annotations

from pathlib import Path

from faults.command import Command

SWITCHES = (
    "--data digits --limit-train 600 --limit-test 60 --teacher resnet8 --teacher-width 0.5 --teacher-epochs 1 "
    "--student-width 0.25 --epochs 6 --batch-size 64 --trials 3 --confirm 2 --seeds 2 --baselines scratch,kd "
    "--no-early-stopping --gpus-per-worker 0 --max-failures 20 --wait 0.2"
)
BEGINS = r"\d+ runs to do"
"""The line behind which runs are trained."""
FOREIGN_LINES = r"Traceback|\(raylet|\*\*\* SIG|\[20\d\d-.* [CEF] "
"""What Python, Ray's daemons and its C++ parts print of an error; no line of it is for the user."""


class SmallStudy:
    """One study, with a teacher and kept targets of its own.

    Args:
        place: A folder for all of it; created.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.folder, self.log = place, place / "s", place / "lines.txt"
        place.mkdir(parents=True)

    def begin(self, *more: str, log: Path | None = None) -> Command:
        """Give the command that begins the study, or goes on with it; ``more`` are further switches."""
        places = f"--results {self.place} --teacher-root {self.place}/teachers --target-root {self.place}/targets"
        given = ["study", "--name", "s", *places.split(), *SWITCHES.split(), *more]
        return Command(given, log or self.log, self.place / "home")

    def resume(self) -> Command:
        """Go on with the study by what its folder says."""
        return Command(["resume", str(self.folder)], self.log, self.place / "home")
