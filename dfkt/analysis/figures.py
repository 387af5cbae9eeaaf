"""What finished studies measured: reads them, and keeps and reads their figures.

A *setting* is one study as seen beside others: an image set with a teacher and a student network. A folder holds one study
(``study.json``) or several, a sub-folder each. What the statistics need of them can be saved as four small files,
``about.json`` and three Parquet tables: they give the same figures without the studies.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dfkt.analysis.about import About, about_study, complete_about
from dfkt.errors import StudyError
from dfkt.store.files import Storage
from dfkt.store.rows import trial_params
from dfkt.store.study_store import Study, read_study, studies_below

Place = str | os.PathLike[str] | Storage
ABOUT_FILE = "about.json"
FORMAT = 1

_TABLES: dict[str, dict[str, str]] = {
    "runs": dict.fromkeys(["setting", "arm", "method"], "str")
    | {"seed": "int64", "state": "str"}
    | dict.fromkeys(["test_accuracy", "last_val_accuracy", "best_val_accuracy"], "float64")
    | {"steps": "Int64", "images": "Int64", "epochs": "float64", "device_seconds": "float64", "key": "str"},
    "trials": {"setting": "str", "arm": "str", "number": "int64", "state": "str"}
    | {"last_val_accuracy": "float64", "device_seconds": "float64", "settings": "str"},
    "curves": {"setting": "str", "arm": "str", "seed": "int64", "epoch": "float64", "step": "Int64", "images": "Int64"}
    | {"seconds": "float32", "phase": "str", "stage": "Int64", "loss": "float32", "val_accuracy": "float64"},
}


@dataclass(frozen=True, eq=False)
class Figures:
    """What one or several studies measured.

    Attributes:
        runs: A row per final run of a present winner, failed ones too: ``setting arm method seed state test_accuracy
            last_val_accuracy best_val_accuracy steps images epochs device_seconds key``. Accuracies are between 0 and 1.
        trials: A row per search trial: ``setting arm number state last_val_accuracy device_seconds settings``, the last
            one as JSON.
        curves: A row per epoch record of a final run: ``setting arm seed epoch step images seconds phase stage loss
            val_accuracy``; epoch, step, images and seconds of training count from the run's begin, flow stages
            included, in which ``val_accuracy`` is null.
        about: ``settings``: per setting what :func:`dfkt.analysis.about.about_study` says.
    """

    runs: pd.DataFrame
    trials: pd.DataFrame
    curves: pd.DataFrame
    about: dict[str, Any]


def read_studies(folder: Place) -> dict[str, Study]:
    """Read the study in a folder, or all those directly below it, finished or running; by setting.

    Raises:
        StudyError: If there is none, or a file is damaged.
    """
    storage = to_storage(folder)
    if storage.exists("study.json"):
        study = read_study(storage, "config")
        return {study.name: study}
    found = {place.split()[1]: read_study(place, "config") for place in studies_below(storage)}
    if not found:
        raise StudyError(
            f"A folder must hold a study (study.json), several below it, or saved figures (about.json), but {storage.path} "
            "holds none of them."
        )
    return found


def read_figures(folder: Place) -> Figures:
    """Read the figures of a study's folder, of one that holds several, or of what :func:`save_figures` wrote.

    Raises:
        StudyError: If the folder holds none of these, or a file is damaged.
    """
    storage = to_storage(folder)
    if storage.exists(ABOUT_FILE) and not storage.exists("study.json"):
        return load_figures(storage)
    return study_figures(read_studies(storage))


def study_figures(studies: Mapping[str, Study]) -> Figures:
    """Return the figures of studies, by setting; final runs of an earlier winner are left out."""
    tables = [_tables(setting, study) for setting, study in studies.items()]
    about = {"format": FORMAT, "settings": {setting: about_study(study) for setting, study in studies.items()}}
    return Figures(**{name: _typed(name, [found[name] for found in tables]) for name in _TABLES}, about=about)


def save_figures(figures: Figures, folder: Place) -> None:
    """Write ``runs``, ``trials`` and ``curves`` as Parquet, then ``about.json``."""
    storage = to_storage(folder)
    for name in _TABLES:
        data = getattr(figures, name).to_parquet(None, compression="zstd", index=False)
        storage.write(f"{name}.parquet", data)
    storage.write(ABOUT_FILE, (json.dumps(figures.about, indent=2) + "\n").encode())


def load_figures(folder: Place) -> Figures:
    """Read what :func:`save_figures` wrote.

    Raises:
        StudyError: If a file is missing or damaged.
    """
    storage = to_storage(folder)
    about, tables = _read_about(storage), {}
    for name in _TABLES:
        data = storage.read(f"{name}.parquet")
        if data is None:
            raise StudyError(f"Saved figures must have {name}.parquet, but {storage.path} has none.")
        try:
            tables[name] = _typed(name, [pd.read_parquet(io.BytesIO(data))])
        except (ValueError, KeyError, OSError) as error:  # pyarrow's errors are ValueErrors and OSErrors
            raise StudyError(f"{name}.parquet in {storage.path} is damaged: {error!r}.") from error
    return Figures(**tables, about=about)


def complete_runs(figures: Figures, setting: str) -> pd.DataFrame:
    """Return the final runs of a setting that ended as they should."""
    runs = figures.runs
    return runs[(runs.setting == setting) & (runs.state == "COMPLETE")]


def complete_curves(figures: Figures, setting: str) -> pd.DataFrame:
    """Return the epoch records of :func:`complete_runs`, in each run's order."""
    runs = complete_runs(figures, setting)[["arm", "seed"]]
    return figures.curves[figures.curves.setting == setting].merge(runs, on=["arm", "seed"])


