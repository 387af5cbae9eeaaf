"""Training from scratch: what every method is held against."""

from __future__ import annotations

from dataclasses import dataclass

from dfkt.methods.base import Method, Schedule, searched, task_stage
from dfkt.networks.taps import StudentTaps


@dataclass(frozen=True, kw_only=True)
class Scratch(Method):
    """Cross-entropy with the labels; no teacher."""

    name = "scratch"
    taught = False
    tapped = False
    rate: float = searched(0.1, 0.02, 0.5, log=True)

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one task stage."""
        return (task_stage(epochs, self.rate),)
