"""When stages end, and what of a student trains in one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfkt.config import TrainConfig
from dfkt.errors import ConfigError
from dfkt.methods.base import Schedule, Stage
from dfkt.networks.cut import parameters_unread
from dfkt.networks.tapped import AdaptedNetwork, TappedNetwork
from dfkt.training.optim import build_optimizer
from dfkt.training.parallel import Group


def stage_ends(schedule: Schedule, epoch_steps: int) -> list[int]:
    """Return the step at which each stage ends: its length rounded, and every stage has a step at least.

    Args:
        schedule: The stages, their lengths in epochs.
        epoch_steps: Steps of an epoch.

    Raises:
        ConfigError: If there are fewer steps than stages.

    Example:
        >>> from dfkt.methods.base import task_stage
        >>> stage_ends([task_stage(epochs, 0.1) for epochs in (0.5, 0.1, 2.4)], 4)
        [2, 3, 12]
    """
    summed = accumulate(stage.epochs for stage in schedule)
    ends = [round(round(epochs * epoch_steps, 6)) for epochs in summed]  # rounding of sums must not tip a half
    total, count = ends[-1], len(schedule)
    if total < count:
        raise ConfigError(
            f"Every stage needs a step, but {count} stages share {total} steps of {epoch_steps} an epoch. "
            "Take more epochs, a smaller batch, or fewer rounds or stages."
        )
    for k in range(count):
        ends[k] = max(ends[k], ends[k - 1] + 1 if k else 1)
    for k in reversed(range(count)):
        ends[k] = min(ends[k], total - (count - 1 - k))
    return ends


def rung_steps(rungs: Sequence[float], ends: Sequence[int]) -> dict[int, float]:
    """Return by step the rung, a share of the last stage, that is passed there; of several at one step the last.

    Example:
        >>> rung_steps((0.25, 0.5), [4, 14])
        {7: 0.25, 9: 0.5}
    """
    start = ends[-2] if len(ends) > 1 else 0
    length = ends[-1] - start
    return {start + max(math.ceil(share * length - 1e-6), 1): share for share in rungs}


def build_adapters(
    schedule: Schedule, student: TappedNetwork, teacher: TappedNetwork, matched: Sequence[int], seed: int
) -> nn.ModuleDict:
    """Return 1x1 convolutions for every tap where a stage needs channels to agree, and they do not.

    Args:
        schedule: The stages.
        student, teacher: Both networks with their taps.
        matched: The teacher tap that each student tap meets.
        seed: Fixes the initial weights.
    """
    adapters = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for tap in sorted({tap for stage in schedule for tap in stage.adapted_taps}):
            ours, theirs = student.taps[tap].channels, teacher.taps[matched[tap]].channels
            if ours != theirs:
                adapters[str(tap)] = nn.Conv2d(ours, theirs, 1, bias=False)
    return adapters


@dataclass(frozen=True, eq=False)
class RunningStage:
    """A stage on its way: the student cut for it, what of it trains, and its optimizer."""

    stage: Stage
    start: int
    """Step before its first."""
    end: int
    """Its last step."""
    model: nn.Module
    """Images -> activations by tap, and logits."""
    trainable: list[nn.Parameter]
    frozen_norms: Sequence[nn.Module]
    optimizer: torch.optim.SGD

    @classmethod
    def prepare(
        cls,
        stage: Stage,
        start: int,
        end: int,
        student: TappedNetwork,
        adapters: nn.ModuleDict,
        config: TrainConfig,
        group: Group,
    ) -> RunningStage:
        """Cut the student for a stage and decide what trains: of several workers, none waits for a gradient that never comes."""
        part = student.part(stage.taps, stage.needs("student_logits"))
        frozen = student.below(stage.frozen_below) if stage.frozen_below is not None else frozenset()
        unread = parameters_unread(student.network) if group.world > 1 and not stage.taps else frozenset()
        for name, parameter in student.network.named_parameters():
            parameter.requires_grad_(name not in frozen | unread)
            parameter.grad = None
        below = student.part((stage.frozen_below,), False).modules() if stage.frozen_below is not None else ()
        norms = [module for module in below if isinstance(module, _BatchNorm)]
        used = nn.ModuleDict({str(t): adapters[str(t)] for t in stage.adapted_taps if str(t) in adapters})
        model = AdaptedNetwork(part, used)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(trainable, stage.rate, config.optimizer)
        device = next(student.network.parameters()).device
        return cls(stage, start, end, group.wrap(model, device), trainable, norms, optimizer)

    def train_mode(self) -> None:
        """Set the student to training, its frozen batch norms to evaluation."""
        self.model.train()
        for norm in self.frozen_norms:
            norm.eval()

    def done(self, step: int) -> float:
        """Return the share of the stage that is done before a step."""
        return (step - self.start) / (self.end - self.start)