def setting_about(figures: Figures, setting: str) -> About:
    """Return what ``about`` says of a setting.

    Raises:
        StudyError: If there is no such setting.
    """
    known: dict[str, About] = figures.about["settings"]
    if setting not in known:
        raise StudyError(f"The setting must be one of {', '.join(known)}, but got {setting!r}.")
    return known[setting]


def _tables(setting: str, study: Study) -> dict[str, pd.DataFrame]:
    """Return a study's runs, trials and curves."""
    present = {arm: said["present"] for arm, said in study.meta.get("arms", {}).items() if "present" in said}
    finals = study.finals
    kept = [row.arm not in present or row.number in present[row.arm] for row in finals.itertuples()]
    finals = finals[np.array(kept, dtype=bool)]
    texts = [json.dumps(trial_params(row), separators=(",", ":")) for _, row in study.trials.iterrows()]
    records = study.final_epochs.merge(finals[["arm", "number", "seed"]], on=["arm", "number"])
    spent = records.seconds.groupby([records.arm, records.number]).cumsum()
    found = {"runs": finals, "trials": study.trials.assign(settings=texts), "curves": records.assign(seconds=spent)}
    return {name: table.assign(setting=setting) for name, table in found.items()}


def _typed(name: str, tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    kinds = _TABLES[name]
    rows = [table[list(kinds)].astype(kinds) for table in tables if len(table)]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=list(kinds)).astype(kinds)


def to_storage(folder: Place) -> Storage:
    """Return a folder as a :class:`dfkt.store.files.Storage`."""
    return folder if isinstance(folder, Storage) else Storage(folder)


def _read_about(storage: Storage) -> dict[str, Any]:
    data = storage.read(ABOUT_FILE)
    if data is None:
        raise StudyError(f"Saved figures must have an {ABOUT_FILE}, but {storage.path} has none.")
    try:
        content: dict[str, Any] = json.loads(data)
        if content["format"] != FORMAT:
            raise StudyError(f"{ABOUT_FILE} must have format {FORMAT}, but {storage.path} has {content['format']!r}.")
        settings = {setting: complete_about(about) for setting, about in content["settings"].items()}
        return content | {"settings": settings}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{ABOUT_FILE} in {storage.path} is damaged: {error!r}.") from error
