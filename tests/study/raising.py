"""A user's method whose loss raises."""

from dataclasses import dataclass

from torch import Tensor

from dfkt.methods.base import Features, Method, Schedule, TaskTerm, searched, task_stage
from dfkt.networks.taps import StudentTaps


@dataclass(frozen=True, kw_only=True)
class RaisingTerm(TaskTerm):
    """A loss with a bug."""

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Raise."""
        raise ValueError("a bug\nin the loss")


@dataclass(frozen=True, kw_only=True)
class Raising(Method):
    """Training with that loss."""

    name = "raising"
    losses = ("task",)
    tapped = False
    taught = False
    rate: float = searched(0.1, 0.02, 0.5, log=True)

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one stage."""
        return (task_stage(epochs, self.rate, RaisingTerm()),)
