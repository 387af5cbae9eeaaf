"""``python -m dfkt resume``: go on with a study, or with all of a folder, by what the folder says; nothing else is needed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkt.cli.boundary import EXIT_FAILED, say
from dfkt.cli.hardware import PLACEMENTS, add_workers
from dfkt.cli.options import add_dry_run
from dfkt.cli.study import add_retry, run_all
from dfkt.config import from_dict
from dfkt.errors import InputError, StudyError
from dfkt.store.files import Storage, readable
from dfkt.store.study_file import STUDY_FILE, check_entries
from dfkt.store.study_store import StudyStore, studies_below
from dfkt.training.teacher import WEIGHTS_FILE

if TYPE_CHECKING:
    from dfkt.study.config import StudyConfig

HELP = "go on with a study, or with a folder of several, that was interrupted"
NOTED = {
    "data_root": ("placement", "data_root"),
    "teacher_root": ("placement", "teacher_root"),
    "checkpoint_every": ("placement", "checkpoint_every"),
    "target_root": ("placement", "target_root"),
    "keep_targets": ("placement", "keep_targets"),
    "cuda_graphs": ("placement", "cuda_graphs"),
    "cpus_per_worker": ("workers", "cpus"),
    "gpus_per_worker": ("workers", "gpus"),
    "at_once": ("demand", "at_once"),
    "wait": ("demand", "wait"),
    "silence": ("demand", "silence"),
}
"""By switch, where a session notes what it was given."""


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches; what is left out is as it was in the study's last session."""
    parser.add_argument("study", help="folder of a study or of several, local or s3://…")
    group = parser.add_argument_group("data and teacher (default of all switches: as in the study's last session)")
    group.add_argument("--data-root", help="where torchvision's sets are kept")
    group.add_argument("--teacher-root", help="where trained teachers are kept")
    add_retry(parser)
    add_dry_run(parser)
    add_workers(parser, settings=False)


def run(a: argparse.Namespace) -> int:
    """Go on with all studies of the folder in one queue; one that is damaged is named, and the others go on."""
    results, places = find_studies(Storage(a.study))
    stores, read, faults = [], [], []
    for place in places:
        try:
            store = StudyStore.open(place)
            read.append(read_config(store))
            stores.append(store)
        except StudyError as error:
            faults.append(error)
    if not read:
        raise faults[0]
    for fault in faults:
        say(f"left out: {fault}")
    sessions = [session for store in stores for session in store.meta.get("sessions", [])]
    latest: Mapping[str, Any] = max(sessions, key=lambda session: str(session.get("started")), default={})
    for switch, value in noted(latest).items():
        if getattr(a, switch) is None:
            setattr(a, switch, value)
    return run_all(read, results.path, a) or (EXIT_FAILED if faults else 0)


def find_studies(storage: Storage) -> tuple[Storage, list[Storage]]:
    """Return the folder of a study, or of all those directly below one, and the folder in which they lie.

    Raises:
        StudyError: If there is none, or the folder cannot be read.
    """
    with readable(storage):
        if storage.exists(STUDY_FILE):
            return storage.split()[0], [storage]
        found = studies_below(storage)
    if not found:
        raise StudyError(f"A folder must hold a study.json, or several studies below it, but {storage.path} has none.")
    return storage, found


def read_config(store: StudyStore) -> StudyConfig:
    """Return a study as its last session had it.

    A user's teacher that is no longer where it was is read from the study's own copy.

    Raises:
        StudyError: If ``study.json`` does not say one that can be run, or the folder was renamed.
    """
    from dfkt.study.config import StudyConfig
    from dfkt.study.opening import has_begun

    storage = store.storage
    check_entries(storage, store.meta, "config")
    try:
        config = from_dict(StudyConfig, store.meta["config"])
        last = (store.meta.get("sessions") or [{}])[-1].get("arms") or [arm.name for arm in config.arms]
        config = replace(config, arms=tuple(arm for arm in config.arms if arm.name in last))
    except (InputError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, InputError) else f"study.json is damaged: {error!r}."
        raise StudyError(f"The study in {storage.path} cannot be resumed: {reason}") from error
    if (folder := storage.split()[1]) != config.name:
        raise StudyError(
            f"A study must lie in a folder of its name, but {storage.path} holds {config.name}. "
            f"Rename {folder} to {config.name}."
        )
    checkpoint = config.teacher.checkpoint
    gone = checkpoint is not None and not Path(os.path.expanduser(checkpoint)).exists()
    if gone and storage.is_local and storage.exists(WEIGHTS_FILE) and has_begun(storage):
        own = storage.sub(WEIGHTS_FILE).path
        return replace(config, teacher=replace(config.teacher, checkpoint=own))
    return config


def noted(session: Mapping[str, Any]) -> dict[str, Any]:
    """Return by switch what a session noted of where things lie and what one run spans; earlier versions noted nothing."""
    found = {switch: (session.get(group) or {}).get(name) for switch, (group, name) in NOTED.items()}
    workers = session.get("workers") or {}
    count, most, spread = (workers.get(name) for name in ("count", "up_to", "spread"))
    found["workers_per_run"] = None if count is None else f"{count}" if most is None else f"{count}..{most}"
    found["placement"] = None if spread is None else PLACEMENTS[bool(spread)]
    return found
