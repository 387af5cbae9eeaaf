"""FSP: plain flow-based transfer, what DFKT makes dense and sequential."""

from __future__ import annotations

from dataclasses import dataclass

from dfkt.config import check_choice, check_rule
from dfkt.methods.base import Method, Schedule, Stage, searched, task_stage
from dfkt.methods.dfkt import FlowTerm
from dfkt.methods.flow import FLOW_NORMS, FlowNorm
from dfkt.methods.patterns import flow_pairs
from dfkt.networks.taps import StudentTaps


@dataclass(frozen=True, kw_only=True)
class Fsp(Method):
    """The pairs of adjacent group ends in one flow stage, then the labels (Yim et al., CVPR 2017).

    The published loss is ``norm="sum"`` at rate 0.001; it did worse than no flow at all (docs/log.md).
    """

    name = "fsp"
    losses = ("flow", "task")
    share: float = searched(1 / 3, 0.1, 0.6)
    """Share of the run's epochs spent in the flow stage."""
    flow_rate: float = searched(0.1, 0.01, 1.0, log=True)
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    norm: FlowNorm = "relative"
    """How a pair's distance is normalised (:class:`dfkt.methods.flow.FlowLoss`)."""
    clip_norm: float | None = 1.0
    """Clips the gradient's norm in the flow stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("norm", self.norm, FLOW_NORMS)
        check_rule(0 < self.share < 1, "0 < share < 1", share=self.share)
        check_rule(self.clip_norm is None or self.clip_norm > 0, "clip_norm > 0", clip_norm=self.clip_norm)

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return the flow stage and the task stage."""
        pairs = flow_pairs("group-ends", taps.count, taps.group_ends)
        flow = Stage(
            phase="flow",
            epochs=self.share * epochs,
            terms=(FlowTerm(pairs=pairs, weights=(1.0,) * len(pairs), norm=self.norm),),
            rate=self.flow_rate,
            clip_norm=self.clip_norm,
            round=1,
            tap=max(j for _, j in pairs),
        )
        return flow, task_stage(epochs - self.share * epochs, self.rate)
