"""The normalisation by which a teacher's weights were trained, where it is not the image set's."""

from __future__ import annotations

import torch
from torch import nn

from dfkt.config import Precision, TeacherConfig, check_rule
from dfkt.data.image_set import ImageSet
from dfkt.networks.tapped import Renormalise
from dfkt.training.optim import network_dtype
from dfkt.training.pretrained import own_normalisation


def renormalise(config: TeacherConfig, data: ImageSet, precision: Precision) -> Renormalise | None:
    """Return what makes a set's images those that a user's teacher was trained with; ``None`` where they are that already.

    Args:
        config: The teacher.
        data: The image set, on the device.
        precision: Of the run in which the teacher is read.

    Raises:
        ConfigError: If mean or std has neither one number nor one per channel.
    """
    mean, std = config.mean, config.std
    if mean is None or std is None:
        found = own_normalisation(config)
        if found is None:
            return None
        mean, std = found if data.channels == 3 else ((sum(values) / 3,) for values in found)
    for name, values in (("mean", mean), ("std", std)):
        rule = f"a teacher's {name} has 1 number, or one for each channel of the images: {data.channels}"
        check_rule(len(values) in (1, data.channels), rule, f"Change --teacher-{name}.", **{name: values})
    given = (data.mean.new_tensor(values, dtype=torch.float64) for values in (mean, std))
    return Renormalise(data.mean, data.std, *given).to(network_dtype(precision))


def with_normalisation(config: TeacherConfig, data: ImageSet, network: nn.Module) -> nn.Module:
    """Return a teacher that takes a set's images: behind its own normalisation, if it has one."""
    first = renormalise(config, data, config.train.precision)
    return network if first is None else nn.Sequential(first, network)
