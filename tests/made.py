"""Studies as a run leaves them, written through the store without training anything."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna

from dfkt.config import DataConfig, NetworkConfig, TrainConfig, to_dict
from dfkt.methods.registry import find_method
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore
from dfkt.study.config import ArmConfig, StudyConfig
from dfkt.study.search import Journal

SESSION = {
    "started": "2026-11-22T15:00:36+00:00",
    "versions": {"python": "3.11.7", "dfkt": "0.1.0", "torch": "2.15.0", "ray": "2.60.0", "optuna": "5.0.0"},
    "commit": "8e626c2555d87a7653a6cf1fb429c199b4cf067b",
    "dirty": False,
    "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory_bytes": 24 * 2**30, "gpus": []},
    "command": ["studies/some.py", "--name", "two words"],
}
Curve = Sequence[tuple[str, float | None]]
"""Phase and val accuracy at the end of every epoch."""


@dataclass(frozen=True)
class Arm:
    """What a made study holds of an arm: its final runs' test accuracies by seed (``None``: failed), its trials' val ones."""

    name: str
    tests: Mapping[int, float | None] = field(default_factory=dict)
    curve: Curve = (("task", 0.2), ("task", 0.4), ("task", 0.6), ("task", 0.8))
    trials: Sequence[tuple[str, float | None]] = ()
    planned: int = 0
    parent: str | None = None
    epochs: float | None = None
    present: Sequence[int] | None = None
    skipped: str | None = None
    method: str = ""

    @property
    def kind(self) -> str:
        """The method's name."""
        return self.method or (self.parent or self.name).partition("-")[0]


def write_study(folder: Path, arms: Sequence[Arm], name: str = "blobs", epochs: float = 4, **meta: Any) -> StudyStore:
    """Write a study."""
    configs = [
        ArmConfig(name=a.name, method=find_method(a.kind)(), trials=a.planned, parent=a.parent, epochs=a.epochs)
        for a in arms
    ]
    config = StudyConfig(
        name=name,
        data=DataConfig(name="digits"),
        student=NetworkConfig(name="resnet8"),
        train=TrainConfig(epochs=epochs, batch_size=32),
        arms=tuple(configs),
    )
    said = {
        "config": to_dict(config),
        "data": {"title": "Blobs", "train": 90, "val": 10},
        "teacher": {"key": "k", "network": "resnet26", "val_accuracy": 0.91, "test_accuracy": 0.9},
        "sessions": [SESSION],
        "arms": {
            a.name: {"skipped": a.skipped} | ({} if a.present is None else {"present": list(a.present)}) for a in arms
        },
    }
    store = StudyStore.create(Storage(folder), {"rate": float, "pattern": str}, ["task", "flow"], said | meta)
    for arm in arms:
        for number, (state, accuracy) in enumerate(arm.trials):
            store.save("trial", arm.name, trial(number, arm.kind, state, accuracy))
        for number, (seed, test) in enumerate(arm.tests.items()):
            store.save("final", arm.name, *final(number, arm.kind, seed, test, arm.curve))
    return store


def trial(number: int, method: str, state: str, accuracy: float | None) -> dict[str, Any]:
    """Return a trial's row."""
    row = {"number": number, "state": state, "method": method, "seed": 0, "epochs": 12.0, "device_seconds": 60.4}
    row |= {"settings": json.dumps(to_dict(find_method(method)(rate=0.25))), "param_rate": 0.25}
    return row | {"last_val_accuracy": accuracy, "best_val_accuracy": accuracy}


def final(number: int, method: str, seed: int, test: float | None, curve: Curve) -> tuple[Any, Any]:
    """Return a final run's row and its epoch records."""
    ends = {"last_val_accuracy": curve[-1][1], "best_val_accuracy": max(v for _, v in curve if v is not None)}
    row = {"number": number, "state": "COMPLETE", "method": method, "seed": seed, "test_accuracy": test} | ends
    row |= {"steps": 10 * len(curve), "images": 320 * len(curve), "epochs": float(len(curve)), "device_seconds": 30.0}
    if test is None:
        row |= {"state": "FAIL", "error": "The loss became nan"}
    records = [
        {"index": k, "epoch": k + 1.0, "phase": phase, "stage": 1 if phase == "flow" else None, "step": 10 * (k + 1)}
        | {"images": 320 * (k + 1), "seconds": 2.0, "loss": 0.5, "val_accuracy": val}
        for k, (phase, val) in enumerate(curve)
    ]
    return row | {"key": f"{number:012x}"}, records


def write_journal(folder: Path, arm: str, values: Sequence[float | None]) -> None:
    """Write a search of two parameters into a study's journal, as a study leaves it: ``None`` is a trial that was stopped."""
    journal = Journal(Storage(folder))
    search = optuna.create_study(storage=journal.optuna, study_name=arm, direction="maximize")
    for number, value in enumerate(values):
        trial = search.ask()
        trial.suggest_float("rate", 0.01, 1.0, log=True)
        trial.suggest_categorical("pattern", ["dense", "adjacent"])
        if number % 2:
            trial.suggest_int("rounds", 1, 3)
        search.tell(trial, value, optuna.trial.TrialState.PRUNED if value is None else None)
