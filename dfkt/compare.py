"""Run or resume a comparison: for every setting (image set, teacher, student) and every arm (a method) one study.

Every arm gets the same number of search trials of the same length on ``val``, then the same seeds, then ``test`` once.
An arm may also be a part of the method taken away (:data:`PARTS`), with all else as the search of ``dfkt`` left it.
:mod:`dfkt.comparison` reads what this leaves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from dfkt.cluster import cluster
from dfkt.config import FlowConfig, RunConfig, StudyConfig, _rule, to_dict
from dfkt.data import load_data
from dfkt.errors import StudyError
from dfkt.report import trial_config
from dfkt.results import read_study
from dfkt.storage import Storage
from dfkt.study import check_networks, check_store, run_study
from dfkt.trial import Workers

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
    _check(config, folder)
    _write_index(config, folder)
    failures = 0
    with cluster(address):
        for setting in config.settings:
            for number, arm in enumerate(setting.arms, 1):
                study = _arm_study(config, arm, folder.sub(setting.name))
                if study is None:
                    log(f"{setting.name}: {arm.name} is what dfkt is already")
                    continue
                log(f"\n{setting.name}: {arm.name} ({number} of {len(setting.arms)} arms)")
                result = run_study(study, folder.sub(setting.name).path, workers=workers, log=log)
                failures += result.failures
                if result.interrupted:
                    return False, failures
    return True, failures


def _study(config: ComparisonConfig, arm: Arm) -> StudyConfig:
    return StudyConfig(
        name=arm.name,
        base=arm.run,
        trials=arm.trials,
        seeds=config.seeds,
        baselines=(),
        final_group=False,
        weights="pair" if arm.weights == "pair" else "span",
        early_stopping=False,
        search_seed=config.search_seed,
        max_failures=config.max_failures,
    )


def _arm_study(config: ComparisonConfig, arm: Arm, folder: Storage) -> StudyConfig | None:
    """Return an arm's study; for a part of the method its change to the winner, ``None`` where it changes nothing."""
    study = _study(config, arm)
    if arm.part is None:
        return study
    winner = trial_config(read_study(folder.sub("dfkt")))
    flow = PARTS[arm.part](winner.flow)
    return None if flow == winner.flow else replace(study, base=replace(winner, flow=flow))


def _check(config: ComparisonConfig, folder: Storage) -> None:
    """Refuse what cannot be done before any arm starts."""
    for setting in config.settings:
        data = None
        for arm in setting.arms:
            study = _study(config, arm)
            if data is None or arm.run.data != setting.arms[0].run.data:
                data = load_data(arm.run.data)
            changed = PARTS[arm.part](arm.run.flow) if arm.part else arm.run.flow
            check_networks(replace(study, base=replace(arm.run, flow=changed)), data)
            if arm.part is None:
                check_store(study, folder.sub(setting.name, arm.name), data)


def _write_index(config: ComparisonConfig, folder: Storage) -> None:
    """Write which settings and arms there are; those of earlier runs stay."""
    stored = json.loads(folder.read(INDEX_FILE) or b"{}")
    if stored and stored.get("format") != 1:
        raise StudyError(f"{INDEX_FILE} must have format 1, but {folder.path} has {stored.get('format')!r}.")
    settings = stored.get("settings", {})
    for setting in config.settings:
        arms = settings.get(setting.name, {}).get("arms", [])
        arms += [arm.name for arm in setting.arms if arm.name not in arms]
        settings[setting.name] = {"arms": arms, "base": to_dict(setting.arms[0].run)}
    index = {"format": 1, "settings": settings, "commands": [*stored.get("commands", []), sys.argv]}
    folder.write(INDEX_FILE, json.dumps(index, indent=1).encode())
