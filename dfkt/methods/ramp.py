"""A weight that changes over a stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """A weight that changes linearly over the first part of a stage, and then stays.

    Example:
        >>> [Ramp(4, 1).at(done) for done in (0, 0.5, 1)]
        [4.0, 2.5, 1.0]
    """

    start: float
    end: float
    until: float = 1.0
    """Share of the stage after which it stays."""

    def at(self, done: float) -> float:
        """Return the weight when a share of the stage is done."""
        return self.start + (self.end - self.start) * (min(done / self.until, 1.0) if self.until else 1.0)

    def __str__(self) -> str:
        text = f"{self.start:.3g}->{self.end:.3g}"
        return text if self.until == 1 else f"{text} in {self.until:.3g} of it"
