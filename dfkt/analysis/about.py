"""What figures travel with: data, networks, budget, what is missing, and what they ran on.

Made from a study's ``study.json`` as JSON values, which saved figures keep, and worded for readers. An *ablation* is the
winner of another arm with one change.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from dfkt.analysis.trust import val_error
from dfkt.store.study_store import Study
from dfkt.students.card import described

OURS, SCRATCH = "dfkt", "scratch"
About = dict[str, Any]
NOTED_ERROR = 0.005
"""Standard error of a ``val`` accuracy above which a page says so."""
LEAST_GAP = 0.01
"""A teacher that is less ahead of scratch has little to teach, and leaves no gap whose share could be told."""
_SESSION = ("commit", "dirty", "hardware", "versions", "command")
_SAME = "the searched dfkt is that already"
"""Why saved figures of format 1 skipped an arm, where they name no reason."""


def about_study(study: Study) -> About:
    """Return what is said of a study beside its figures, as JSON values.

    ``arms`` in order; ``ablations``: the parent of those that are one; ``searched``: the names of those with trials,
    made or planned; ``trials``: how many were made, by arm; ``skipped``: reasons by arm; ``title train val`` (sizes);
    ``teacher``, ``student``; ``cost``: parameters and MACs by role, where they were counted; ``epochs batch_size``;
    ``seeds`` of final runs; ``sessions``: commit, hardware, versions and command, equal ones once.
    """
    meta = study.meta
    config, data = meta["config"], meta.get("data", {})
    arms = {arm["name"]: arm for arm in config["arms"]}
    made = {name: int((study.trials.arm == name).sum()) for name in arms}
    ended = set(study.trials.arm[study.trials.state != "RUNNING"])
    known, teacher = meta.get("arms", {}), meta.get("teacher", {})
    return {
        "arms": list(arms),
        "ablations": {name: arm["parent"] for name, arm in arms.items() if arm.get("parent")},
        "searched": [name for name, arm in arms.items() if arm["trials"] or name in ended],
        "trials": made,
        "skipped": {name: known[name]["skipped"] for name in arms if known.get(name, {}).get("skipped")},
        "title": data.get("title", config["data"]["name"]),
        "train": data.get("train"),
        "val": data.get("val"),
        "teacher": _of_network(config["teacher"]["network"])
        | {name: teacher.get(name) for name in ("val_accuracy", "test_accuracy", "seconds")},
        "student": _of_network(config["student"]),
        "cost": meta.get("cost", {}),
        "epochs": config["train"]["epochs"],
        "batch_size": config["train"]["batch_size"],
        "seeds": sorted(set(study.finals.seed.dropna().tolist())),
        "sessions": _sessions(meta.get("sessions", [])),
    }


def complete_about(about: Mapping[str, Any]) -> About:
    """Return what saved figures say of a setting, with what those of before studies had arms left out."""
    arms, trials, skipped = about["arms"], about.get("trials", {}), about.get("skipped", {})
    added = {
        "ablations": {name: OURS for name in arms if name.startswith(f"{OURS}-")},
        "searched": [name for name in arms if trials.get(name)],
        "trials": {},
        "seeds": [],
    }
    return {**added, **about, "skipped": skipped if isinstance(skipped, Mapping) else dict.fromkeys(skipped, _SAME)}


def describe_setting(setting: str, about: Mapping[str, Any]) -> str:
    """Return data, networks and budget of a setting on one line."""
    if "title" not in about:
        return f"{setting}: no arm was run yet"
    teacher, student = describe_teacher(about), describe_network(about["student"])
    return f"{setting}: {describe_data(about)}; teacher {teacher}, student {student}; {describe_budget(about)}; {_trials(about)}"


def describe_budget(about: Mapping[str, Any]) -> str:
    """Return the length of the runs and their seeds."""
    seeds = f"seeds {', '.join(map(str, about['seeds']))}" if about["seeds"] else "no final run yet"
    return f"{about['epochs']:g} epochs of batch {about['batch_size']}; {seeds}"


def describe_data(about: Mapping[str, Any]) -> str:
    """Return the image set with its sizes, where they are known."""
    sizes = "" if about["train"] is None else f", {about['train']} train and {about['val']} val images"
    return f"{about['title']}{sizes}"


def describe_teacher(about: Mapping[str, Any]) -> str:
    """Return the teacher's network, with its accuracies in percent and the time that its training took, where they are known."""
    teacher = about["teacher"]
    shares = {split: teacher.get(f"{split}_accuracy") for split in ("val", "test")}
    known = [f"{split} {100 * share:.2f} %" for split, share in shares.items() if share is not None]
    known += [f"trained in {teacher['seconds']:.0f} s"] if teacher.get("seconds") else []
    return describe_network(teacher) + (f" ({', '.join(known)})" if known else "")


def describe_network(network: Mapping[str, Any]) -> str:
    """Return a network's name and, unless it is 1, its width."""
    return described(str(network["network"]), network.get("width", 1))


