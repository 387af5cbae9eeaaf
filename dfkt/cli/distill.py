"""One run without a search: find the teacher, train the student, keep it, test it once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from dfkt.config import RunConfig, config_key, to_dict
from dfkt.data.load import load_data
from dfkt.errors import StudyError
from dfkt.methods.builders import build_schedule, describe, needs_teacher
from dfkt.study.recorder import ProgressLine
from dfkt.store.study_store import environment
from dfkt.store.files import Storage
from dfkt.networks.taps import group_ends, match_taps
from dfkt.training.teacher import check_checkpoint, find_teacher, publish_teacher
from dfkt.training.run import RESULT_FILE, STUDENT_FILE, Job, Payload, build_student, pick_device, run_job

Log = Callable[[str], None]


def run_distill(config: RunConfig, out: str, log: Log) -> Payload:
    """Run one configuration in this process, from its checkpoint if an earlier attempt left one.

    Args:
        config: The run.
        out: Folder for configuration, checkpoint, student and result, local or any that pyarrow.fs takes.
        log: Receives the lines that a user reads.

    Returns:
        The run's last report, as :func:`dfkt.training.run.run_job` makes it.

    Raises:
        InputError: If anything that was asked for cannot be done, or ``out`` holds another run; nothing was trained then.
    """
    storage = Storage(out)
    storage.check_writable()
    with storage.lock():
        data = load_data(config.data)
        student = build_student(config.student, data, seed=0)
        schedule = build_schedule(config, len(student.taps), group_ends(student.taps))
        if needs_teacher(config):
            check_checkpoint(config.teacher, data)
            match_taps(student.taps, build_student(config.teacher.network, data, seed=0).taps)
        _claim(config, storage)
        for note in data.notes:
            log(f"note: {note}")
        log(describe(schedule))
        if needs_teacher(config):
            publish_teacher(find_teacher(config.teacher, data.to(pick_device()), log), storage)
        last: list[Payload] = []
        job = Job(config, storage.path, storage.path, test=True)
        line = ProgressLine()

        def report(payload: Payload) -> None:
            last[:] = [payload]
            if payload["records"]:
                line.show(config.method, payload["records"][-1])

        run_job(job, report, device=pick_device())
        line.clear()
        payload = last[0] if last else json.loads(storage.read(RESULT_FILE) or b"{}")
    if "failure" in payload:
        log(f"failed: {payload['failure']}")
    else:
        log(f"{config.method}: val {100 * payload['val_accuracy']:.2f} %, test {100 * payload['test_accuracy']:.2f} %")
        log(f"student: {storage.path}/{STUDENT_FILE}, a state dict of {config.student.name}; result: {RESULT_FILE}")
    return payload


def _claim(config: RunConfig, storage: Storage) -> None:
    """Write the run's configuration into its folder, unless another run's is there."""
    wanted = replace(config, data=replace(config.data, root=""), teacher=replace(config.teacher, root=""))
    about = {"key": config_key(wanted), "config": to_dict(config), **environment()}
    stored = storage.read("run.json")
    if stored is not None and json.loads(stored)["key"] != about["key"]:
        raise StudyError(f"Folder {storage.path} holds another run. Take another --out.")
    if stored is None:
        storage.write("run.json", json.dumps(about, indent=1).encode())
