"""The notebook runs through on any study, and is kept without outputs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import optuna
import pytest
from made import SESSION
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dfkt.config import TrainConfig, to_dict
from dfkt.methods.registry import find_method
from dfkt.methods.space import Draw
from dfkt.networks.taps import StudentTaps
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore
from dfkt.study.config import ArmConfig, StudyConfig

optuna.logging.set_verbosity(optuna.logging.ERROR)
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "study.ipynb"
TAPS = StudentTaps(count=4, group_ends=(1, 2, 3))
STATES = ("COMPLETE", "COMPLETE", "PRUNED", "FAIL", "COMPLETE", "PRUNED")
FIGURES = 7
RUN = """
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(Path(sys.argv[1]).parent)}}).execute()
nbformat.write(notebook, sys.argv[2])
"""


def records(method: str, accuracy: float, last_epoch: int, *, rung: bool = False) -> list[dict[str, Any]]:
    """Return the epochs of a run: three in flow or hint stages, if the method has them, the others in the task stage.

    The first of these may be at a rung.
    """
    phase = {"dfkt": "flow", "fitnets": "hint"}.get(method)
    early = 3 if phase else 0
    found: list[dict[str, Any]] = []
    for epoch in range(1, last_epoch + 1):
        record: dict[str, Any] = {"index": epoch - 1, "epoch": float(epoch), "step": 10 * epoch, "seconds": 1.0}
        if epoch <= early:
            record |= {"phase": phase, "round": 1 if phase == "flow" else None, "stage": epoch, "loss": 1 / epoch}
        else:
            share = (epoch - early) / (9 - early)
            record |= {"phase": "task", "loss": 1 - share, "rung_epoch": 9 * share, "val_accuracy": accuracy * share}
            record |= {"rung": share, "rung_accuracy": accuracy * share} if rung and epoch == early + 1 else {}
        found.append(record)
    return found


def row(method: Any, number: int, state: str, seed: int, made: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"number": number, "state": state, "method": method.name, "seed": seed}
    if made:
        last, epochs = made[-1]["val_accuracy"], float(len(made))
        found |= {"last_val_accuracy": last, "best_val_accuracy": last, "epochs": epochs, "device_seconds": epochs}
        found |= {"peak_memory_bytes": 2**30}
    return found


def search(store: StudyStore, arm: str, count: int, backend: Any, stopping: bool) -> None:
    """Save random samples of an arm's method; of every six trials two are stopped, where any are, and one fails."""
    study = optuna.create_study(
        study_name=arm, storage=backend, direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    for number in range(count):
        trial = study.ask()
        draw = Draw(trial)
        method = find_method(arm)().sample(draw, TAPS)
        state = STATES[number % 6] if stopping else STATES[number % 6].replace("PRUNED", "COMPLETE")
        accuracy = 0.9 - abs(method.rate - 0.1) + 0.01 * (number % 3)
        made = [] if state == "FAIL" else records(arm, accuracy, 9 if state == "COMPLETE" else 4, rung=stopping)
        found = row(method, number, state, 0, made) | {"settings": json.dumps(to_dict(method))}
        store.save("trial", arm, found | {f"param_{name}": value for name, value in draw.params.items()}, made)
        study.tell(trial, accuracy if state == "COMPLETE" else None, optuna.trial.TrialState[state])


def make_study(folder: Path, trials: Mapping[str, int], *, seeds: int = 2, stopping: bool = True) -> Path:
    """Write a study with some trials of every arm, a journal if there are any, and final runs."""
    methods = {arm: find_method(arm)() for arm in trials}
    arms = tuple(ArmConfig(name=arm, method=methods[arm], trials=count) for arm, count in trials.items())
    config = StudyConfig(name="made", train=TrainConfig(epochs=9), arms=arms, early_stopping=stopping)
    params: dict[str, type] = {}
    for method in methods.values():
        params |= method.columns(TAPS)
    meta = {"config": to_dict(config), "sessions": [SESSION], "teacher": {"val_accuracy": 0.95, "test_accuracy": 0.94}}
    losses = sorted({loss for method in methods.values() for loss in method.losses})
    store = StudyStore.create(Storage(folder), params, losses, meta)
    searched = any(trials.values())
    backend = JournalStorage(JournalFileBackend(str(folder / "optuna.journal"))) if searched else None
    for arm, count in trials.items():
        search(store, arm, count, backend, stopping)
        for seed in range(1, seeds + 1):
            made = records(arm, 0.8, 9)
            found = row(methods[arm], seed - 1, "COMPLETE", seed, made)
            store.save("final", arm, found | {"test_accuracy": 0.8 + 0.01 * seed}, made)
    return folder


def execute(study: Path, folder: Path, arm: str) -> Any:
    """Run the notebook in a process of its own: a second kernel in one process is taken for dead by nbclient."""
    target = folder / "done.ipynb"
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(target)]
    place = os.environ | {"DFKT_STUDY": str(study), "DFKT_ARM": arm}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return nbformat.read(target, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("trials", "options", "arm", "said"),
    [
        (
            {"scratch": 0, "kd": 0, "dfkt": 18},
            {},
            "",
            [
                "of arm dfkt.",
                "dfkt: 18 trials: 9 complete",
                "early stopping:",
                "6 of 18 trials were stopped early",
                "Unreliable: only 9",
            ],
        ),
        (
            {"scratch": 0, "kd": 8, "fitnets": 8},
            {"stopping": False},
            "fitnets",
            ["of arm fitnets; DFKT_ARM may also be kd.", "Early stopping was off.", "Unreliable: only 7"],
        ),
        (
            {"scratch": 2},
            {"seeds": 1},
            "",
            ["of arm scratch.", "scratch: 2 trials: 2 complete", "Unreliable: only 2"],
        ),
        (
            {"scratch": 0, "dfkt": 0},
            {"seeds": 0},
            "",
            ["of arm scratch.", "no arm was searched", "no final runs yet", "0 of 0 trials"],
        ),
    ],
    ids=["dfkt", "two other methods, no early stopping", "one stage, one seed", "nothing yet"],
)
def test_it_runs_through_and_draws_every_figure(
    tmp_path: Path, trials: dict[str, int], options: dict[str, Any], arm: str, said: list[str]
) -> None:
    before = make_study(tmp_path / "made", trials, **options)
    files = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    found = outputs(execute(before, tmp_path, arm))

    assert not [output for output in found if output.output_type == "error"]
    assert not [output.text for output in found if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in found) == FIGURES
    text = "".join(output.text for output in found if output.output_type == "stream")
    assert [phrase for phrase in said if phrase not in text] == []
    assert {path: path.read_bytes() for path in before.rglob("*") if path.is_file()} == files


def test_without_a_study_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFKT_STUDY", str(tmp_path / "absent"))
    first = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")

    with pytest.raises(FileNotFoundError, match=r"No study in .*absent\. Run one .* or set DFKT_STUDY"):
        exec(compile(first.source, str(NOTEBOOK), "exec"), {})


def test_an_arm_that_the_study_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFKT_STUDY", str(make_study(tmp_path / "made", {"scratch": 0, "kd": 0}, seeds=0)))
    monkeypatch.setenv("DFKT_ARM", "fsp")
    first = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")

    with pytest.raises(ValueError, match="DFKT_ARM must be one of scratch, kd, but is 'fsp'"):
        exec(compile(first.source, str(NOTEBOOK), "exec"), {})


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)

    assert not outputs(notebook)
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert not re.search(r"/(home|root|work)/", NOTEBOOK.read_text())
