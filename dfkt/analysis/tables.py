"""How the figures of a comparison look as text, and what travels with them: data, networks, budget, what they ran on.

Functions of studies and of frames as :mod:`dfkt.analysis.statistics` makes them; reads no file. Accuracies come as shares and are
shown in percent, differences of them in points. What is null becomes an empty cell.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from dfkt.config import flatten
from dfkt.store.rows import align, percent
from dfkt.store.study_store import Study

NOTE = """\
test %: mean ± standard deviation over seeds of the last epoch's accuracy. gap closed: gain over scratch, as a share
of what the teacher is ahead of scratch, if that is a point or more. dfkt ahead by: mean of dfkt less the arm over the
same seeds, with its 95 % confidence interval by Student's t; it covers the seeds, not the choice of settings by one
search, and is not corrected for the number of arms. reached: seeds whose val accuracy reaches the mean that scratch
ends with; steps, images and training s: medians over all seeds until the first epoch that does, with flow and hint
stages; empty unless more than half do. of scratch's steps: those steps over scratch's own."""
"""What the columns mean."""

_ACCURACY = ("arm", "seeds", "test %", "over scratch", "gap closed", "dfkt ahead by", "device s")
_SPEED = ("arm", "reached", "steps", "images", "training s", "of scratch's steps")
_SESSION = ("commit", "dirty", "hardware", "versions", "command")
_FREE = ("data.root", "teacher.root", "train.seed", "train.checkpoint_every", "teacher.train.checkpoint_every")
"""Settings that may differ between arms without making them unequal."""


def about_setting(studies: Mapping[str, Study]) -> dict[str, Any]:
    """Return what the arms of a setting share, as JSON values, and where they differ though they should not.

    ``title train val`` (sizes), ``teacher``, ``student``, ``epochs batch_size``, ``trials`` per arm, ``differences``:
    names of settings, ``sessions``: commit, hardware, versions and command, equal ones once. Empty without studies.
    """
    metas = [study.meta for study in studies.values()]
    if not metas:
        return {}
    base, data = metas[0]["config"]["base"], metas[0].get("data", {})
    teachers = [meta["teacher"] for meta in metas if "teacher" in meta]
    tested = next((t for t in teachers if "test_accuracy" in t), teachers[0] if teachers else {})
    sessions = {_session(session): None for meta in metas for session in meta.get("sessions", [])}
    return {
        "title": data.get("title", base["data"]["name"]),
        "train": data.get("train"),
        "val": data.get("val"),
        "teacher": _of_network(base["teacher"]["network"])
        | {name: tested.get(name) for name in ("val_accuracy", "test_accuracy")},
        "student": _of_network(base["student"]),
        "epochs": base["train"]["epochs"],
        "batch_size": base["train"]["batch_size"],
        "trials": {arm: len(study.trials) for arm, study in studies.items()},
        "differences": _differences(metas),
        "sessions": [json.loads(session) for session in sessions],
    }


def accuracy_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return an accuracy table as texts."""
    rows = []
    for row in table.to_dict("records"):
        spread = "" if pd.isna(row["test_std"]) else f" ± {percent(row['test_std'])}"
        cells = {"arm": row["arm"], "seeds": str(row["seeds"]), "test %": percent(row["test_mean"]) + spread}
        cells |= {"over scratch": _points(row["gain"]), "gap closed": _number(100 * row["gap_share"], ".0f", " %")}
        rows.append(cells | {"dfkt ahead by": _difference(row), "device s": _number(row["device_seconds"], ".1f")})
    return pd.DataFrame(rows, columns=list(_ACCURACY))