def setting_notes(about: Mapping[str, Any], runs: pd.DataFrame) -> list[str]:
    """Return what a reader of a setting's tables must know beside them: what is missing, failed or not alike.

    Args:
        about: What is said of the setting.
        runs: Its final runs, failed ones too.
    """
    notes, done, skipped = [], runs[runs.state == "COMPLETE"], about["skipped"]
    for reason in dict.fromkeys(skipped.values()):
        notes.append(f"not run, since {reason}: {', '.join(name for name in skipped if skipped[name] == reason)}")
    if missing := [arm for arm in about["arms"] if not (done.arm == arm).any() and arm not in skipped]:
        notes.append(f"no complete final run: {', '.join(missing)}")
    for state, word in (("FAIL", "failed"), ("RUNNING", "unfinished")):
        if found := [f"{run.arm} seed {run.seed}" for run in runs[runs.state == state].itertuples()]:
            notes.append(f"{word}, and in no table: {', '.join(found)}")
    if len(seeds := _by_seeds(done)) > 1:
        notes.append(f"not over the same seeds: {'; '.join(f'{arms} ({some})' for some, arms in seeds.items())}")
    if lengths := _other_lengths(about, done):
        notes.append(f"trained for another number of epochs: {', '.join(lengths)}")
    if different := [name for name in about.get("differences", []) if name != "train.epochs"]:
        notes.append(f"not the same in all arms: {', '.join(different)}")
    return [*notes, *_little_to_teach(about, done)]


def _little_to_teach(about: Mapping[str, Any], done: pd.DataFrame) -> Iterator[str]:
    """Say so where a teacher hardly knows more than a student learns without one."""
    taught, alone = about.get("teacher", {}).get("test_accuracy"), done[done.arm == SCRATCH].test_accuracy.mean()
    if taught is not None and taught - alone < LEAST_GAP:  # not of a mean of nothing
        yield (
            f"the teacher has {100 * taught:.2f} % on test, {SCRATCH} {100 * alone:.2f} %: it knows hardly more than a student "
            "learns by itself, so little can be gained by it; train it longer (--teacher-epochs), or take a larger one"
        )


def search_notes(about: Mapping[str, Any], trials: pd.DataFrame) -> list[str]:
    """Return what ``val`` is too small to tell apart, where a search chose by it.

    Args:
        about: What is said of the setting.
        trials: Its trials.
    """
    best = trials[trials.state == "COMPLETE"].last_val_accuracy.max()
    if not about["searched"] or not about["val"] or pd.isna(best):
        return []
    error = val_error(best, about["val"])
    if error < NOTED_ERROR:
        return []
    return [
        f"val is small: of {about['val']} images, {100 * best:.1f} % are known to ±{100 * error:.1f} points (standard error). "
        "What a search finds best there looks better than it is; the final runs have their own val beside test"
    ]


def main_arms(about: Mapping[str, Any]) -> list[str]:
    """Return the arms that are no ablations."""
    return [arm for arm in about["arms"] if arm not in about["ablations"]]


def ablations_of(about: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return by arm its ablations, for those arms that have any."""
    parents = about["ablations"]
    return {
        parent: [a for a in about["arms"] if parents.get(a) == parent] for parent in dict.fromkeys(parents.values())
    }


def reference_arms(about: Mapping[str, Any]) -> list[str]:
    """Return the arms that stand at their method's reference settings, as they were not searched."""
    return [arm for arm in main_arms(about) if arm not in about["searched"] and arm not in about["skipped"]]


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


def _trials(about: Mapping[str, Any]) -> str:
    """Return how many trials the searched arms have, and which arms are not searched."""
    counts = sorted({about["trials"].get(arm, 0) for arm in about["searched"]}) or [0]
    text = f"{' to '.join(dict.fromkeys([str(counts[0]), str(counts[-1])]))} trials per arm"
    made = [arm for arm in about["trials"] if arm not in about["searched"] and arm not in about["skipped"]]
    return text + (f" (not searched: {', '.join(made)})" if made and about["searched"] else "")


def _other_lengths(about: Mapping[str, Any], done: pd.DataFrame) -> list[str]:
    """Return the arms whose runs were not as long as the setting's, by more than the rounding to whole steps."""
    means, usual = done.groupby("arm", sort=False).epochs.mean(), about.get("epochs", float("nan"))
    return [f"{arm} ({mean:.3g})" for arm, mean in means.items() if abs(mean - usual) > 0.02 * usual]


def _by_seeds(done: pd.DataFrame) -> dict[str, str]:
    """Return the arms by the seeds of their runs, both as texts."""
    seeds = {arm: ", ".join(map(str, sorted(found))) for arm, found in done.groupby("arm", sort=False).seed}
    return {some: ", ".join(str(arm) for arm in seeds if seeds[arm] == some) for some in dict.fromkeys(seeds.values())}


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


def _sessions(sessions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the sessions ran on, equal ones once."""
    texts = [json.dumps({name: session.get(name) for name in _SESSION}) for session in sessions]
    return [json.loads(text) for text in dict.fromkeys(texts)]
