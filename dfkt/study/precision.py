"""In which precision a study computes: decided once, when it is created, so that a resumed run does not change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from dfkt.config import Precision
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore
from dfkt.study.cluster import Log
from dfkt.study.config import StudyConfig
from dfkt.study.driver import Workers
from dfkt.study.machines import on_other_nodes
from dfkt.study.opening import has_begun
from dfkt.training.config import with_precision
from dfkt.training.optim import computes_bfloat16

SECONDS = 60.0
"""Until hosts that do not answer count as ones that do not compute bfloat16."""


def stored_precision(config: StudyConfig, storage: Storage) -> StudyConfig:
    """Return a study with the precision that it began with, where it is left to choose."""
    if not has_begun(storage):
        return config
    found: dict[str, Any] = StudyStore.open(storage).meta.get("config", {})
    ours, teacher = (part.get("train", {}).get("precision", "auto") for part in (found, found.get("teacher", {})))
    return with_precision(config, ours, teacher)


def decide_precision(config: StudyConfig, storage: Storage, workers: Workers, log: Log) -> StudyConfig:
    """Return a study that begins, with ``auto`` decided: bfloat16 where all hosts compute it, else float32."""
    wanted = (config.train.precision, config.teacher.train.precision)
    if has_begun(storage) or "auto" not in wanted:
        if "bfloat16" in wanted and not all(_answers(workers)):
            log(
                "note: networks are in bfloat16, which not all machines here compute: expect them to be many times slower"
            )
        return config
    chosen: Precision = "bfloat16" if all(_answers(workers)) else "float32"
    if chosen == "bfloat16":
        what = "the GPUs compute it" if workers.gpus else "the processors compute it"
        log(f"networks in bfloat16: {what} (--precision float32 for the other)")
    return with_precision(config, chosen, chosen)


def _answers(workers: Workers) -> Sequence[bool]:
    """Return what the hosts say; of GPUs, one that a run may get."""
    if workers.gpus:
        return [ray.get(ray.remote(num_gpus=workers.gpus)(computes_bfloat16).remote("cuda"))]
    return [
        computes_bfloat16("cpu"),
        *(bool(answer) for answer in on_other_nodes(computes_bfloat16, "cpu", timeout=SECONDS)),
    ]
