"""Densely distilled flow-based knowledge transfer, as a Ray-distributed hyperparameter study."""

from dfkt.config import DataConfig, NetworkConfig, OptimizerConfig, Placement, TeacherConfig, TrainConfig
from dfkt.methods.base import Features, Method, Ramp, Schedule, Stage, TaskTerm, Term, searched, task_stage
from dfkt.methods.flow import FlowLoss, flow_loss
from dfkt.methods.maps import MapTerm
from dfkt.methods.matrices import fsp_matrices, fsp_matrix
from dfkt.methods.patterns import flow_pairs
from dfkt.methods.registry import METHODS, find_method
from dfkt.methods.space import Draw, Range, Space
from dfkt.networks.taps import StudentTaps
from dfkt.store.study_store import Study, read_study
from dfkt.students.package import Student, load_student
from dfkt.study.config import ArmConfig, StudyConfig, ablations, default_arms
from dfkt.training.config import RunConfig

__all__ = [
    "METHODS",
    "ArmConfig",
    "DataConfig",
    "Draw",
    "Features",
    "FlowLoss",
    "MapTerm",
    "Method",
    "NetworkConfig",
    "OptimizerConfig",
    "Placement",
    "Ramp",
    "Range",
    "RunConfig",
    "Schedule",
    "Space",
    "Stage",
    "Student",
    "StudentTaps",
    "Study",
    "StudyConfig",
    "TaskTerm",
    "TeacherConfig",
    "Term",
    "TrainConfig",
    "ablations",
    "default_arms",
    "find_method",
    "flow_loss",
    "flow_pairs",
    "fsp_matrices",
    "fsp_matrix",
    "load_student",
    "read_study",
    "searched",
    "task_stage",
]
