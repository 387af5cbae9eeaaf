"""What of the teacher's answers a study keeps for its later runs, where, and how it is deleted in the end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from dfkt.config import Placement
from dfkt.errors import StudyError, one_line
from dfkt.methods.patterns import FlowPair
from dfkt.networks.taps import StudentTaps, Tap
from dfkt.store.files import Storage
from dfkt.store.lock import tidied
from dfkt.study.config import StudyConfig
from dfkt.study.driver import Kind
from dfkt.study.machines import on_other_nodes
from dfkt.training.kept import delete_kept
from dfkt.training.targets import MOST_NUMBERS, Keeping, numbers_per_image

ArmPairs = Mapping[str, frozenset[FlowPair]]
SECONDS = 30.0
"""Until what other hosts kept is left there: they may be gone, and later studies make room."""


def keeping_for(config: StudyConfig, kind: Kind, placement: Placement, folder: str, pairs: ArmPairs) -> Keeping | None:
    """Return what a run keeps of the teacher's answers: what another run by its seed can ask for.

    Trials have one seed, and so have confirmations: they keep the flow pairs of all searched arms. Final runs keep those of
    all arms if there are several that have any.

    Args:
        config: The study.
        kind: The run's.
        placement: Where it is kept.
        folder: The study's.
        pairs: By arm, the flow pairs that its runs can ask for.
    """
    if placement.keep_targets == 0:
        return None
    arms = config.arms if kind == "final" else config.searched
    flows = [pairs.get(arm.name, frozenset()) for arm in arms]
    alone = kind == "final" and sum(map(bool, flows)) < 2
    asked = () if alone else sorted(frozenset().union(*flows))
    return Keeping(placement.target_root, _study_name(config, folder), placement.keep_targets, tuple(asked))


def check_root(placement: Placement) -> None:
    """Refuse a folder for targets that cannot be written; nothing stays behind.

    Raises:
        StudyError: If it cannot.
    """
    if placement.keep_targets == 0:
        return
    remedy = "Name another with --target-root, or switch them off with --keep-targets 0."
    if "://" in placement.target_root:
        raise StudyError(f"Targets must be kept on each host's own disk, but got {placement.target_root}. {remedy}")
    root = Storage(Path(os.path.expanduser(placement.target_root)))
    with tidied(root.path):
        try:
            root.check_writable()
        except StudyError as error:
            reason = one_line(error.__cause__ or error)
            raise StudyError(
                f"The folder for kept targets must be writable, but {root.path} is not: {reason}. {remedy}"
            ) from error


def describe(config: StudyConfig, taps: StudentTaps, teacher: tuple[Tap, ...], pairs: ArmPairs, images: int) -> str:
    """Say on one line what a study keeps, and how large it is; empty where no flow pair is asked for.

    Args:
        config: The study.
        taps: The student's, matched with the teacher's.
        teacher: The teacher's taps.
        pairs: By arm, the flow pairs that its runs can ask for.
        images: Of the training split.
    """
    asked = frozenset[FlowPair]().union(*pairs.values())
    if not asked or taps.matched is None:
        return ""
    numbers = numbers_per_image(asked, [teacher[m] for m in taps.matched])
    what = f"the teacher's FSP matrices of {len(asked)} flow pairs are {numbers:,} numbers an image"
    if numbers > MOST_NUMBERS:
        return f"{what}, more than the {MOST_NUMBERS:,} that are worth keeping: they are computed at every step"
    return f"{what}, {numbers * 4 * images / 1e9:.2g} GB an epoch or less: kept for later runs while they fit (--keep-targets)"


def forget(config: StudyConfig, placement: Placement, folder: str) -> None:
    """Delete a study's kept targets on every host of the cluster, as far as the hosts answer."""
    kept = f"{placement.target_root}/{_study_name(config, folder)}"
    _delete(kept)
    on_other_nodes(_delete, kept, timeout=SECONDS)


def _study_name(config: StudyConfig, folder: str) -> str:
    """Return the name of the folder in which a study's targets are kept."""
    return f"{config.name}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"


def _delete(folder: str) -> None:
    delete_kept(Path(os.path.expanduser(folder)))
