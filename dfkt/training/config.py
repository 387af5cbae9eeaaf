"""What one training run of a student depends on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from dfkt.config import DataConfig, NetworkConfig, Precision, TeacherConfig, TrainConfig, config_key
from dfkt.methods.base import Method
from dfkt.methods.dfkt import Dfkt

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that one training run of a student depends on, and nothing else."""

    method: Method = field(default_factory=Dfkt)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def key(self) -> str:
        """12 hexadecimal digits that name the run by content; a method that reads no teacher does not depend on it."""
        return config_key(self if self.method.taught else replace(self, teacher=TeacherConfig()))


def with_precision(config: T, ours: Precision, teacher: Precision) -> T:
    """Return a study or a run with the precision of its networks and of its teacher's training, where that is left to choose."""
    given: Any = config
    if given.train.precision == "auto":
        given = replace(given, train=replace(given.train, precision=ours))
    if given.teacher.train.precision == "auto":
        train = replace(given.teacher.train, precision=teacher)
        given = replace(given, teacher=replace(given.teacher, train=train))
    return cast(T, given)
