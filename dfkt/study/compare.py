"""Run or resume a comparison: for every setting (image set, teacher, student) and every arm (a method) one study.

Every arm gets the same number of search trials of the same length on ``val``, then the same seeds, then ``test`` once.
An arm may also be a part of the method taken away (:data:`PARTS`), with all else as the search of ``dfkt`` left it.
:mod:`dfkt.analysis.statistics` reads what this leaves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from dfkt.study.queue import ArmDriver, ArmRecorder, Arms, Opener, RunningArm, Skipped
from dfkt.study.cluster import cluster, fit_workers
from dfkt.analysis.statistics import FORMAT, INDEX_FILE, read_json
from dfkt.config import RunConfig, StudyConfig, _rule, config_key
from dfkt.data.load import ImageSet, load_data
from dfkt.study.finals import measure_teacher, winner_of
from dfkt.methods.builders import build_schedule
from dfkt.store.study_store import StudyStore
from dfkt.methods.space import SearchSpace
from dfkt.store.files import Storage
from dfkt.study.study import check_networks, check_store, keep_teacher, open_store, tune_trials
from dfkt.networks.taps import group_ends
from dfkt.training.teacher import WEIGHTS_FILE
from dfkt.study.driver import Driver, Workers
from dfkt.training.run import build_student

Log = Callable[[str], None]


def _flow(**changes: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda run: replace(run, flow=replace(run.flow, **changes))


def _without_flow(run: RunConfig) -> RunConfig:
    """Return the task stage alone, with as many epochs as it has beside the flow stages."""
    return replace(run, method="kd", train=replace(run.train, epochs=run.train.epochs * (1 - run.flow.share)))


PARTS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "adjacent": _flow(pattern="adjacent"),
    "sliding": _flow(pattern="sliding-2"),
    "dense": _flow(pattern="dense-3"),
    "joint": _flow(order="joint", rounds=1, freeze_below=False),
    "sequential": _flow(order="cumulative", freeze_below=False),
    "one-round": _flow(rounds=1),
    "two-rounds": _flow(rounds=2),
    "equal-weights": _flow(span_weights=(), pair_weights=()),
    "unit-norm": _flow(norm="unit"),
    "labels-only": lambda run: replace(run, task=replace(run.task, kd_weight=0.0)),
    "no-flow": _without_flow,
}
"""One change each to the searched ``dfkt`` run; one that changes nothing there is left out."""

_ADD_DFKT = "Its search is what the parts start from: add it to the methods."


def _folder_rule(what: str, name: str, remedy: str = "") -> None:
    ok = bool(name) and not name.startswith(".") and "/" not in name
    _rule(ok, f"{what} name is that of a folder: not empty, no '/', no leading '.'", remedy, name=name)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: Its folder, and its row in tables.
        run: What its trials share; ``run.method`` is searched.
        trials: Trials of its search; 0 trains ``run`` as it is.
        part: One of :data:`PARTS`: take the winner of the arm ``dfkt`` before it, with this change.
        weights: Flow weights per ``span`` or per ``pair``.
    """

    name: str
    run: RunConfig
    trials: int
    part: str | None = None
    weights: Literal["span", "pair"] = "span"

    def __post_init__(self) -> None:
        _folder_rule("arm", self.name)
        _rule(self.part is None or self.part in PARTS, f"part is one of {', '.join(PARTS)}", part=self.part)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An image set with a teacher and a student, and the arms that are compared there."""

    name: str
    arms: tuple[Arm, ...]

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        _folder_rule("setting", self.name)
        _rule(len(set(names)) == len(names), "arms of a setting have different names", arms=names)
        before = "dfkt" in names[: next((k for k, a in enumerate(self.arms) if a.part), len(names) + 1)]
        _rule(
            before or not any(a.part for a in self.arms), "the arm dfkt stands before its parts", _ADD_DFKT, arms=names
        )
        _rule(bool(names), "a setting has arms", arms=names)
        same = all(arm.run.data == self.arms[0].run.data for arm in self.arms)
        _rule(same, "all arms of a setting have the same images", setting=self.name)


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """A comparison: its settings, and what all its arms share."""

    name: str
    settings: tuple[Setting, ...]
    seeds: int = 5
    search_seed: int = 0
    max_failures: int = 2

    def __post_init__(self) -> None:
        names = [setting.name for setting in self.settings]
        _folder_rule("comparison", self.name, "Choose one with --name.")
        _rule(len(set(names)) == len(names), "settings have different names", settings=names)
        _rule(bool(names), "a comparison has a setting", settings=names)
        _rule(self.seeds >= 1, "seeds >= 1", seeds=self.seeds)
        _rule(self.search_seed >= 0, "search_seed >= 0", search_seed=self.search_seed)


def run_comparison(
    config: ComparisonConfig,
    results: str,
    *,
    workers: Workers | None = None,
    address: str | None = None,
    log: Log = print,
) -> tuple[bool, int]:
    """Run a comparison to its end: first run, resumed or extended by arms, trials or seeds.

    Args:
        config: The comparison.
        results: Folder that holds comparisons, local or remote.
        workers: What one run spans.
        address: The Ray cluster, as for :func:`dfkt.study.study.run_study`.
        log: Receives the lines that a user reads.

    Returns:
        Whether everything was done, and how many trials and runs failed.

    Raises:
        InputError: If anything that was asked for cannot be done; nothing was trained then.
    """
    folder = Storage(results).sub(config.name)
    folder.check_writable()
    with folder.lock():
        images, spaces = _check(config, folder)
        index = _read_index(folder)
        with cluster(address):
            workers = fit_workers(workers or Workers())
            _write_index(config, folder, index)
            opener = _Opener(config, folder, images, spaces, log)
            arms = Arms([opener.open(setting, arm) for setting in config.settings for arm in setting.arms])
            tune_trials(
                ArmDriver(tuple(opener.drivers(workers))),
                workers,
                folder,
                search=arms,
                recorder=ArmRecorder(arms),
                count=sum(arm.trials + config.seeds for setting in config.settings for arm in setting.arms),
                max_failures=config.max_failures,
            )
            opener.tidy_up(workers)
            return arms.over, arms.failures


class _Opener:
    """Opens the arms' studies: at once, or for a part of the method as soon as its search is over."""

    def __init__(
        self,
        config: ComparisonConfig,
        folder: Storage,
        images: Mapping[str, ImageSet],
        spaces: Mapping[tuple[str, str], SearchSpace],
        log: Log,
    ) -> None:
        self.config, self.folder, self.images, self.spaces, self.log = config, folder, images, spaces, log
        self.ours: dict[str, RunningArm] = {}
        self.skipped: dict[tuple[str, str], bool] = {}

    def open(self, setting: Setting, arm: Arm) -> RunningArm | Opener:
        if arm.part is not None:
            return lambda: self._open_part(setting, arm)
        opened = self._open(setting, arm, _study(self.config, arm))
        if arm.name == "dfkt":
            self.ours[setting.name] = opened
        return opened

    def _open_part(self, setting: Setting, arm: Arm) -> RunningArm | Skipped | None:
        """Open an arm that is ``dfkt`` with one part changed; wait for the winner of its search."""
        assert arm.part is not None
        ours = self.ours[setting.name]
        if not ours.searched:
            return None
        winner = winner_of(ours.study, ours.store)
        if winner is None:
            return self._skip(setting, arm, "dfkt has no complete trial")
        changed = PARTS[arm.part](winner)
        taps = build_student(winner.student, self.images[setting.name], seed=0).taps
        old, new = (build_schedule(run, len(taps), group_ends(taps)) for run in (winner, changed))
        self.skipped[setting.name, arm.name] = old == new
        if old == new:
            return self._skip(setting, arm, "dfkt is that already")
        study, storage = replace(_study(self.config, arm), base=changed), self.folder.sub(setting.name, arm.name)
        store = open_store(study, storage, self.images[setting.name], ours.space)  # that of another winner goes on
        storage.write(WEIGHTS_FILE, ours.store.storage.read(WEIGHTS_FILE) or b"")
        store.update_meta(teacher=ours.store.meta["teacher"], parent=config_key(winner))
        return self._running(setting, arm, study, store, ours.space)

    def _skip(self, setting: Setting, arm: Arm, why: str) -> Skipped:
        """Leave a part out; what an earlier winner's was is no part of the present one."""
        self.log(f"{setting.name} {arm.name}: {why}")
        storage = self.folder.sub(setting.name, arm.name)
        if storage.exists("study.json"):
            StudyStore.open(storage).update_meta(present_finals=[])
        return Skipped()

    def _open(self, setting: Setting, arm: Arm, study: StudyConfig) -> RunningArm:
        space = self.spaces[setting.name, arm.name]
        store = open_store(study, self.folder.sub(setting.name, arm.name), self.images[setting.name], space)
        keep_teacher(study, store, self.log if arm is setting.arms[0] else lambda line: None)
        measure_teacher(study.base, store)  # now, not while others' trials are timed
        return self._running(setting, arm, study, store, space)

    def _running(
        self, setting: Setting, arm: Arm, study: StudyConfig, store: StudyStore, space: SearchSpace
    ) -> RunningArm:
        return RunningArm(study, store, space, lambda line: self.log(f"{setting.name} {arm.name}: {line}"))

    def tidy_up(self, workers: Workers) -> None:
        """Note which parts were left out; delete what Ray Train wrote into the arms' folders."""
        _note_skipped(self.folder, self.skipped)
        for setting in self.config.settings if workers.count > 1 else ():
            for arm in setting.arms:
                self.folder.sub(setting.name, arm.name, "ray").delete_all()

    def drivers(self, workers: Workers) -> Iterator[Driver]:
        """Yield what runs the trials of each arm."""
        for setting in self.config.settings:
            for arm in setting.arms:
                path = self.folder.sub(setting.name, arm.name).path
                yield Driver(arm.run, path, workers, self.config.max_failures)


