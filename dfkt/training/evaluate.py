"""Accuracy and loss of a network over a split."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dfkt.config import Precision
from dfkt.data.batches import eval_batches
from dfkt.data.image_set import ImageSet, Split
from dfkt.errors import NonFiniteLossError
from dfkt.methods.base import Stage
from dfkt.networks.taps import modes_kept
from dfkt.training.optim import autocast, network_dtype
from dfkt.training.parallel import Group

BATCH = 512


def evaluate(
    network: nn.Module, data: ImageSet, split: Split, precision: Precision, group: Group | None = None
) -> tuple[float, float]:
    """Return accuracy (0 to 1) and mean cross-entropy (nats) over a split, in evaluation mode; the modes are put back.

    With several workers each looks at its share, and all return the same.
    """
    group = group or Group()
    shard = Split(split.images[group.rank :: group.world], split.labels[group.rank :: group.world])
    dtype = network_dtype(precision)
    sums = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    with modes_kept(network), torch.inference_mode(), autocast(precision, split.labels.device):
        network.eval()
        for images, labels in eval_batches(data, shard, BATCH):
            logits = network(images.to(dtype)).to(dtype)
            sums[0] += (logits.argmax(1) == labels).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
    if group.world > 1:
        dist.all_reduce(sums)
    accuracy, loss = (sums / len(split)).tolist()
    return accuracy, loss


def diverged(stage: Stage, place: str, losses: Mapping[str, float]) -> NonFiniteLossError:
    """Return what ends a run with a loss that is nan or inf.

    Args:
        stage: In which that was seen.
        place: Where in it.
        losses: What was seen, by name.
    """
    values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    return NonFiniteLossError(
        f"The loss became nan or inf in {stage.name}, {place} ({values}). "
        f"Lower the learning rate ({stage.rate:g}) or set clip_norm."
    )


def check_finite(stage: Stage, place: str, losses: Mapping[str, float]) -> None:
    """Refuse losses that are nan or inf: a student that has diverged calls every image the first class.

    Raises:
        NonFiniteLossError: If one is.
    """
    if not all(map(math.isfinite, losses.values())):
        raise diverged(stage, place, losses)
