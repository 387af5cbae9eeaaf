"""Arms side by side: reads the studies of a comparison, keeps what they measured, computes over it.

A *comparison* is one ordinary study per *setting* (a data set with a teacher-student pair) and *arm* (a method, or a
variant of one)::

    comparison.json     {"format": 1, "settings": {SETTING: {"arms": [ARM, …]}}}
    SETTING/ARM/        the study; an arm that was not run yet has none

What the statistics need of it can be saved as four small files, ``about.json`` and three Parquet tables: they give the
same figures without the studies. How figures look, and what goes with them: :mod:`dfkt.analysis.tables`.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats

from dfkt.errors import StudyError
from dfkt.store.rows import trial_params
from dfkt.store.study_store import Study, read_study
from dfkt.store.files import Storage
from dfkt.analysis.tables import NOTE, about_setting, accuracy_cells, describe_setting, setting_notes, speed_cells, text_table

Place = str | os.PathLike[str] | Storage
INDEX_FILE = "comparison.json"
FORMAT = 1
SCRATCH, OURS = "scratch", "dfkt"
TOLERANCE = 1e-9
"""A level counts as reached so far below it: the mean of equal accuracies differs from them in its last bit."""

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
class Comparison:
    """What a comparison measured.

    Attributes:
        runs: A row per final run, failed ones too: ``setting arm method seed state test_accuracy last_val_accuracy
            best_val_accuracy steps images epochs device_seconds key``. Accuracies are between 0 and 1.
        trials: A row per search trial: ``setting arm number state last_val_accuracy device_seconds settings``, the last
            one as JSON.
        curves: A row per epoch record of a final run: ``setting arm seed epoch step images seconds phase stage loss
            val_accuracy``; epoch, step, images and seconds of training count from the run's begin, flow stages
            included, in which ``val_accuracy`` is null.
        about: ``settings``: per setting what was run and on what; :func:`dfkt.analysis.tables.describe_setting` words it.
    """

    runs: pd.DataFrame
    trials: pd.DataFrame
    curves: pd.DataFrame
    about: dict[str, Any]


LEAST_GAP = 0.01
"""A teacher that is less ahead of scratch leaves no gap whose share could be told."""


def is_comparison(folder: Place) -> bool:
    """Return whether a folder holds a comparison, run or saved."""
    storage = _storage(folder)
    return storage.exists(INDEX_FILE) or storage.exists("about.json")


def read_comparison(folder: Place) -> Comparison:
    """Read a comparison from its studies, finished or running, or from what :func:`save_comparison` wrote.

    Raises:
        StudyError: If the folder holds neither, or a file is damaged.
    """
    storage = _storage(folder)
    if not storage.exists(INDEX_FILE) and storage.exists("about.json"):
        return load_comparison(storage)
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in _TABLES}
    about: dict[str, Any] = {"format": FORMAT, "settings": {}}
    for setting, listed in read_json(storage, INDEX_FILE)["settings"].items():
        folders = {arm: storage.sub(setting, arm) for arm in listed["arms"]}
        studies = {arm: read_study(place) for arm, place in folders.items() if place.exists("study.json")}
        studies = _present(studies)
        for arm, study in studies.items():
            for name, table in zip(_TABLES, _tables(study), strict=True):
                parts[name].append(table.assign(setting=setting, arm=arm))
        about["settings"][setting] = {"arms": list(folders), "skipped": listed.get("skipped", [])} | about_setting(
            studies
        )
    tables = {name: _typed(name, found) for name, found in parts.items()}
    for setting, said in about["settings"].items():
        said["seeds"] = sorted(set(tables["runs"].seed[tables["runs"].setting == setting].tolist()))
    return Comparison(**tables, about=about)


def save_comparison(comparison: Comparison, folder: Place) -> None:
    """Write ``runs``, ``trials`` and ``curves`` as Parquet, then ``about.json``."""
    storage = _storage(folder)
    for name in _TABLES:
        data = getattr(comparison, name).to_parquet(None, compression="zstd", index=False)
        storage.write(f"{name}.parquet", data)
    storage.write("about.json", (json.dumps(comparison.about, indent=2) + "\n").encode())


def load_comparison(folder: Place) -> Comparison:
    """Read what :func:`save_comparison` wrote.

    Raises:
        StudyError: If a file is missing or damaged.
    """
    storage = _storage(folder)
    about, tables = read_json(storage, "about.json"), {}
    for name in _TABLES:
        data = storage.read(f"{name}.parquet")
        if data is None:
            raise StudyError(f"A saved comparison must have {name}.parquet, but {storage.path} has none.")
        try:
            tables[name] = _typed(name, [pd.read_parquet(io.BytesIO(data))])
        except (ValueError, KeyError, OSError) as error:  # pyarrow's errors are ValueErrors and OSErrors
            raise StudyError(f"{name}.parquet in {storage.path} is damaged: {error!r}.") from error
    return Comparison(**tables, about=about)


def accuracy_table(comparison: Comparison, setting: str) -> pd.DataFrame:
    """Return the test accuracies: a row per arm that has a complete final run.

    ``seeds``; ``test_mean`` and ``test_std`` (n - 1) over them; ``gain``: mean less that of scratch; ``gap_share``:
    gain / (teacher - scratch), null where the teacher is less than a point ahead; ``difference`` of dfkt less the arm over
    the seeds that both have, with its 95 % confidence interval ``low``, ``high``; ``pairs``, their number; ``device_seconds``,
    the mean. What cannot be told is null.
    """
    done = complete_runs(comparison, setting).dropna(subset="test_accuracy")
    tests = {str(arm): runs.set_index("seed").test_accuracy for arm, runs in done.groupby("arm")}
    teacher = setting_about(comparison, setting).get("teacher", {}).get("test_accuracy") or math.nan
    scratch = tests[SCRATCH].mean() if SCRATCH in tests else math.nan
    rows = []
    for arm in (arm for arm in setting_about(comparison, setting)["arms"] if arm in tests):
        test = tests[arm]
        gain = math.nan if arm == SCRATCH else test.mean() - scratch
        row = {"arm": arm, "seeds": len(test), "test_mean": test.mean(), "test_std": test.std(), "gain": gain}
        row["gap_share"] = gain / (teacher - scratch) if teacher - scratch >= LEAST_GAP else math.nan
        pairs = test.iloc[:0] if arm == OURS or OURS not in tests else (tests[OURS] - test).dropna()
        row |= dict(zip(("difference", "low", "high"), mean_interval(pairs), strict=True)) | {"pairs": len(pairs)}
        rows.append(row | {"device_seconds": done[done.arm == arm].device_seconds.mean()})
    names = "arm seeds test_mean test_std gain gap_share difference low high pairs device_seconds"
    return pd.DataFrame(rows, columns=names.split())


def mean_interval(values: pd.Series[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return mean, lower and upper end of its confidence interval by Student's t; null where there are too few.

    Example:
        >>> [round(x, 3) for x in mean_interval(pd.Series([1.0, 2.0, 3.0]))]
        [2.0, -0.484, 4.484]
    """
    if len(values) < 2:
        return float(values.mean()), math.nan, math.nan
    mean, half = float(values.mean()), float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.sem())
    return mean, mean - half, mean + half


