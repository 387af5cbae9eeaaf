"""``python -m dfkt distill``: one run without a search: find the teacher, train the student, keep it, test it once."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dfkt.cli.main import EXIT_FAILED, say
from dfkt.cli.options import (
    add_data,
    add_device,
    add_networks,
    add_training,
    read_placement,
    updated,
    with_choices,
)
from dfkt.cli.settings import add_settings, with_settings
from dfkt.config import Placement, from_dict, to_dict
from dfkt.errors import StudyError
from dfkt.methods.registry import METHODS, find_method
from dfkt.store.files import Storage
from dfkt.store.origin import environment
from dfkt.store.rows import best_trials, row_settings
from dfkt.store.study_store import read_study
from dfkt.training.config import RunConfig
from dfkt.training.progress import ProgressLine
from dfkt.training.run import STUDENT_FILE, Job, Payload, check_run, images_for, run_job
from dfkt.training.state import STATE_FILE
from dfkt.training.teacher import WEIGHTS_FILE, find_teacher

HELP = "train one student, no search"
RESULT_FILE, ABOUT_FILE = "result.json", "run.json"
OWN_FILES = (WEIGHTS_FILE, STUDENT_FILE, STATE_FILE, RESULT_FILE)
Log = Callable[[str], None]


def add_switches(parser: argparse.ArgumentParser) -> None:
    """Add the command's switches."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method", help=f"{', '.join(METHODS)}, or package.module:Class (default: dfkt, or the trial's)"
    )
    group.add_argument(
        "--trial", metavar="STUDY[:ARM][:NUMBER]", help="begin with a trial of a study, by default the best"
    )
    add_settings(group, "the method")
    group.add_argument("--seed", type=int, help="initial weights, order of images, augmentation")
    group.add_argument("--out", default="results/distill", help="folder of the run (default: results/distill)")
    add_data(parser)
    add_networks(parser)
    add_training(parser)
    add_device(parser)


def run(a: argparse.Namespace) -> int:
    """Train, keep and test one student."""
    payload = run_distill(distill_config(a), read_placement(a), a.out, say)
    return EXIT_FAILED if "failure" in payload else 0


def distill_config(a: argparse.Namespace) -> RunConfig:
    """Return the run that the switches name."""
    config: RunConfig = with_choices(RunConfig() if a.trial is None else find_trial(a.trial), a)
    method = config.method
    if a.method is not None and type(method) is not (kind := find_method(a.method)):
        method = kind()
    return replace(config, method=with_settings(method, a.settings), train=updated(config.train, seed=a.seed))


def find_trial(text: str) -> RunConfig:
    """Return the configuration of a study's trial, named ``FOLDER[:ARM][:NUMBER]``; by default the best one.

    Raises:
        StudyError: If there is no such study, arm or trial, or none is complete.
    """
    folder, arm, number = split_trial(text)
    study = read_study(folder)
    arms = {entry["name"]: entry for entry in study.meta["config"]["arms"]}
    if arm not in (None, *arms):
        raise StudyError(f"Study {study.name} has the arms {', '.join(arms)}, but {text!r} names {arm}.")
    trials = study.trials if arm is None else study.trials[study.trials.arm == arm]
    rows = best_trials(trials, 1) if number is None else trials[trials.number == number]
    if rows.empty:
        what, of = "complete trial" if number is None else f"trial {number}", "" if arm is None else f" of arm {arm}"
        counts = study.trials.arm.value_counts()
        have = ", ".join(f"{counts.get(name, 0)} of {name}" for name in arms)
        raise StudyError(f"Study {study.name} has no {what}{of}. Its trials are {have}.")
    if len(rows) > 1:
        raise StudyError(
            f"Study {study.name} has a trial {number} in {', '.join(rows.arm)}. Name it FOLDER:ARM:NUMBER."
        )
    row = rows.iloc[0]
    shared = {name: study.meta["config"][name] for name in ("data", "teacher", "student", "train")}
    config = from_dict(RunConfig, shared | {"method": row_settings(row)})
    return replace(config, train=updated(config.train, epochs=arms[row.arm]["epochs"]))


