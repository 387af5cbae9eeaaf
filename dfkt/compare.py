"""Run or resume a comparison: for every setting (image set, teacher, student) and every arm (a method) one study.

Every arm gets the same number of search trials of the same length on ``val``, then the same seeds, then ``test`` once.
An arm may also be a part of the method taken away (:data:`PARTS`), with all else as the search of ``dfkt`` left it.
:mod:`dfkt.comparison` reads what this leaves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dfkt.arms import ArmDriver, ArmRecorder, Arms, Opener, RunningArm, Skipped
from dfkt.cluster import cluster, fit_workers
from dfkt.config import FlowConfig, RunConfig, StudyConfig, _rule, to_dict
from dfkt.data import ImageSet, load_data
from dfkt.errors import StudyError
from dfkt.finals import winner_of
from dfkt.methods import build_schedule
from dfkt.storage import Storage
from dfkt.study import check_networks, check_store, keep_teacher, open_store, tune_trials
from dfkt.taps import group_ends
from dfkt.trial import Driver, Workers
from dfkt.worker import build_student

Log = Callable[[str], None]
INDEX_FILE = "comparison.json"
PARTS: dict[str, Callable[[FlowConfig], FlowConfig]] = {
    "adjacent": lambda flow: replace(flow, pattern="adjacent"),
    "sliding": lambda flow: replace(flow, pattern="sliding-2"),
    "dense": lambda flow: replace(flow, pattern="dense-3"),
    "joint": lambda flow: replace(flow, order="joint", rounds=1, freeze_below=False),
    "sequential": lambda flow: replace(flow, order="cumulative", freeze_below=False),
    "one-round": lambda flow: replace(flow, rounds=1),
    "two-rounds": lambda flow: replace(flow, rounds=2),
    "unit-norm": lambda flow: replace(flow, norm="unit"),
    "equal-weights": lambda flow: replace(flow, span_weights=(), pair_weights=()),
}
"""One change each to the flow stages of the searched ``dfkt`` run; one that changes nothing there is left out."""


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
    weights: str = "span"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An image set with a teacher and a student, and the arms that are compared there."""

    name: str
    arms: tuple[Arm, ...]

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        _rule(len(set(names)) == len(names), "arms of a setting have different names", arms=names)
        before = "dfkt" in names[: next((k for k, a in enumerate(self.arms) if a.part), len(names) + 1)]
        _rule(before or not any(a.part for a in self.arms), "the arm dfkt stands before its parts", arms=names)
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
        _rule(len(set(names)) == len(names), "settings have different names", settings=names)
        _rule(bool(names), "a comparison has a setting", settings=names)


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
        address: The Ray cluster, as for :func:`dfkt.study.run_study`.
        log: Receives the lines that a user reads.

    Returns:
        Whether everything was done, and how many trials and runs failed.

    Raises:
        InputError: If anything that was asked for cannot be done; nothing was trained then.
    """
    folder = Storage(results).sub(config.name)
    folder.check_writable()
    with folder.lock():
        images = _check(config, folder)
        _write_index(config, folder)
        with cluster(address):
            workers = fit_workers(workers or Workers())
            opener = _Opener(config, folder, images, log)
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
            _note_skipped(folder, opener.skipped)
            return arms.done, arms.failures


class _Opener:
    """Opens the arms' studies: at once, or for a part of the method as soon as its search is over."""

    def __init__(self, config: ComparisonConfig, folder: Storage, images: Mapping[str, ImageSet], log: Log) -> None:
        self.config, self.folder, self.images, self.log = config, folder, images, log
        self.ours: dict[str, RunningArm] = {}
        self.skipped: list[tuple[str, str]] = []

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
            self.log(f"{setting.name} {arm.name}: dfkt has no complete trial")
            return Skipped()
        changed = replace(winner, flow=PARTS[arm.part](winner.flow))
        taps = build_student(winner.student, self.images[setting.name], seed=0).taps
        old, new = (build_schedule(run, len(taps), group_ends(taps)) for run in (winner, changed))
        if old == new:
            self.log(f"{setting.name} {arm.name}: dfkt is that already")
            self.skipped.append((setting.name, arm.name))
            return Skipped()
        return self._open(setting, arm, replace(_study(self.config, arm), base=changed))

    def _open(self, setting: Setting, arm: Arm, study: StudyConfig) -> RunningArm:
        data = self.images[setting.name]
        storage = self.folder.sub(setting.name, arm.name)
        space = check_networks(study, data)
        check_store(study, storage, data)
        store = open_store(study, storage, data, space)
        keep_teacher(study, store, self.log if arm is setting.arms[0] else lambda line: None)
        return RunningArm(study, store, space, lambda line: self.log(f"{setting.name} {arm.name}: {line}"))

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
        weights="pair" if arm.weights == "pair" else "span",
        early_stopping=False,
        search_seed=config.search_seed,
        max_failures=config.max_failures,
    )


def _check(config: ComparisonConfig, folder: Storage) -> dict[str, ImageSet]:
    """Refuse what cannot be done before any arm starts; return the settings' images."""
    images = {}
    for setting in config.settings:
        data = images[setting.name] = load_data(setting.arms[0].run.data)
        for arm in setting.arms:
            study = _study(config, arm)
            changed = PARTS[arm.part](arm.run.flow) if arm.part else arm.run.flow
            check_networks(replace(study, base=replace(arm.run, flow=changed)), data)
            if arm.part is None:
                check_store(study, folder.sub(setting.name, arm.name), data)
    return images


def _write_index(config: ComparisonConfig, folder: Storage) -> None:
    """Write which settings and arms there are; those of earlier runs stay."""
    stored = json.loads(folder.read(INDEX_FILE) or b"{}")
    if stored and stored.get("format") != 1:
        raise StudyError(f"{INDEX_FILE} must have format 1, but {folder.path} has {stored.get('format')!r}.")
    settings = stored.get("settings", {})
    for setting in config.settings:
        arms = settings.get(setting.name, {}).get("arms", [])
        arms += [arm.name for arm in setting.arms if arm.name not in arms]
        settings[setting.name] = settings.get(setting.name, {}) | {"arms": arms, "base": to_dict(setting.arms[0].run)}
    index = {"format": 1, "settings": settings, "commands": [*stored.get("commands", []), sys.argv]}
    folder.write(INDEX_FILE, json.dumps(index, indent=1).encode())


def _note_skipped(folder: Storage, skipped: Iterable[tuple[str, str]]) -> None:
    """Note in the index which parts the searched ``dfkt`` run has already, so that nothing seems to be missing."""
    index = json.loads(folder.read(INDEX_FILE) or b"{}")
    for setting, arm in skipped:
        known = index["settings"][setting].setdefault("skipped", [])
        known += [arm] if arm not in known else []
    folder.write(INDEX_FILE, json.dumps(index, indent=1).encode())