def scratch_level(comparison: Comparison, setting: str) -> float:
    """Return the ``val`` accuracy that scratch ends with, mean over seeds; NaN without a complete run of it."""
    done = complete_runs(comparison, setting)
    return float(done[done.arm == SCRATCH].last_val_accuracy.mean())


def speed_table(comparison: Comparison, setting: str) -> pd.DataFrame:
    """Return how soon each arm's ``val`` accuracy first reaches :func:`scratch_level`, flow and hint stages counted in.

    ``seeds`` of the arm and how many ``reached`` it; medians over all its seeds of ``steps``, ``images`` and ``seconds`` of
    training, where a seed that never reaches it counts as infinitely late: null unless more than half do, so that slow
    seeds do not drop out. ``step_ratio``: steps over scratch's own, or over its full length where scratch's are null.
    Empty without scratch.
    """
    level, done = scratch_level(comparison, setting), complete_runs(comparison, setting)
    if math.isnan(level):
        done = done.iloc[:0]
    curves = complete_curves(comparison, setting).rename(columns={"step": "steps"})
    first = curves[curves.val_accuracy >= level - TOLERANCE].drop_duplicates(["arm", "seed"])
    rows = []
    for arm in (arm for arm in setting_about(comparison, setting)["arms"] if (done.arm == arm).any()):
        reached = first[first.arm == arm].set_index("seed")[["steps", "images", "seconds"]].astype("float64")
        seeds = done[done.arm == arm].seed.to_numpy()
        medians = reached.reindex(seeds, fill_value=math.inf).median().replace(math.inf, math.nan)
        rows.append({"arm": arm, "seeds": len(seeds), "reached": len(reached)} | medians.to_dict())
    table = pd.DataFrame(rows, columns=["arm", "seeds", "reached", "steps", "images", "seconds"])
    own, length = table.steps[table.arm == SCRATCH].mean(), done[done.arm == SCRATCH].steps.astype("float64").mean()
    return table.assign(step_ratio=table.steps / (length if math.isnan(own) else own))