def split_trial(text: str) -> tuple[str, str | None, int | None]:
    """Return folder, arm and number of ``FOLDER[:ARM][:NUMBER]``; the folder may be a URI."""
    arm = number = None
    folder, _, tail = text.rpartition(":")
    if folder and tail.isdecimal():
        text, number = folder, int(tail)
    if ":" in text.rpartition("/")[2] and not Storage(text).exists("study.json"):
        text, _, arm = text.rpartition(":")
    return text, arm, number


def run_distill(config: RunConfig, placement: Placement, out: str, log: Log) -> Payload:
    """Run one configuration in this process, from its checkpoint if an earlier attempt left one.

    Args:
        config: The run.
        placement: What it is given.
        out: Folder for configuration, checkpoint, student and result, local or any that pyarrow.fs takes.
        log: Receives the lines that a user reads.

    Returns:
        The run's last report, as :func:`dfkt.training.run.run_job` makes it.

    Raises:
        InputError: If anything that was asked for cannot be done, or ``out`` holds something else; nothing was trained then.
    """
    storage = Storage(out)
    _check_free(config, storage)
    with storage.lock():
        _check_free(config, storage)  # another process may have begun between the two
        data = images_for(config.data, placement)
        schedule = check_run(config, data)
        storage.check_writable()
        _claim(config, storage)
        log(data.describe())
        for note in data.notes:
            log(f"note: {note}")
        log("\n".join(stage.describe() for stage in schedule))
        if config.method.taught:
            find_teacher(config.teacher, data, placement, log, storage)
        payload = _train(Job(config, placement, storage.path, storage.path, test=True), storage)
    if "failure" in payload:
        log(f"failed: {payload['failure']}")
    else:
        val, test = (100 * payload[f"{split}_accuracy"] for split in ("val", "test"))
        log(f"{config.method.name}: val {val:.2f} %, test {test:.2f} %")
        log(f"student: {storage.path}/{STUDENT_FILE}, a state dict of {config.student.name}; result: {RESULT_FILE}")
    return payload


def _train(job: Job, storage: Storage) -> Payload:
    """Run a job and keep its last report with all records; one that is done already is read."""
    kept = storage.read(RESULT_FILE)
    if kept is not None:
        payload: Payload = json.loads(kept)
        return payload
    records: dict[int, Any] = {}
    last: Payload = {}
    line = ProgressLine()

    def report(payload: Payload) -> None:
        last.clear()
        last.update(payload)
        records.update({record["index"]: record for record in payload["records"]})
        if records:
            line.show(job.config.method.name, records[max(records)])

    run_job(job, report)
    line.clear()
    last["records"] = [records[index] for index in sorted(records)]
    storage.write(RESULT_FILE, json.dumps(last).encode())
    return last


def _check_free(config: RunConfig, storage: Storage) -> None:
    """Refuse a folder that holds another run, or files of such names that no run wrote."""
    stored = storage.read(ABOUT_FILE)
    if stored is not None:
        if _key_in(stored) != config.key:
            raise StudyError(f"Folder {storage.path} holds another run. Take another --out.")
    elif foreign := [name for name in OWN_FILES if storage.exists(name)]:
        raise StudyError(f"Folder {storage.path} holds {', '.join(foreign)}, but no {ABOUT_FILE}. Take another --out.")


def _key_in(about: bytes) -> Any:
    """Return the key that a run's description has; ``None`` if it is no run's description."""
    with contextlib.suppress(ValueError):
        found = json.loads(about)
        return found.get("key") if isinstance(found, dict) else None
    return None


def _claim(config: RunConfig, storage: Storage) -> None:
    """Write the run's configuration into its folder."""
    if not storage.exists(ABOUT_FILE):
        about = {"key": config.key, "config": to_dict(config), **environment()}
        storage.write(ABOUT_FILE, json.dumps(about, indent=1).encode())
