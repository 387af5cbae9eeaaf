"""A study that is being run: its configuration, its store, and what its runs are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dfkt.config import Placement
from dfkt.networks.taps import StudentTaps
from dfkt.store.study_store import StudyStore
from dfkt.students.keep import Keeper
from dfkt.study.config import StudyConfig
from dfkt.study.driver import Kind
from dfkt.study.keeping import ArmPairs, keeping_for
from dfkt.study.search import Journal
from dfkt.training.config import RunConfig
from dfkt.training.run import Job


@dataclass(eq=False)
class OpenStudy:
    """A study that is being run.

    Attributes:
        config: The study.
        store: Its store, of which this process is the only writer.
        placement: What its runs are given.
        taps: The student's.
        pairs: By arm, the flow pairs that its runs can ask for.
        journal: Optuna's, once an arm is searched.
    """

    config: StudyConfig
    store: StudyStore
    placement: Placement
    taps: StudentTaps
    pairs: ArmPairs = field(default_factory=dict)
    journal: Journal | None = None

    def open_journal(self) -> Journal:
        """Return Optuna's journal, opened at the first call."""
        self.journal = self.journal or Journal(self.store.storage)
        return self.journal

    def note(self, arm: str, **entries: Any) -> None:
        """Set entries of an arm in ``study.json``."""
        arms = dict(self.store.meta.get("arms", {}))
        arms[arm] = arms.get(arm, {}) | entries
        self.store.update_meta(arms=arms)

    def job(self, kind: Kind, config: RunConfig, *folder: str, rungs: tuple[float, ...] = ()) -> Job:
        """Return what runs a configuration in a folder below the study's."""
        storage = self.store.storage
        teacher = storage.path if config.method.taught else None
        meta = self.store.meta
        known = {**meta.get("teacher", {}), **meta.get("cost", {}).get("teacher", {})}
        keep = Keeper(known) if kind == "final" else None
        keeping = keeping_for(self.config, kind, self.placement, storage.path, self.pairs)
        return Job(config, self.placement, storage.sub(*folder).path, teacher, kind == "final", keep, rungs, keeping)