def complete_runs(comparison: Comparison, setting: str) -> pd.DataFrame:
    """Return the final runs of a setting that ended as they should."""
    runs = comparison.runs
    return runs[(runs.setting == setting) & (runs.state == "COMPLETE")]


def complete_curves(comparison: Comparison, setting: str) -> pd.DataFrame:
    """Return the epoch records of :func:`complete_runs`, in each run's order."""
    runs = complete_runs(comparison, setting)[["arm", "seed"]]
    return comparison.curves[comparison.curves.setting == setting].merge(runs, on=["arm", "seed"])


def setting_about(comparison: Comparison, setting: str) -> dict[str, Any]:
    """Return what ``about`` says of a setting.

    Raises:
        StudyError: If there is no such setting.
    """
    known: dict[str, dict[str, Any]] = comparison.about["settings"]
    if setting not in known:
        raise StudyError(f"The setting must be one of {', '.join(known)}, but got {setting!r}.")
    return known[setting]


def comparison_report(comparison: Comparison) -> str:
    """Return every setting's tables as text, and below them what the columns mean."""
    parts = []
    for setting, about in comparison.about["settings"].items():
        runs = comparison.runs[comparison.runs.setting == setting]
        lines = [describe_setting(setting, about), *setting_notes(about, runs)]
        accuracy, speed = accuracy_table(comparison, setting), speed_table(comparison, setting)
        if len(accuracy):
            lines += ["", text_table(accuracy_cells(accuracy))]
        if len(speed):
            level = 100 * scratch_level(comparison, setting)
            lines += ["", f"until val accuracy reaches {level:.2f} %:", text_table(speed_cells(speed))]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, NOTE])


def _present(studies: Mapping[str, Study]) -> dict[str, Study]:
    """Leave out parts that were taken from another run than the present winner of ``dfkt``."""
    winner = studies[OURS].meta.get("best", {}).get("key") if OURS in studies else None
    return {arm: study for arm, study in studies.items() if study.meta.get("parent", winner) == winner}


def _tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return an arm's runs, trials and curves; final runs of an earlier winner or another method are left out."""
    finals = study.finals[study.finals.method == study.meta["config"]["base"]["method"]]
    finals = finals[finals.number.isin(study.meta.get("present_finals", finals.number))]
    texts = [json.dumps(trial_params(row), separators=(",", ":")) for _, row in study.trials.iterrows()]
    records = study.final_epochs.merge(finals[["number", "seed"]], on="number").sort_values(["number", "index"])
    curves = records.assign(seconds=records.seconds.groupby(records.number).cumsum())
    return finals, study.trials.assign(settings=texts), curves


def _typed(name: str, tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    kinds = _TABLES[name]
    rows = [table[list(kinds)].astype(kinds) for table in tables if len(table)]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=list(kinds)).astype(kinds)


def _storage(folder: Place) -> Storage:
    return folder if isinstance(folder, Storage) else Storage(folder)


def read_json(storage: Storage, name: str) -> dict[str, Any]:
    """Read ``comparison.json`` or ``about.json``.

    Raises:
        StudyError: If there is none, or it is damaged or of another format.
    """
    data = storage.read(name)
    if data is None:
        raise StudyError(f"A comparison's folder must have a {name}, but {storage.path} has none.")
    try:
        content: dict[str, Any] = json.loads(data)
        if content["format"] != FORMAT:
            raise StudyError(f"{name} must have format {FORMAT}, but {storage.path} has {content['format']!r}.")
        content["settings"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{name} in {storage.path} is damaged: {error!r}.") from error
    return content
