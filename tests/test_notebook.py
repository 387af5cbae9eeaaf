"""The notebook runs through on any finished study, and is kept without outputs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dfkt.config import RunConfig, StudyConfig, TrainConfig, to_dict
from dfkt.store.study_store import StudyStore
from dfkt.methods.space import Params, SearchSpace
from dfkt.store.files import Storage

optuna.logging.set_verbosity(optuna.logging.ERROR)
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "study.ipynb"
SPACE = SearchSpace(4)
CONFIG = StudyConfig(name="made", base=RunConfig(train=TrainConfig(epochs=9)))
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
SESSION = {
    "started": "2026-01-01T00:00:00+00:00",
    "commit": None,
    "dirty": None,
    "versions": dict.fromkeys(("dfkt", "torch", "ray", "optuna"), "1.0"),
    "hardware": {"gpus": [], "cores": 2, "cpu": "a processor"},
}


def records(number: int, accuracy: float, last_epoch: int) -> list[dict[str, Any]]:
    """Return three epochs in flow stages, the others in the task stage."""
    found: list[dict[str, Any]] = []
    for epoch in range(1, last_epoch + 1):
        record: dict[str, Any] = {"number": number, "index": epoch - 1, "epoch": float(epoch), "seconds": 1.0}
        if epoch <= 3:
            record |= {"phase": "flow", "round": 1, "stage": epoch, "flow_loss": 1 / epoch, "loss": 1 / epoch}
        else:
            share = (epoch - 3) / 6
            record |= {"phase": "task", "loss": 1 - share, "rung_epoch": 9 * share, "val_accuracy": accuracy * share}
        found.append(record)
    return found


def save(store: StudyStore, number: int, params: Params, state: str, accuracy: float) -> None:
    epochs = 9 if state == "COMPLETE" else 4
    made = [] if state == "FAIL" else records(number, accuracy, epochs)
    row: dict[str, Any] = {"number": number, "state": state, "method": "dfkt", "seed": 0}
    row |= {f"param_{name}": value for name, value in params.items()}
    if made:
        last = made[-1]["val_accuracy"]
        row |= {"last_val_accuracy": last, "best_val_accuracy": last, "epochs": float(epochs)}
        row |= {"device_seconds": 1.0 * epochs, "wall_seconds": 2.0 * epochs, "peak_memory_bytes": 2**30}
    store.save_trial(row, made)


def make_study(folder: Path, count: int, *, journal: bool = True, finals: bool = True) -> Path:
    """Write a study of random samples; of every six trials two are stopped and one fails, unless there are few."""
    meta = {"name": "made", "config": to_dict(CONFIG), "sessions": [SESSION]}
    meta["teacher"] = {"network": "resnet26", "val_accuracy": 0.95, "test_accuracy": 0.94}
    store = StudyStore.create(Storage(folder), SPACE.types(), meta)
    backend = JournalStorage(JournalFileBackend(str(folder / "optuna.journal"))) if journal else None
    study = optuna.create_study(storage=backend, direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(count):
        trial = study.ask()
        params = SPACE(trial)
        state = ("COMPLETE", "COMPLETE", "PRUNED", "FAIL", "COMPLETE", "PRUNED")[number % 6]
        accuracy = 0.9 - abs(params["flow_share"] - 0.3) + 0.01 * (number % 3)
        save(store, number, params, state, accuracy)
        study.tell(trial, accuracy if state == "COMPLETE" else None, optuna.trial.TrialState[state])
    methods = ("scratch", "dfkt") if finals else ()
    for number, (method, seed) in enumerate((m, s) for s in (1, 2) for m in methods):
        row = {"number": number, "state": "COMPLETE", "method": method, "seed": seed, "device_seconds": 9.0}
        store.save_final(row | {"epochs": 9.0, "test_accuracy": 0.8 + 0.01 * number, "last_val_accuracy": 0.8})
    return folder


def execute(study: Path, folder: Path) -> Any:
    """Run the notebook in a process of its own: a second kernel in one process is taken for dead by nbclient."""
    target = folder / "done.ipynb"
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(target)]
    done = subprocess.run(
        command, env=os.environ | {"DFKT_STUDY": str(study)}, capture_output=True, text=True, check=False
    )
    return nbformat.read(target, as_version=4) if done.returncode == 0 else done.stderr


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("count", "options"),
    [(18, {}), (2, {}), (0, {"journal": False, "finals": False})],
    ids=["full", "two trials", "nothing yet"],
)
def test_it_runs_through_and_draws_every_figure(tmp_path, count, options):
    before = make_study(tmp_path / "made", count, **options)
    files = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    notebook = execute(before, tmp_path)
    assert not isinstance(notebook, str), notebook
    found = outputs(notebook)

    assert not [output for output in found if output.output_type == "error"]
    assert not [output.text for output in found if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in found) == FIGURES
    text = "".join(output.text for output in found if output.output_type == "stream")
    assert f"{count} trials: " in text
    assert "Unreliable: only" in text
    assert {path: path.read_bytes() for path in before.rglob("*") if path.is_file()} == files


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_a_study_it_says_what_to_do(tmp_path):
    message = execute(tmp_path / "absent", tmp_path)

    assert isinstance(message, str)
    assert re.search(r"No study in .*absent\. Run one .* or set DFKT_STUDY", message)


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)

    assert not outputs(notebook)
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert not re.search(r"/(home|root|work)/", NOTEBOOK.read_text())
