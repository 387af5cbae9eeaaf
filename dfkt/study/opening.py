"""What must hold before a study starts, and its store, created or opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfkt.config import Placement, flatten, key_dict, to_dict
from dfkt.data.batches import steps_per_epoch
from dfkt.data.image_set import ImageSet
from dfkt.data.load import check_test
from dfkt.errors import ConfigError, StudyError
from dfkt.methods.base import Method
from dfkt.methods.dfkt import describe_left_out, left_out
from dfkt.methods.patterns import FlowPair
from dfkt.networks.taps import StudentTaps, Tap
from dfkt.store.files import Storage
from dfkt.store.origin import environment
from dfkt.store.study_file import check_entries, read_study_file
from dfkt.store.study_store import StudyStore, clear
from dfkt.students.cost import count_named
from dfkt.study.config import ArmConfig, StudyConfig
from dfkt.study.ended import now
from dfkt.study.keeping import ArmPairs, check_root, describe
from dfkt.study.opened import OpenStudy
from dfkt.study.queue import Queue
from dfkt.study.search import random_draws
from dfkt.training.cached import images_for
from dfkt.training.run import check_networks
from dfkt.training.stages import stage_ends

Log = Callable[[str], None]
DRAWS = 64
"""Random samples of a search space whose schedules must fit before a search begins."""


@dataclass(frozen=True)
class Checked:
    """What is known of a study before it starts.

    Attributes:
        about: What is said of the images, as JSON values.
        taps: The student's, matched with the teacher's.
        pairs: By arm, the flow pairs that its runs can ask for.
    """

    about: dict[str, Any]
    taps: StudentTaps
    pairs: ArmPairs


def check_study(config: StudyConfig, storage: Storage, placement: Placement, log: Log) -> Checked:
    """Refuse what cannot be done before anything starts; return what is known then.

    Raises:
        InputError: If images, networks, taps, methods and lengths do not fit each other, or the folder holds another study.
    """
    data = images_for(config.data, placement)
    taps, teacher = _check_networks(config, data)
    asked = {arm.name: _check_arm(config, arm, data, taps) for arm in config.arms}
    pairs, lost = ({name: both[k] for name, both in asked.items()} for k in (0, 1))
    _columns(config, taps)
    about = about_data(data)
    check_store(config, storage, about)
    check_test(config.data, placement.data_root, data)
    check_root(placement)
    log(data.describe())
    left = frozenset[FlowPair]().union(*lost.values())
    for note in (*data.notes, *([describe_left_out(left)] if left else [])):
        log(f"note: {note}")
    if placement.keep_targets != 0 and (told := describe(config, taps, teacher, pairs, len(data.padded))):
        log(told)
    return Checked(about, taps, pairs)


def _check_networks(config: StudyConfig, data: ImageSet) -> tuple[StudentTaps, tuple[Tap, ...]]:
    """Build both networks once and match their taps, where an arm reads any."""
    tapped = any(arm.method.tapped for arm in config.arms)
    taught = any(arm.method.taught for arm in config.arms)
    precision = config.train.precision
    return check_networks(config.student, config.teacher if taught else None, data, tapped=tapped, precision=precision)


def _check_arm(
    config: StudyConfig, arm: ArmConfig, data: ImageSet, taps: StudentTaps
) -> tuple[frozenset[FlowPair], frozenset[FlowPair]]:
    """Try the schedules of all that an arm may train; return the flow pairs that they have, and those that they leave out."""
    run = config.run(arm, arm.method)
    steps = steps_per_epoch(data, run.train.batch_size)
    asked, lost = set[FlowPair](), set[FlowPair]()
    for method in _candidates(config, arm, taps):
        schedule = method.schedule(run.train.epochs, taps)
        if unknown := {term.name for stage in schedule for term in stage.terms} - set(method.losses):
            raise ConfigError(
                f"`losses` of {method.name} must name every term, but lacks {', '.join(sorted(unknown))}."
            )
        if not schedule or schedule[-1].phase != "task":
            raise ConfigError(f"The last stage of {method.name} must be a task stage: a student is judged by it.")
        try:
            stage_ends(schedule, steps)
        except ConfigError as error:
            raise ConfigError(f"Arm {arm.name} ({method.describe()}): {error}") from None
        asked.update(pair for stage in schedule for pair in stage.flow_pairs)
        lost |= left_out(method, run.train.epochs, taps)
    return frozenset(asked), frozenset(lost)


def _candidates(config: StudyConfig, arm: ArmConfig, taps: StudentTaps) -> list[Method]:
    """Return an arm's method, and random samples of what is searched; an ablation's are its parent's, changed."""
    if arm.parent is not None:
        parent = next(other for other in config.arms if other.name == arm.parent)
        return [arm.of(method) for method in _candidates(config, parent, taps)]
    if not arm.trials:
        return [arm.method]
    arm.space.check(arm.method.columns(taps))
    return [arm.method, *random_draws(arm, taps, DRAWS)]


