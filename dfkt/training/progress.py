"""How far the work is: bars on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from dfkt.training.loop import Record

SECONDS = 60.0
"""Between two lines where there is no terminal."""
LOOKS = 0.1
"""Seconds between two looks of a bar: many runs report many times a second."""
PARTS = 12
"""Bars at most under that of the whole."""


@dataclass(frozen=True)
class Bar:
    """How far something is.

    Args:
        name: What.
        done: Of it.
        total: All of it.
        unit: Behind the two numbers: ``runs done``; ``epochs``.
        text: What else is to be said of it.
    """

    name: str
    done: float
    total: float
    unit: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.said}"

    @property
    def said(self) -> str:
        """Its numbers, and what else is to be said."""
        done, total = (f"{value:.1f}".removesuffix(".0") for value in (self.done, self.total))
        return f"{done}/{total} {self.unit}{f', {self.text}' if self.text else ''}"


class Progress:
    """Bars on a terminal, that of the whole work and under it those of its parts; elsewhere a lasting line every minute.

    Both go to ``stderr``.

    Args:
        clock: Returns seconds; the minutes are counted from when this is made.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.live = sys.stderr.isatty()
        self._clock, self._last = clock, clock() if not self.live else float("-inf")
        self._bars: dict[str, _Drawn] = {}

    @property
    def due(self) -> bool:
        """Whether :meth:`show` would show something now."""
        return self._clock() - self._last >= (LOOKS if self.live else SECONDS)

    def show(self, whole: Bar, parts: Sequence[Bar] = ()) -> None:
        """Show how far everything is, if it is time for that."""
        if not self.due:
            return
        self._last = self._clock()
        if not self.live:
            STDERR.write(f"{whole}\n")
            return
        shown = [whole, *parts[:PARTS]]
        for name in self._bars.keys() - {bar.name for bar in shown}:
            self._bars.pop(name).close()
        for bar in shown:
            if bar.name not in self._bars:
                self._bars[bar.name] = _Drawn(file=STDERR, leave=False, dynamic_ncols=True, bar_format="{desc}")
            self._bars[bar.name].draw(bar)

    def clear(self) -> None:
        """Wipe the bars, so that a lasting line can be printed; the next :meth:`show` draws them again."""
        for bar in self._bars.values():
            bar.clear()

    def close(self) -> None:
        """Wipe the bars for good."""
        while self._bars:
            self._bars.popitem()[1].close()


class _Drawn(tqdm):
    """A bar on the terminal."""

    monitor_interval = 0  # no thread that draws what has not changed

    def __del__(self) -> None:
        """Write nothing: who drew it wipes it, and the terminal may be another's by now."""

    def draw(self, bar: Bar) -> None:
        """Draw it as it is now."""
        self.n, self.total = min(bar.done, bar.total), bar.total
        name, said = (text.replace("{", "{{").replace("}", "}}") for text in (bar.name, bar.said))
        self.bar_format = f"{name} {{percentage:3.0f}}% |{{bar:20}}| {said}"
        self.refresh()


_Drawn.set_lock(threading.RLock())  # its own would be one for many processes, with a process that watches it


class _StderrNow:
    """``sys.stderr``, whichever it is at the time; nobody need read it any more, the work goes on."""

    @staticmethod
    def write(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()

    @staticmethod
    def flush() -> None:
        """Do nothing: every write is flushed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


STDERR = _StderrNow()


def run_bar(name: str, record: Record, epochs: float) -> Bar:
    """Return how far a run is by its latest record: epochs, stage and loss."""
    names = {
        "flow": f"flow stage {record.get('stage')} of round {record.get('round')}",
        "hint": f"hint stage {record.get('stage')}",
    }
    stage = names.get(record["phase"], f"{record['phase']} stage")
    loss = f", loss {record['loss']:.3f}" if record.get("loss") is not None else ""  # a look within an epoch has none
    return Bar(name, record["epoch"], epochs, "epochs", f"{stage}{loss}")
