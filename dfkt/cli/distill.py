"""``python -m dfkt distill``: one run without a search: find the teacher, train the student, keep it, test it once.

A trial that is trained again is tested only when that is asked for: a search's trials are chosen among by ``val``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from dfkt.cli.boundary import EXIT_FAILED, say
from dfkt.cli.numbers import whole
from dfkt.cli.options import (
    add_cuda_graphs,
    add_data,
    add_device,
    add_dry_run,
    add_networks,
    add_training,
    read_placement,
    updated,
    with_choices,
)
from dfkt.cli.settings import add_settings, with_settings
from dfkt.cli.trial import Trial, find_trial
from dfkt.config import Placement, Precision, is_finite, to_dict
from dfkt.data.load import check_test
from dfkt.errors import CheckpointError, NonFiniteLossError, StudyError
from dfkt.methods.registry import METHODS, find_method
from dfkt.store.files import Storage, readable
from dfkt.store.origin import environment
from dfkt.students.cost import count
from dfkt.students.keep import Keeper, note_test
from dfkt.students.package import PACKAGE_FILES, load_student
from dfkt.training.cached import images_for, test_images_for
from dfkt.training.config import RunConfig, with_precision
from dfkt.training.evaluate import evaluate
from dfkt.training.optim import decided
from dfkt.training.progress import Progress, run_bar
from dfkt.training.run import Job, Payload, check_run, run_job
from dfkt.training.state import STATE_FILE
from dfkt.training.teacher import WEIGHTS_FILE, find_teacher

HELP = "train one student, no search"
RESULT_FILE, ABOUT_FILE = "result.json", "run.json"
OWN_FILES = (WEIGHTS_FILE, *PACKAGE_FILES, STATE_FILE, RESULT_FILE)
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
    group.add_argument(
        "--test",
        action="store_true",
        help="open the test split for a --trial too, also for one that is trained already",
    )
    add_settings(group, "the method")
    add_dry_run(group)
    group.add_argument("--seed", type=whole, help="initial weights, order of images, augmentation")
    group.add_argument("--out", default="results/distill", help="folder of the run (default: results/distill)")
    add_data(parser)
    add_networks(parser)
    add_training(parser)
    group = add_device(parser)
    group.add_argument("--checkpoint-every", type=whole, help="epochs between checkpoints (default: 1)")
    add_cuda_graphs(group)


def run(a: argparse.Namespace) -> int:
    """Train and keep one student; test it, unless it is a trial's and that was not asked for."""
    trial = None if a.trial is None else find_trial(a.trial)
    config = distill_config(a, trial)
    teacher = None
    if trial is None:
        config = _decided(config, Storage(a.out), read_placement(a).device)
    if trial is not None:
        for name in ("threads", "data_root", "teacher_root"):
            if getattr(a, name) is None:
                setattr(a, name, trial.placement.get(name))
        same = (config.teacher, config.data) == (trial.config.teacher, trial.config.data)
        teacher = trial.study if same else None
    payload = run_distill(
        config, read_placement(a), a.out, say, test=a.test or trial is None, teacher=teacher, dry=a.dry_run
    )
    return EXIT_FAILED if "failure" in payload else 0


def distill_config(a: argparse.Namespace, trial: Trial | None = None) -> RunConfig:
    """Return the run that the switches name, or make of a trial."""
    config: RunConfig = with_choices(RunConfig() if trial is None else trial.config, a)
    method = config.method
    if a.method is not None and type(method) is not (kind := find_method(a.method)):
        method = kind()
    return replace(config, method=with_settings(method, a.settings), train=updated(config.train, seed=a.seed))


def run_distill(
    config: RunConfig, placement: Placement, out: str, log: Log, *,
    test: bool = True, teacher: Storage | None = None, dry: bool = False,
) -> Payload:  # fmt: skip
    """Run one configuration in this process, from its checkpoint if an earlier attempt left one.

    Args:
        config: The run.
        placement: What it is given.
        out: Folder for configuration, checkpoint, student and result, local or any that pyarrow.fs takes.
        log: Receives the lines that a user reads.
        test: Open the test split when training is over, or for the student that an earlier call trained.
        teacher: A study's folder, whose teacher is taken if there is one.
        dry: Check everything, train and write nothing.

    Returns:
        The run's last report, as :func:`dfkt.training.run.run_job` makes it; nothing of a dry run.

    Raises:
        InputError: If anything that was asked for cannot be done, or ``out`` holds something else; nothing was trained then.
    """
    storage = Storage(out)
    _check_free(config, storage)
    with storage.lock():
        _check_free(config, storage)  # another process may have begun between the two
        data = images_for(config.data, placement)
        notes: list[str] = []
        schedule = check_run(config, data, notes.append)
        check_test(config.data, placement.data_root, data)
        storage.check_writable()
        log(data.describe())
        for note in (*data.notes, *notes):
            log(f"note: {note}")
        log("\n".join(stage.describe() for stage in schedule))
        if dry:
            return {}
        _claim(config, storage)
        known: dict[str, Any] | None = None
        if config.method.taught:
            if teacher is not None and not storage.exists(WEIGHTS_FILE) and (weights := teacher.read(WEIGHTS_FILE)):
                storage.write(WEIGHTS_FILE, weights)
            found = find_teacher(config.teacher, data, placement, log, storage)
            known = {"key": found.key, "val_accuracy": found.val_accuracy, **asdict(count(found.network, data.shape))}
        job = Job(config, placement, storage.path, storage.path, test=test, keep=Keeper(known))
        payload = _train(job, storage, log)
    if "failure" in payload:
        log(f"failed: {payload['failure']}")
    else:
        shown = f"test {100 * payload['test_accuracy']:.2f} %" if test else "test with --test"
        log(f"{config.method.name}: val {100 * payload['val_accuracy']:.2f} %, {shown}")
        log(f"student {config.student.name}: {storage.path} (dfkt.load_student); result: {RESULT_FILE}")
    return payload


