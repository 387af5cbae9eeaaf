"""How far the work is: a line that is written over on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable

from dfkt.training.loop import Record

SECONDS = 60.0
"""Between two lines where there is no terminal."""


class ProgressLine:
    """One line on a terminal that is written over and over; elsewhere a lasting line every minute. Both go to ``stderr``.

    Args:
        clock: Returns seconds; the minutes are counted from when this is made.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.live = sys.stderr.isatty()
        self._clock, self._last, self._shown = clock, clock(), ""

    @property
    def due(self) -> bool:
        """Whether :meth:`show` would show something now."""
        return self.live or self._clock() - self._last >= SECONDS

    def show(self, text: str) -> None:
        """Show a text on the line, cut to the terminal's width; elsewhere only when a minute has passed since the last."""
        if self.live:
            text = text[: _columns() - 1]
            if text != self._shown:
                self._write(f"\r\x1b[K{text}")
                self._shown = text
        elif self.due:
            self._last = self._clock()
            self._write(f"{text}\n")

    def clear(self) -> None:
        """Wipe the line, so that a lasting one can be printed."""
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = ""

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more; the work goes on
            sys.stderr.write(text)
            sys.stderr.flush()


def place(record: Record) -> str:
    """Return where a run's latest record stands: epoch, stage and loss."""
    names = {
        "flow": f"flow stage {record.get('stage')} of round {record.get('round')}",
        "hint": f"hint stage {record.get('stage')}",
    }
    stage = names.get(record["phase"], f"{record['phase']} stage")
    loss = f", loss {record['loss']:.3f}" if record.get("loss") is not None else ""  # a look within an epoch has none
    return f"epoch {record['epoch']:.1f}, {stage}{loss}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
