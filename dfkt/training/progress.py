"""How far a run is, on a terminal."""

from __future__ import annotations

import sys

from dfkt.training.loop import Record


class ProgressLine:
    """One line on a terminal that is written over and over; silent elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def show(self, what: str, record: Record) -> None:
        """Show how far a run is."""
        if self.live:
            names = {
                "flow": f"flow stage {record['stage']} of round {record['round']}",
                "hint": f"hint stage {record['stage']}",
            }
            place = names.get(record["phase"], f"{record['phase']} stage")
            text = f"{what}: epoch {record['epoch']:.1f}, {place}, loss {record['loss']:.3f}"
            sys.stderr.write(f"\r\x1b[K{text[:110]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Wipe the line, so that a lasting one can be printed."""
        if self.live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