def _train(job: Job, storage: Storage, log: Log) -> Payload:
    """Run a job and keep its student and its last report with all records; what is done already is read."""
    if (done := _done(job, storage, log)) is not None:
        return done
    records: dict[int, Any] = {}
    last: Payload = {}
    progress, name = Progress(), job.config.method.name

    def report(payload: Payload) -> None:
        last.clear()
        last.update(payload)
        records.update({record["index"]: record for record in payload["records"]})
        if records:
            progress.show(run_bar(name, records[max(records)], job.config.train.epochs))

    try:
        run_job(job, report)
    finally:
        progress.close()
    last["records"] = [records[index] for index in sorted(records)]
    storage.write(RESULT_FILE, json.dumps(last).encode())
    storage.delete(STATE_FILE)
    return last


def _done(job: Job, storage: Storage, log: Log) -> Payload | None:
    """Return what an earlier call kept of the run, tested if that is asked for; ``None`` if it is to be done, or done again."""
    kept = storage.read(RESULT_FILE)
    if kept is None:
        return None
    payload = _result_in(kept)
    if payload is None:
        log(f"{RESULT_FILE} is damaged: the run is done again")
    elif job.test and not {"test_accuracy", "failure"} & payload.keys():
        try:
            payload |= _test(job, storage)
        except CheckpointError as error:
            log(f"{error} The run is done again")
            return None
        storage.write(RESULT_FILE, json.dumps(payload).encode())
    return payload


def _result_in(kept: bytes) -> Payload | None:
    """Return a run's last report, or ``None`` if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(kept)
        if isinstance(found, dict) and isinstance(found.get("records"), list):
            accuracies = [found[name] for name in ("val_accuracy", "test_accuracy") if name in found]
            said = isinstance(found.get("failure"), str) or "val_accuracy" in found
            if said and all(is_finite(accuracy) for accuracy in accuracies):
                return found
    return None


def _test(job: Job, storage: Storage) -> Payload:
    """Open the test split for a student that was kept without it."""
    config, data = job.config, images_for(job.config.data, job.placement)
    torch.set_num_threads(job.placement.threads)
    network = load_student(storage).network.to(data.mean.device)
    accuracy, loss = evaluate(network, data, test_images_for(config.data, job.placement), config.train.precision)
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"The test loss is {loss:g}: the student has diverged. Train it at a lower rate.")
    note_test(storage, accuracy)
    return {"test_accuracy": accuracy, "test_loss": loss}


def _check_free(config: RunConfig, storage: Storage) -> None:
    """Refuse a folder that holds another run, or files of such names that no run wrote."""
    storage.check_folder()
    with readable(storage):
        stored = storage.read(ABOUT_FILE)
        foreign = [name for name in OWN_FILES if storage.exists(name)]
    if stored is None and foreign:
        raise StudyError(f"Folder {storage.path} holds {', '.join(foreign)}, but no {ABOUT_FILE}. Take another --out.")
    if stored is not None and (key := _key_in(stored)) != config.key:
        if key is None:
            raise StudyError(
                f"{ABOUT_FILE} in {storage.path} is damaged: it does not say which run lies there. "
                "Take another --out, or move the folder away."
            )
        raise StudyError(f"Folder {storage.path} holds another run. Take another --out.")


def _decided(config: RunConfig, storage: Storage, device: str) -> RunConfig:
    """Return a run whose precision is decided: as the run in the folder began, or what fits the device."""
    storage.check_folder()
    fitting = decided("auto", device)
    choices: tuple[Precision, ...] = (fitting, "float32", "bfloat16", "auto")
    with readable(storage):
        begun = _key_in(storage.read(ABOUT_FILE) or b"")
    found = [with_precision(config, one, one) for one in choices]
    return next((run for run in found if run.key == begun), found[0])


def _key_in(about: bytes) -> str | None:
    """Return the key that a run's description has; ``None`` if it is no run's description."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(about)
        if isinstance(found, dict) and isinstance(found.get("key"), str):
            return str(found["key"])
    return None


def _claim(config: RunConfig, storage: Storage) -> None:
    """Write the run's configuration into its folder."""
    if not storage.exists(ABOUT_FILE):
        about = {"key": config.key, "config": to_dict(config), **environment()}
        storage.write(ABOUT_FILE, json.dumps(about, indent=1).encode())
