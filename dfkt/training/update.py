"""One update of a student: the gradients of a stage's loss for a batch, then a step of SGD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfkt.config import TrainConfig
from dfkt.methods.base import Features, Stage
from dfkt.methods.patterns import FlowPair
from dfkt.training.optim import autocast, network_dtype
from dfkt.training.parallel import Group
from dfkt.training.replay import Replayed
from dfkt.training.stages import RunningStage

Update = tuple[Tensor, Tensor | None]
"""The terms' values with their weighted sum, and the student's logits where the stage computes them."""
Said = tuple[tuple[int, ...], bool, tuple[FlowPair, ...]]
"""What a teacher's features hold: taps, logits, matrices."""


class Updates:
    """The updates of one stage.

    Args:
        running: The stage on its way.
        batch_size: Images of a batch, over all workers together.
        config: What the stages share.
        group: The data-parallel processes.
        replay: Record the gradients' computation as a CUDA graph, and replay it (:mod:`dfkt.training.replay`).
    """

    def __init__(
        self, running: RunningStage, batch_size: int, config: TrainConfig, group: Group, *, replay: bool
    ) -> None:
        self.running, self.stage, self.batch_size, self.group, self.replay = (
            running,
            running.stage,
            batch_size,
            group,
            replay,
        )
        self.precision, self.dtype = config.precision, network_dtype(config.precision)
        self.clip_norm = self.stage.clip_norm if self.stage.clip_norm is not None else config.clip_norm
        self.replayed: dict[Said, Replayed] = {}

    def __call__(self, images: Tensor, labels: Tensor, teacher: Features, done: float) -> Update:
        """Update the student once.

        Args:
            images: ``[B, C, H, W]``, normalised.
            labels: ``[B]``.
            teacher: What the teacher says to the images.
            done: Share of the stage that is done, in [0, 1).
        """
        weights = [term.weight_at(done) for term in self.stage.terms]
        gradients = self._replayed if self.replay else self._gradients
        found = gradients(images, labels, teacher, weights)
        self.running.optimizer.step()
        return found

    def _gradients(
        self, images: Tensor, labels: Tensor, teacher: Features, weights: Sequence[float | Tensor]
    ) -> Update:
        """Compute the gradients of the weighted sum of all terms."""
        with autocast(self.precision, images.device):
            outputs = self.running.model(images)
        student = Features({int(k): v for k, v in outputs.items() if k != "logits"}, outputs.get("logits"))
        values = self._losses(self.stage, teacher, student, labels)
        loss = torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()
        self.running.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.running.trainable, self.clip_norm)
        logged = torch.stack([value.detach().to(self.dtype) for value in (*values, loss)])
        return logged, None if student.logits is None else student.logits.detach()

    def _replayed(self, images: Tensor, labels: Tensor, teacher: Features, weights: Sequence[float]) -> Update:
        """As :meth:`_gradients`, as a function of tensors alone: weights may change from step to step."""
        matrices = teacher.matrices or {}
        said = tuple(teacher.taps), teacher.logits is not None, tuple(matrices)
        logits = () if teacher.logits is None else (teacher.logits,)
        factors = [torch.full((), weight, dtype=self.dtype, device=images.device) for weight in weights]
        if said not in self.replayed:
            self.replayed[said] = Replayed(lambda *tensors: self._unpacked(said, *tensors))
        found: Update
        found, gradients = self.replayed[said](
            images, labels, *factors, *teacher.taps.values(), *logits, *matrices.values()
        )
        for parameter, gradient in zip(self.running.trainable, gradients, strict=True):
            parameter.grad = gradient  # each recording has gradients of its own, and another one may have come before
        return found

    def _unpacked(
        self, said: Said, images: Tensor, labels: Tensor, *tensors: Tensor
    ) -> tuple[Update, list[Tensor | None]]:
        """Return, besides, where the gradients lie."""
        taps, logits, pairs = said
        rest = iter(tensors)
        weights = [next(rest) for _ in self.stage.terms]
        teacher = Features(
            {tap: next(rest) for tap in taps},
            next(rest) if logits else None,
            {pair: next(rest) for pair in pairs} or None,
        )
        found = self._gradients(images, labels, teacher, weights)
        return found, [parameter.grad for parameter in self.running.trainable]

    def close(self) -> None:
        """Let go of what was recorded, at once: what the garbage collector would find later may disturb another recording."""
        self.replayed.clear()

    def _losses(self, stage: Stage, teacher: Features, student: Features, labels: Tensor) -> list[Tensor]:
        """Return every term's value; the mean over workers is the whole batch's."""
        if self.group.world == 1:
            return [term(teacher, student, labels) for term in stage.terms]
        share, values = self.group.share(self.batch_size), []
        for term in stage.terms:
            if term.whole_batch:
                ours, theirs = (self._gathered(features, term.taps) for features in (student, teacher))
                values.append(term(theirs, ours, self.group.gather(labels, self.batch_size)))
            else:
                values.append(term(teacher, student, labels) * share)
        return values

    def _gathered(self, features: Features, taps: tuple[int, ...]) -> Features:
        """Return what a network computed for the whole batch, from all workers."""
        logits = None if features.logits is None else self.group.gather(features.logits, self.batch_size)
        return Features({tap: self.group.gather(features.taps[tap], self.batch_size) for tap in taps}, logits)