def speed_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a speed table as texts."""
    rows = []
    for row in table.to_dict("records"):
        cells = {"arm": row["arm"], "reached": f"{row['reached']} of {row['seeds']}"}
        cells |= {name: _number(row[name], ".0f") for name in ("steps", "images")}
        cells |= {"training s": _number(row["seconds"], ".1f")}
        rows.append(cells | {"of scratch's steps": _number(row["step_ratio"], ".2f")})
    return pd.DataFrame(rows, columns=list(_SPEED))


def text_table(frame: pd.DataFrame) -> str:
    """Return a frame of texts with aligned columns."""
    return align([list(frame.columns), *frame.to_numpy().tolist()])


def markdown_table(frame: pd.DataFrame) -> str:
    """Return any frame as a Markdown table; null is an empty cell.

    Example:
        >>> print(markdown_table(pd.DataFrame({"arm": ["kd"], "steps": [12]})))
        | arm | steps |
        |---|---|
        | kd | 12 |
    """
    rows = [["" if pd.isna(cell) else str(cell) for cell in row] for row in frame.astype(object).to_numpy()]
    lines = [[str(name) for name in frame.columns], *rows]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([texts[0], "|---" * len(frame.columns) + "|", *texts[1:]])


def describe_setting(setting: str, about: Mapping[str, Any]) -> str:
    """Return data, networks and budget of a setting on one line."""
    if "title" not in about:
        return f"{setting}: no arm was run yet"
    data = about["title"]
    if about["train"] is not None:
        data += f", {about['train']} train and {about['val']} val images"
    teacher = about["teacher"]
    known = [
        f"{split} {percent(teacher[f'{split}_accuracy'])} %" for split in ("val", "test") if _tested(teacher, split)
    ]
    teacher_text = _network(teacher) + (f" ({', '.join(known)})" if known else "")
    budget = f"{about['epochs']:g} epochs of batch {about['batch_size']}; {_search(about['trials'])}"
    seeds = f"seeds {', '.join(map(str, about['seeds']))}" if about["seeds"] else "no final run yet"
    return f"{setting}: {data}; teacher {teacher_text}, student {_network(about['student'])}; {budget}; {seeds}"


def setting_notes(about: Mapping[str, Any], runs: pd.DataFrame) -> list[str]:
    """Return what a reader of a setting's tables must know beside them: what is missing, failed or not alike.

    Args:
        about: What is said of the setting.
        runs: Its final runs, failed ones too.
    """
    notes, done = [], set(runs[runs.state == "COMPLETE"].arm)
    if same := about.get("skipped"):
        notes.append(f"not run, since the searched dfkt is that already: {', '.join(same)}")
    if missing := [arm for arm in about["arms"] if arm not in done and arm not in about.get("skipped", [])]:
        notes.append(f"no complete final run: {', '.join(missing)}")
    if failed := [f"{run.arm} seed {run.seed}" for run in runs[runs.state == "FAIL"].itertuples()]:
        notes.append(f"failed, and in no table: {', '.join(failed)}")
    if about.get("differences"):
        notes.append(f"not the same in all arms: {', '.join(about['differences'])}")
    return notes


def describe_origin(about: Mapping[str, Any]) -> str:
    """Return commits, hardware and versions of a setting on one line."""
    sessions = about.get("sessions", [])
    commits = _distinct(_commit(session) for session in sessions)
    machines = _distinct(_machine(session["hardware"]) for session in sessions if session["hardware"])
    versions = [session["versions"] or {} for session in sessions]
    names = ("python", "torch", "ray", "optuna")
    packages = [f"{name} {' and '.join(_distinct(v.get(name) for v in versions))}" for name in names if versions]
    commit = f"commit {', '.join(commits)}" if commits else "no commit known"
    return "; ".join([commit, *machines, *([", ".join(packages)] if packages else [])])


def commands(about: Mapping[str, Any]) -> list[str]:
    """Return the commands that ran a setting, as a shell takes them."""
    given = [session["command"] for session in about.get("sessions", []) if session["command"]]
    return _distinct(shlex.join(["python", *command]) for command in given)


def _number(value: Any, form: str, unit: str = "") -> str:
    return "" if pd.isna(value) else f"{value:{form}}{unit}"


def _points(share: Any) -> str:
    return _number(100 * share, "+.2f")


def _difference(row: Mapping[Any, Any]) -> str:
    """Return ``+1.23 [+0.40, +2.06]``; fewer pairs than the arm has seeds are said so."""
    text = _points(row["difference"])
    if text and not pd.isna(row["low"]):
        text += f" [{_points(row['low'])}, {_points(row['high'])}]"
    return text + (f" ({row['pairs']} seeds)" if text and row["pairs"] < row["seeds"] else "")


def _search(trials: Mapping[str, int]) -> str:
    """Return how many trials an arm's search has; a part taken from another arm's winner has none."""
    counts = sorted({count for count in trials.values() if count}) or [0]
    text = f"{' to '.join(dict.fromkeys([str(counts[0]), str(counts[-1])]))} trials per arm"
    unsearched = [arm for arm, count in trials.items() if not count]
    return text + (f" (not searched: {', '.join(unsearched)})" if unsearched and counts != [0] else "")


def _tested(teacher: Mapping[str, Any], split: str) -> bool:
    return teacher.get(f"{split}_accuracy") is not None


def _network(network: Mapping[str, Any]) -> str:
    width = network.get("width", 1)
    return str(network["network"]) + (f" at {width:g} of its width" if width != 1 else "")


def _commit(session: Mapping[str, Any]) -> str | None:
    commit = session["commit"]
    return commit and f"{commit[:12]}{' with changes' if session['dirty'] else ''}"


def _machine(hardware: Mapping[str, Any]) -> str:
    gpus = hardware["gpus"]
    names = ", ".join(f"{gpus.count(name)} {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    return f"{hardware['cores']} cores of {hardware['cpu']}, {hardware['memory_bytes'] / 2**30:.0f} GiB, {names}"


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _of_network(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"network": config["name"], "width": config.get("width", 1.0)}


def _session(session: Mapping[str, Any]) -> str:
    """Return what a session ran on as a text, by which equal ones are found."""
    return json.dumps({name: session.get(name) for name in _SESSION})


def _differences(metas: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, set[str]] = {}
    for meta in metas:
        base = meta["config"]["base"]
        shared = flatten({name: base[name] for name in ("data", "teacher", "student", "train")})
        if "teacher" in meta:
            shared["the teacher's val accuracy"] = meta["teacher"]["val_accuracy"]
        for name, value in shared.items():
            found.setdefault(name, set()).add(json.dumps(value))
    return [name for name, values in found.items() if len(values) > 1 and name not in _FREE]
