"""Switches of tiny runs, and command lines read without running what they ask for."""

import argparse
from pathlib import Path
from types import ModuleType

from conftest import write_image

from dfkt.cli import distill, study
from dfkt.study.config import StudyConfig
from dfkt.training.config import RunConfig

TINY = [
    *("--data", "digits", "--limit-train", "300", "--limit-test", "60", "--batch-size", "64"),
    *("--teacher", "resnet8", "--teacher-width", "0.5", "--student-width", "0.25", "--teacher-epochs", "1"),
]
OWN_METHOD = """
from dataclasses import dataclass
from dfkt import Method, searched, task_stage

@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    name = "plain"
    taught = False
    tapped = False
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    depth: int | None = None

    def schedule(self, epochs, taps):
        return (task_stage(epochs, self.rate),)
"""
OWN_NETWORKS = """
from torch import nn

def small(num_classes, in_channels):
    parts = nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(*parts)
"""


def parsed(module: ModuleType, *argv: str) -> argparse.Namespace:
    """Return what a command's module reads from its switches."""
    parser = argparse.ArgumentParser()
    module.add_switches(parser)
    return parser.parse_args(argv)


def study_of(config: StudyConfig, *argv: str) -> StudyConfig:
    """Return the study that ``python -m dfkt study``, or a script, makes of a configuration."""
    return study.study_config(config, parsed(study, *argv))


def run_of(*argv: str) -> RunConfig:
    """Return the run that ``python -m dfkt distill`` makes of its switches."""
    a = parsed(distill, *argv)
    return distill.distill_config(a, distill.find_trial(a.trial) if a.trial else None)


def make_folder(root: Path, classes: str) -> None:
    """Write an image folder with four images of every class."""
    for name in classes:
        for k in range(4):
            write_image(root / name / f"{k}.png", mode="L", seed=k)
