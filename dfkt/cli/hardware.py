"""The switches that say what one run spans, and what is asked of the cluster."""

from __future__ import annotations

import argparse
import re
import typing

from dfkt.cli.numbers import number, size, whole
from dfkt.cli.options import add_cuda_graphs, updated
from dfkt.errors import ConfigError

if typing.TYPE_CHECKING:
    from dfkt.study.capacity import Demand
    from dfkt.study.driver import Workers

PLACEMENTS = ("pack", "spread")


def add_workers(parser: argparse.ArgumentParser, *, settings: bool = True) -> None:
    """Add the switches that say what one run spans, with those that count as settings or without."""
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--workers-per-run",
        metavar="N|N..M",
        help="data-parallel workers of one run; 2..8: as many as there are, more or fewer as machines come and go (default: 1)",
    )
    group.add_argument("--cpus-per-worker", type=whole, help="CPUs of a worker (default: 1)")
    group.add_argument(
        "--gpus-per-worker", type=number, help="GPUs of a worker; a fraction shares one (default: 1 if there are any)"
    )
    if settings:
        group.add_argument(
            "--no-sync-batch-norm",
            action="store_true",
            help="several workers normalise each by its own share of a batch",
        )
    group.add_argument("--checkpoint-every", type=whole, help="epochs between checkpoints (default: 1)")
    _add_targets(group)
    add_cuda_graphs(group)
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        help="a run's workers on as few machines as possible, or on as many (default: pack)",
    )
    group.add_argument(
        "--at-once", type=whole, help="runs at a time (default: what the cluster may grow to hold, else what it holds)"
    )
    group.add_argument("--wait", type=number, help="minutes to wait for machines that hold a run (default: 15)")
    group.add_argument(
        "--silence",
        type=number,
        help="minutes without a report after which a run counts as hanging; 0: never (default: 60)",
    )
    group.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, or this machine)")
    group.add_argument(
        "--log", metavar="NAMES", help="also tell some of tensorboard,mlflow,wandb how runs go on (docs/guide.md)"
    )


def _add_targets(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--keep-targets",
        type=size,
        metavar="SIZE",
        help="of what the teacher says, for later runs, on each host: 20GB, or 0 (default: a quarter of what is free)",
    )
    group.add_argument(
        "--target-root", help="where that lies, on each host's own disk (default: ~/.cache/dfkt/targets)"
    )


def read_workers(a: argparse.Namespace) -> Workers:
    """Return what one run spans.

    Raises:
        ConfigError: If the switches do not say it.
    """
    from dfkt.study.driver import Workers

    fewest, most = split_range(a.workers_per_run)
    spread = None if a.placement is None else a.placement == "spread"
    given = {"count": fewest, "up_to": most, "cpus": a.cpus_per_worker, "gpus": a.gpus_per_worker, "spread": spread}
    return typing.cast("Workers", updated(Workers(), **given))


def read_demand(a: argparse.Namespace) -> Demand:
    """Return what is asked of the cluster."""
    from dfkt.study.capacity import Demand

    return typing.cast("Demand", updated(Demand(), at_once=a.at_once, wait=a.wait, silence=a.silence))


def split_range(text: str | None) -> tuple[int | None, int | None]:
    """Return the fewest and the most workers of a run; no most where their number is fixed.

    Raises:
        ConfigError: If the text says neither.

    Example:
        >>> split_range("2..8"), split_range("3"), split_range(None)
        ((2, 8), (3, None), (None, None))
    """
    if text is None:
        return None, None
    found = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", text, re.ASCII)
    if found is None:
        raise ConfigError(f"`--workers-per-run` takes a number, or a range such as 2..8, but got {text!r}.")
    fewest, most = found.groups()
    return int(fewest), None if most is None else int(most)