def check_store(config: StudyConfig, storage: Storage, about: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another study: one of another configuration, or of other images.

    Arms, trials and seeds may be added, and data and teachers may lie elsewhere.

    Raises:
        StudyError: If a setting differs that a study cannot change; the differences are listed. Or if it is damaged.
    """
    if not has_begun(storage):
        return
    meta = read_study_file(storage, "keyed", "data")
    if "teacher" in meta:
        check_entries(storage, meta["teacher"], "network", "val_accuracy", of="teacher.")
    old, new = _compared(meta["keyed"], meta["data"]), _compared(key_dict(config), about)
    changed = [
        (what, name, old[what].get(name), new[what].get(name))
        for what in old.keys() & new.keys()
        for name in sorted(old[what].keys() | new[what].keys())
        if old[what].get(name) != new[what].get(name)
    ]
    if changed:
        shown = "; ".join(f"{what}{name} was {was!r}, is {to!r}" for what, name, was, to in sorted(changed, key=str))
        raise StudyError(
            f"Study {storage.path} has another configuration ({shown}). Take another --name, or the settings it has."
        )


def _compared(config: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what two runs of a study are compared by, as flat settings: all arms', then each arm's."""
    shared = {name: value for name, value in config.items() if name != "arms"}
    arms = {f"{arm['name']}: ": flatten(dict(arm)) for arm in config["arms"]}
    return {"": flatten({**shared, "images": dict(about)}), **arms}


def open_store(
    config: StudyConfig, storage: Storage, about: Mapping[str, Any], taps: StudentTaps, **given: Any
) -> StudyStore:
    """Open the study's store, or create it, with the columns of all its arms; note this session in it.

    Args:
        config: The study.
        storage: Its folder.
        about: What is said of the images.
        taps: The student's.
        given: What else is noted of the session, as JSON values: its placement and its workers.
    """
    session = {"started": now().isoformat(), "arms": [arm.name for arm in config.arms], **given, **environment()}
    params, losses = _columns(config, taps)
    if has_begun(storage):
        store = StudyStore.open(storage)
        store.add_columns(params, losses)
        sessions = store.meta.get("sessions", [])
    else:
        clear(storage)
        store, sessions = StudyStore.create(storage, params, losses, _meta(config, {}) | {"data": dict(about)}), []
    cost = store.meta.get("cost", {}) | _costs(config, about, store.meta.get("cost", {}))
    store.update_meta(sessions=[*sessions, session], cost=cost, **_meta(config, store.meta))
    return store


def _costs(config: StudyConfig, about: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the student costs, and the teacher if an arm has one, where that is not known yet."""
    taught = any(arm.method.taught for arm in config.arms)
    networks = {"teacher": config.teacher.network} if taught else {}
    height, width = about["image_size"]
    shape = (about["channels"], height, width)
    return {
        role: count_named(network, classes=about["classes"], shape=shape)
        for role, network in (networks | {"student": config.student}).items()
        if role not in known
    }


class _Seen(OpenStudy):
    """A study that is only looked at: what is noted in it stays in memory."""

    def note(self, arm: str, **entries: Any) -> None:
        """Set entries of an arm, in memory."""
        arms = dict(self.store.meta.get("arms", {}))
        self.store.meta = self.store.meta | {"arms": arms | {arm: arms.get(arm, {}) | entries}}


def is_over(configs: Sequence[StudyConfig], folders: Sequence[Storage], taps: Sequence[StudentTaps]) -> bool:
    """Whether nothing of some studies is left to do, so that no cluster is needed; nothing is written."""
    if not all(map(has_begun, folders)):
        return False
    studies = [
        _Seen(config, StudyStore.open(folder), Placement(), known)
        for config, folder, known in zip(configs, folders, taps, strict=True)
    ]
    for study in studies:
        for arm in study.config.arms:  # a search that is not over would open Optuna's journal
            ended = sum(row["state"] != "RUNNING" for row in study.store.rows("trial", arm.name))
            if ended < arm.trials:
                return False
    return Queue(studies, log=lambda line: None).over


def _columns(config: StudyConfig, taps: StudentTaps) -> tuple[dict[str, type], list[str]]:
    """Return the parameters and losses of all arms; a parameter has one type in all of them."""
    params: dict[str, type] = {}
    losses: list[str] = []
    for arm in config.arms:
        for name, kind in arm.method.columns(taps).items() if arm.trials else ():
            if params.setdefault(name, kind) is not kind:
                types = f"{params[name].__name__} and {kind.__name__}"
                raise ConfigError(f"A parameter must have one type in all arms, but {name} is {types}.")
        losses += [name for name in arm.method.losses if name not in losses]
    return params, losses


def _meta(config: StudyConfig, old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as ``study.json`` keeps it: arms of earlier runs stay."""
    found = {}
    for entry, values in (("config", to_dict(config)), ("keyed", key_dict(config))):
        listed = {arm["name"] for arm in values["arms"]}
        kept = [arm for arm in old.get(entry, {}).get("arms", []) if arm["name"] not in listed]
        found[entry] = values | {"arms": kept + values["arms"]}
    return found


def about_data(data: ImageSet) -> dict[str, Any]:
    """Return what tells one image set from another, as JSON values."""
    return {
        "title": data.title,
        "classes": data.num_classes,
        "train": len(data.train),
        "val": len(data.val),
        "image_size": list(data.image_size),
        "channels": data.channels,
        "checksum": data.checksum,
    }


def has_begun(storage: Storage) -> bool:
    """Whether a folder holds a study in which anything was trained, or is being trained."""
    if not storage.exists("study.json"):
        return False
    return bool(StudyStore.open(storage).meta.get("arms")) or bool({"trials", "finals"} & {*storage.folders()})
