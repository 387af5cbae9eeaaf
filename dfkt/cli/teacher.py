"""``python -m dfkt teacher``: train a teacher, or find the one trained before."""

from __future__ import annotations

import argparse
from dataclasses import replace

from dfkt.cli.boundary import say
from dfkt.cli.options import (
    add_cuda_graphs,
    add_data,
    add_device,
    add_networks,
    add_training,
    read_placement,
    with_data,
    with_teacher,
)
from dfkt.config import DataConfig, TeacherConfig

HELP = "train a teacher, or find the one trained before"


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    add_data(parser)
    add_networks(parser, student=False)
    add_training(parser, student=False)
    add_cuda_graphs(add_device(parser))


def run(a: argparse.Namespace) -> int:
    """Train or find."""
    from dfkt.data.load import check_test
    from dfkt.training.cached import images_for
    from dfkt.training.optim import decided
    from dfkt.training.teacher import find_teacher

    config, data, placement = with_teacher(TeacherConfig(), a), with_data(DataConfig(), a), read_placement(a)
    chosen = decided(config.train.precision, placement.device)
    config = replace(config, train=replace(config.train, precision=chosen))
    images = images_for(data, placement)
    check_test(data, placement.data_root, images)
    find_teacher(config, images, placement, say)
    return 0