def _study(config: ComparisonConfig, arm: Arm) -> StudyConfig:
    return StudyConfig(
        name=arm.name,
        base=arm.run,
        trials=arm.trials,
        seeds=config.seeds,
        baselines=(),
        weights=arm.weights,
        early_stopping=False,
        search_seed=config.search_seed,
        max_failures=config.max_failures,
    )


def _check(config: ComparisonConfig, folder: Storage) -> tuple[dict[str, ImageSet], dict[tuple[str, str], SearchSpace]]:
    """Refuse what cannot be done before any arm starts; return the settings' images and the arms' search spaces."""
    images, spaces, loaded = {}, {}, {}
    for setting in config.settings:
        key = config_key(setting.arms[0].run.data)
        if key not in loaded:
            loaded[key] = load_data(setting.arms[0].run.data)
        data = images[setting.name] = loaded[key]
        for arm in setting.arms:
            study = _study(config, arm)
            changed = PARTS[arm.part](arm.run) if arm.part else arm.run
            spaces[setting.name, arm.name] = check_networks(replace(study, base=changed), data)
            if arm.part is None:
                check_store(study, folder.sub(setting.name, arm.name), data)
    return images, spaces


def _read_index(folder: Storage) -> dict[str, Any]:
    """Return the index of earlier runs; an empty one before the first."""
    return read_json(folder, INDEX_FILE) if folder.exists(INDEX_FILE) else {"format": FORMAT, "settings": {}}


def _write_index(config: ComparisonConfig, folder: Storage, index: dict[str, Any]) -> None:
    """Write which settings and arms there are; those of earlier runs stay."""
    settings = index["settings"]
    for setting in config.settings:
        known = settings.setdefault(setting.name, {"arms": []})
        known["arms"] += [arm.name for arm in setting.arms if arm.name not in known["arms"]]
    index = index | {"commands": [*index.get("commands", []), sys.argv]}
    folder.write(INDEX_FILE, json.dumps(index, indent=1).encode())


def _note_skipped(folder: Storage, judged: Mapping[tuple[str, str], bool]) -> None:
    """Note in the index which parts the searched ``dfkt`` run has already, so that nothing seems to be missing."""
    index = _read_index(folder)
    for (setting, arm), skipped in judged.items():
        known = [name for name in index["settings"][setting].get("skipped", []) if name != arm]
        index["settings"][setting]["skipped"] = known + [arm] * skipped
    folder.write(INDEX_FILE, json.dumps(index, indent=1).encode())
