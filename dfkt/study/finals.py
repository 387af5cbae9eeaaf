"""The final runs: the best configuration and the baselines, trained again over seeds, then tested once.

All of them run one after another on one group of Ray Train's workers. Each leaves its result as a file when it ends;
this process, the only writer of the store, takes it from there.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from dfkt.study.cluster import count_groups
from dfkt.config import RunConfig, StudyConfig, config_key, to_dict
from dfkt.methods.builders import baseline, needs_teacher
from dfkt.study.recorder import now, summarise
from dfkt.store.rows import best_trials, trial_config
from dfkt.store.study_store import StudyStore, read_study
from dfkt.store.files import Storage
from dfkt.training.loop import evaluate
from dfkt.study.driver import Workers, run_jobs
from dfkt.training.run import RESULT_FILE, Job, Payload, images_for, pick_device, teacher_for

Log = Callable[[str], None]


def run_finals(config: StudyConfig, store: StudyStore, workers: Workers, log: Log) -> bool:
    """Do the final runs that are still to be done; return whether all are.

    Args:
        config: The study.
        store: Its store; the best complete trial is read from it.
        workers: What one worker takes; the group is as large as the cluster allows.
        log: Receives a line per run.
    """
    todo = final_jobs(config, store, log)
    if not todo:
        return True
    single = replace(workers, count=1, gpus=math.ceil(workers.gpus or 0))  # NCCL takes one worker per GPU
    group = replace(single, count=count_groups(single))
    log(f"final runs: {len(todo)} on one group of {group.count} workers; test is opened at the end of each")
    with _collecting(store, todo, log):
        run_jobs(todo, group, store.storage.path, f"finals-{todo[0].number:05d}", config.max_failures)
    store.storage.sub("ray").delete_all()
    known = {row["number"] for row in store.final_rows()}
    return all(job.number in known for job in todo)


def final_jobs(config: StudyConfig, store: StudyStore, log: Log) -> list[Job]:
    """Return the final runs that are still to be done; the teacher is tested before the first of them."""
    jobs = _jobs(config, store)
    if not jobs:
        log("no trial was completed, so there is nothing to train again")
        return []
    measure_teacher(config.base, store)
    known = {row["number"] for row in store.final_rows()}
    return [job for job in jobs if job.number not in known]


def save_result(store: StudyStore, job: Job, log: Log) -> bool:
    """Write a final run into the store if its result is there; return whether it is."""
    data = Storage(job.storage).read(RESULT_FILE)
    if data is None:
        return False
    _save(store, job, json.loads(data), log)
    return True


def _jobs(config: StudyConfig, store: StudyStore) -> list[Job]:
    """Return a job per method and seed, numbered for good: one that was listed before keeps its number."""
    winner = winner_of(config, store)
    if winner is None:
        return []
    runs = [*(baseline(config.base, method) for method in config.baselines), winner]
    listed: list[str] = list(store.meta.get("finals", []))
    jobs = []
    for seed in range(1, config.seeds + 1):
        for run in runs:
            seeded = replace(run, train=replace(run.train, seed=seed))
            key = config_key(seeded)
            if key not in listed:
                listed.append(key)
            folder = store.storage.sub("finals_runs", f"{seeded.method}-seed{seed}-{key}").path
            teacher = store.storage.path if needs_teacher(seeded) else None
            jobs.append(Job(seeded, folder, teacher, listed.index(key), test=True))
    store.update_meta(finals=listed, present_finals=[job.number for job in jobs])
    return jobs


def winner_of(config: StudyConfig, store: StudyStore) -> RunConfig | None:
    """Return the best trial's configuration, or the study's own where nothing is searched; ``None`` without any."""
    if config.trials == 0:
        number, winner = None, config.base
    else:
        study = read_study(store.storage)
        best = best_trials(study.trials, 1)
        if best.empty:
            return None
        number, winner = int(best.iloc[0].number), trial_config(study)
    store.update_meta(best={"trial": number, "key": config_key(winner), "config": to_dict(winner)})
    return winner


@contextlib.contextmanager
def _collecting(store: StudyStore, jobs: Sequence[Job], log: Log) -> Iterator[None]:
    """While final runs go on, write each into the store as its result appears."""
    left = {job.number: job for job in jobs}
    over = threading.Event()

    def collect() -> None:
        for number, job in list(left.items()):
            if save_result(store, job, log):
                del left[number]

    def watch() -> None:
        while not over.wait(0.5):
            collect()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        collect()


def _save(store: StudyStore, job: Job, payload: Payload, log: Log) -> None:
    failure, records = payload.get("failure"), payload["records"]
    row: dict[str, Any] = {"number": job.number, "method": job.config.method, "seed": job.config.train.seed}
    row |= summarise(records, payload) | {"key": config_key(job.config), "ended": now()}
    row |= {"attempts": payload["attempts"], "started": datetime.fromisoformat(payload["started"])}
    row |= {name: payload[name] for name in ("test_accuracy", "test_loss") if name in payload}
    row |= {"state": "FAIL" if failure else "COMPLETE", "error": failure}
    store.save_final(row, records)
    Storage(job.storage).delete("state.pt")
    outcome = f"failed: {failure}" if failure else f"test {100 * payload['test_accuracy']:.2f} %"
    log(f"final {job.config.method} seed {job.config.train.seed}: {outcome}, {payload['wall_seconds']:.0f} s")


def measure_teacher(base: RunConfig, store: StudyStore) -> None:
    """Measure the teacher on ``test``, once; nothing is chosen by it."""
    teacher = store.meta["teacher"]
    if "test_accuracy" in teacher:
        return
    key = teacher["key"], config_key(base.data)
    if key not in _TESTED:
        data = images_for(base.data, pick_device(), test=True)
        assert data.test is not None
        network = teacher_for(base.teacher, data, store.storage.path).network
        _TESTED[key], _ = evaluate(network, data, data.test, base.train)
    store.update_meta(teacher=teacher | {"test_accuracy": _TESTED[key]})


_TESTED: dict[tuple[str, str], float] = {}
"""Accuracies of this process's teachers on ``test``, so that the arms of a comparison open it once."""
