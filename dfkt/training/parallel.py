"""Data parallelism: what the processes of one run do together, so that many give what one gives, within rounding.

Worker ``rank`` of ``world`` has every ``world``-th image of the batch. Its loss is weighed by its share of the images,
so the mean over workers, which is what ``DistributedDataParallel`` takes of gradients, is the batch's loss however
unequal the shares are. Batch norms see the whole batch, and so do losses that set images against each other.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_DataParallel: Any = nn.parallel.DistributedDataParallel
_NAMES = ("forward_sync_buffers", "broadcast_buffers")  # the later and the earlier name of one argument
_SYNC_BUFFERS = next(name for name in _NAMES if name in inspect.signature(_DataParallel).parameters)


@dataclass(frozen=True)
class Group:
    """The data-parallel processes of a run; one alone unless told otherwise.

    Args:
        rank: This process's number.
        world: How many there are; the default process group must exist when there are several.
    """

    rank: int = 0
    world: int = 1

    def share(self, batch: int) -> float:
        """Return this worker's images of a batch, over an equal share."""
        return len(range(self.rank, batch, self.world)) * self.world / batch

    def mean(self, values: Tensor) -> Tensor:
        """Average over the workers."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world
        return values

    def gather(self, rows: Tensor, batch: int) -> Tensor:
        """Return the rows of a whole batch, in its order, from every worker's share; gradients find their way back."""
        return rows if self.world == 1 else _Gather.apply(rows, self, batch)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return a model whose gradients are averaged over the workers."""
        if self.world == 1:
            return model
        ids = [device] if device.type == "cuda" else None
        wrapped: nn.Module = _DataParallel(model, device_ids=ids, **{_SYNC_BUFFERS: False})
        return wrapped

    def average_buffers(self, network: nn.Module) -> None:
        """Make the workers' running statistics agree where each saw only its share of every batch."""
        for buffer in network.buffers() if self.world > 1 else ():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, batch: int) -> Tensor:
        ctx.group = group
        whole = rows.new_zeros(batch, *rows.shape[1:])
        whole[group.rank :: group.world] = rows
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _summed(gradient)[ctx.group.rank :: ctx.group.world], None, None


class _Sum(torch.autograd.Function):
    """The sum over the workers."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(values: Tensor) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values)
    return values


class SynchronisedBatchNorm(_BatchNorm):
    """Batch norm by the mean and variance of the whole batch, of all workers together, on any device."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected [B, C, ...], but got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised activation; in evaluation mode an ordinary batch norm."""
        self._check_input_dim(input)
        if not self.training:  # each worker evaluates images of its own, in batches of its own: none waits for another
            return F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.running_mean is None,
                0.0,
                self.eps,
            )
        x = input if input.dtype == torch.float64 else input.float()
        over = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        count = _Sum.apply(x.new_tensor([x.numel() / x.shape[1]]))
        mean = _Sum.apply(x.sum(over)) / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(over)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        normed = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normed = normed * self.weight.view(shape)
        if self.bias is not None:
            normed = normed + self.bias.view(shape)
        return normed.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), factor)
        self.running_var.lerp_(variance.to(self.running_var), factor)


def synchronise_batch_norms(network: nn.Module) -> nn.Module:
    """Replace every batch norm by one over all workers, parameters, statistics and paths kept; returns the network."""
    if any(parameter.is_cuda for parameter in network.parameters()):  # torch's own has fused kernels, for GPUs only
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    made: dict[nn.Module, nn.Module] = {}  # one that lies at two paths stays one
    for path, old in list(network.named_modules(remove_duplicate=False)):
        if isinstance(old, _BatchNorm) and not isinstance(old, SynchronisedBatchNorm):
            parent, _, last = path.rpartition(".")
            setattr(network.get_submodule(parent), last, made.setdefault(old, _synchronised(old)))
    return network


def _synchronised(old: _BatchNorm) -> SynchronisedBatchNorm:
    new = SynchronisedBatchNorm(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked, new.training = old.num_batches_tracked, old.training
    return new
