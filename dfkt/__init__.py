"""Densely distilled flow-based knowledge transfer, as a Ray-distributed hyperparameter study."""

from dfkt.config import (
    DataConfig,
    FlowConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    StudyConfig,
    TaskConfig,
    TeacherConfig,
    TrainConfig,
)
from dfkt.methods.flow import flow_loss, fsp_matrix
from dfkt.methods.patterns import flow_pairs
from dfkt.store.study_store import Study, read_study

__all__ = [
    "DataConfig",
    "FlowConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "RunConfig",
    "Study",
    "StudyConfig",
    "TaskConfig",
    "TeacherConfig",
    "TrainConfig",
    "flow_loss",
    "flow_pairs",
    "fsp_matrix",
    "read_study",
]
