"""Ray Tune + Optuna: run or resume one study.

The study's folder is the only truth. Running a study means: read what is finished, finish the rest, then the final runs.
So a first run, a resumed one and an extended one are the same thing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray import tune

from dfkt.config import StudyConfig, config_key, flatten, to_dict
from dfkt.data import ImageSet, load_data
from dfkt.errors import ConfigError, StudyError
from dfkt.methods import baseline, build_schedule, needs_teacher
from dfkt.report import best_trials, trial_params
from dfkt.results import Study, StudyStore, environment, read_study
from dfkt.search import METRIC, build_scheduler, build_search, open_optuna, reconcile
from dfkt.space import SearchSpace, describe_params, resolve
from dfkt.storage import Storage
from dfkt.taps import group_ends, match_taps
from dfkt.teacher import Teacher, check_checkpoint, find_teacher, publish_teacher
from dfkt.train import evaluate
from dfkt.trial import TRAIN_ENVIRONMENT, Driver, Workers, run_jobs
from dfkt.worker import RESULT_FILE, Job, Payload, build_student, images_for, pick_device, teacher_for

Log = Callable[[str], None]
EXTENDABLE = ("trials", "seeds", "max_failures", "baselines", "base.data.root", "base.teacher.root")
"""Settings that may differ between two runs of one study."""
LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
} | TRAIN_ENVIRONMENT


@dataclass(frozen=True)
class StudyResult:
    """How a study ended.

    Attributes:
        study: Its tables.
        interrupted: Whether it was stopped before everything was done.
        failures: Trials and final runs that failed, in this run or earlier.
    """

    study: Study
    interrupted: bool
    failures: int


@dataclass(frozen=True)
class _Plan:
    """A study that was checked and may start."""

    config: StudyConfig
    storage: Storage
    store: StudyStore
    data: ImageSet
    space: SearchSpace


def run_study(
    config: StudyConfig,
    results: str,
    *,
    workers: Workers | None = None,
    address: str | None = None,
    log: Log = print,
) -> StudyResult:
    """Run a study to its end: first run, resumed or extended.

    Args:
        config: The study.
        results: Folder that holds studies, local or any that pyarrow.fs takes; this one gets a folder of its name there.
        workers: What one trial spans; by default one CPU, or one GPU where the cluster has them.
        address: The Ray cluster to use; ``None`` uses the one around this process, or starts one on this machine.
        log: Receives the lines that a user reads.

    Raises:
        InputError: If anything that was asked for cannot be done; nothing was trained then.
    """
    storage = Storage(results).sub(config.name)
    storage.check_writable()
    with storage.lock():
        plan = _plan(config, storage, log)
        with cluster(address):
            workers = fit_workers(workers)
            device = pick_device()
            data = plan.data.to(device)
            teacher = find_teacher(config.base.teacher, data, log)
            _keep_teacher(plan, teacher)
            finished = _search(plan, workers, log) and _finals(plan, workers, log)
        study = read_study(storage)
        failures = int((study.trials.state == "FAIL").sum() + (study.finals.state == "FAIL").sum())
        return StudyResult(study, not finished, failures)


def _plan(config: StudyConfig, storage: Storage, log: Log) -> _Plan:
    """Check everything that can be checked before work starts, and open or create the store."""
    data = load_data(config.base.data)
    for note in data.notes:
        log(f"note: {note}")
    space = check_networks(config, data)
    meta = {"config": to_dict(config), "data": _about_data(data)}
    if storage.exists("study.json"):
        store = StudyStore.open(storage)
        check_same(store.meta["config"], meta["config"], storage.path)
        if store.meta["data"] != meta["data"]:
            raise StudyError(
                f"The images must be those the study began with, {store.meta['data']}, not {meta['data']}."
            )
        store.update_meta(config=meta["config"])
    else:
        store = StudyStore.create(storage, space.types(), meta | {"sessions": []})
    sessions = [*store.meta["sessions"], {"started": _now().isoformat(), **environment()}]
    store.update_meta(sessions=sessions)
    return _Plan(config, storage, store, data, space)


def check_networks(config: StudyConfig, data: ImageSet) -> SearchSpace:
    """Build both networks once, match their taps and try the schedules; return the search space."""
    base = config.base
    student = build_student(base.student, data, seed=0)
    check_checkpoint(base.teacher, data)
    teacher = build_student(base.teacher.network, data, seed=0)
    match_taps(student.taps, teacher.taps)
    space = SearchSpace(len(student.taps), config.weights)
    for method in ("dfkt", *config.baselines):
        run = baseline(base, method) if method != "dfkt" else replace(base, flow=replace(base.flow, pattern="adjacent"))
        build_schedule(run, len(student.taps), group_ends(student.taps))
    return space


def check_same(stored: dict[str, Any], wanted: dict[str, Any], path: str) -> None:
    """Refuse a configuration under the name of another one.

    Raises:
        StudyError: If a setting differs that a study cannot change; the differences are listed.
    """
    old, new = flatten(stored), flatten(wanted)
    changed = [n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n) and n not in EXTENDABLE]
    if changed:
        shown = "; ".join(f"{n} was {old.get(n)!r}, is {new.get(n)!r}" for n in changed)
        raise StudyError(
            f"Study {path} has another configuration ({shown}). Take another --name, or the settings it has."
        )


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine, quietly; shut down what was started."""
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    forwarded = {
        n: v for n, v in os.environ.items() if n.startswith(("GLOO_SOCKET", "NCCL_SOCKET"))
    } | LOCAL_ENVIRONMENT
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {} if address else {"include_dashboard": True, "object_store_memory": 200 * 2**20}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": forwarded},
            **options,
        )
    except ConnectionError as error:
        raise ConfigError(f"No Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def fit_workers(wanted: Workers | None) -> Workers:
    """Return what one trial spans, checked against the cluster.

    Raises:
        ConfigError: If the cluster has not that many CPUs or GPUs.
    """
    has = ray.cluster_resources()
    workers = wanted or Workers(gpus=1 if has.get("GPU", 0) >= 1 else 0)
    for name, each in workers.resources.items():
        need, have = each * workers.count, has.get(name, 0)
        if need > have:
            raise ConfigError(
                f"A trial of {workers.count} workers takes {need:g} {name}, but the cluster has {have:g}. "
                "Lower --workers-per-trial."
            )
    return workers


def count_groups(workers: Workers) -> int:
    """Return how many groups of such workers the cluster holds at once."""
    has = ray.cluster_resources()
    return min(int(has.get(name, 0) // (each * workers.count)) for name, each in workers.resources.items() if each)


def _keep_teacher(plan: _Plan, teacher: Teacher) -> None:
    """Note which teacher the study has, and leave it where every worker finds it."""
    known = plan.store.meta.get("teacher")
    if known and known["key"] != teacher.key:
        raise StudyError(f"The study's teacher must stay {known['key']}, but {teacher.key} was found.")
    about = {"key": teacher.key, "network": plan.config.base.teacher.network.name, "val_accuracy": teacher.val_accuracy}
    plan.store.update_meta(teacher=(known or {}) | about)
    publish_teacher(teacher, plan.storage)


def _search(plan: _Plan, workers: Workers, log: Log) -> bool:
    """Run the trials that are still to be done; return whether all are."""
    rows = plan.store.trial_rows()
    journal = _journal(plan.storage)
    optuna_study = open_optuna(plan.config, journal, plan.space)
    unfinished = reconcile(optuna_study, rows)
    done = [row for row in rows if row["state"] != "RUNNING"]
    missing = plan.config.trials - len(done)
    if missing <= 0:
        return True
    limit = min(count_groups(workers), missing)
    again = f", {len(done)} done before, {len(unfinished)} to be taken up again" if rows else ""
    log(f"search: {plan.config.trials} trials{again}, {limit} at a time")
    driver = Driver(plan.config.base, plan.storage.path, workers, plan.config.max_failures)
    recorder = Recorder(plan.store, plan.config, journal, log)
    tuner = tune.Tuner(
        driver.trainable(),
        tune_config=tune.TuneConfig(
            search_alg=build_search(plan.config, journal, plan.space, unfinished),
            scheduler=build_scheduler(
                plan.config, done, {r["number"]: plan.store.trial_epochs(r["number"]) for r in done}
            ),
            num_samples=missing,
            max_concurrent_trials=limit,
            reuse_actors=workers.count == 1,
            trial_name_creator=lambda trial: f"trial-{trial.config['number']:05d}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:05d}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=plan.storage.sub("ray").path,
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=plan.config.max_failures),
            verbose=0,
        ),
    )
    tuner.fit()
    plan.storage.sub("ray").delete_all()
    return sum(row["state"] != "RUNNING" for row in plan.store.trial_rows()) >= plan.config.trials


class Recorder(tune.Callback):
    """Writes every trial into the store as it starts and as it ends, and prints a line for each that ended."""

    def __init__(self, store: StudyStore, config: StudyConfig, journal: Path, log: Log) -> None:
        self.store, self.config, self.journal, self.log = store, config, journal, log
        self.rows = {row["number"]: row for row in store.trial_rows() if row["state"] == "RUNNING"}
        self.records: dict[int, dict[int, dict[str, Any]]] = {}
        self.payloads: dict[int, Payload] = {}
        self.done = sum(row["state"] != "RUNNING" for row in store.trial_rows())
        self.line = ProgressLine()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a running trial; a restart adds an attempt."""
        params = dict(trial.config)
        number = params.pop("number")
        run = resolve(params, self.config.base)
        old = self.rows.get(number, {"attempts": 0, "started": _now()})
        row = {
            "number": number,
            "state": "RUNNING",
            "method": run.method,
            "seed": run.train.seed,
            "key": config_key(run),
        }
        row |= {f"param_{name}": value for name, value in params.items()}
        row |= {"attempts": old["attempts"] + 1, "started": old["started"]}
        self.rows[number] = row
        self.store.save_trial(row)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Payload, **info: Any) -> None:
        """Keep what a trial reports until it ends."""
        number = trial.config["number"]
        kept = self.records.setdefault(number, {})
        kept |= {record["index"]: record for record in result.get("records", ())}
        self.payloads[number] = result
        if kept:
            self.line.show(self.done, self.config.trials, number, kept[max(kept)])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a trial that ran to its end, failed by itself, or was stopped by the scheduler."""
        payload = self.payloads.get(trial.config["number"], {})
        failure = payload.get("failure")
        state = "FAIL" if failure else "COMPLETE" if payload.get("complete") else "PRUNED"
        self._finish(trial.config, state, failure)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Write the row of a trial whose process raised or died too often."""
        error = trial.get_error() or trial.get_pickled_error()
        self._finish(trial.config, "FAIL", _last_line(str(error)))

    def _finish(self, params: dict[str, Any], state: str, error: str | None) -> None:
        number = params["number"]
        records = list(self.records.pop(number, {}).values())
        row = self.rows.pop(number) | summarise(records, self.payloads.pop(number, {}))
        row |= {"state": state, "error": error, "ended": _now()}
        row["wall_seconds"] = (row["ended"] - row["started"]).total_seconds()
        self.store.save_trial(row, records)
        self.store.storage.sub("runs", f"trial-{number:05d}").delete_all()
        if not self.store.storage.is_local:
            self.store.storage.write("optuna.journal", self.journal.read_bytes())
        self.done += 1
        self.line.clear()
        self.log(_trial_line(row, params, self.done, self.config.trials))


class ProgressLine:
    """One line on a terminal that is written over and over; silent elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def show(self, done: int, total: int, number: int, record: dict[str, Any]) -> None:
        """Show how far the study is and what was heard last."""
        if self.live:
            place = f"round {record['round']} stage {record['stage']}" if record["phase"] == "flow" else "task stage"
            text = f"{done}/{total} trials; trial {number}: epoch {record['epoch']:.1f}, {place}, loss {record['loss']:.3f}"
            sys.stderr.write(f"\r\x1b[K{text[:110]}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Wipe the line, so that a lasting one can be printed."""
        if self.live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def summarise(records: Sequence[dict[str, Any]], payload: Payload) -> dict[str, Any]:
    """Return a row's measurements from a run's records and its last report; what was not measured is absent."""
    summary = {n: payload[n] for n in ("device_seconds", "peak_memory_bytes", "workers") if n in payload}
    if records:
        last = records[-1]
        summary |= {"epochs": last["epoch"], "steps": last["step"], "images": last["images"]}
    judged = [r for r in records if r.get(METRIC) is not None]
    if judged:
        best = max(judged, key=lambda r: r[METRIC] if math.isfinite(r[METRIC]) else -1.0)
        summary |= {
            "last_val_accuracy": judged[-1][METRIC],
            "best_val_accuracy": best[METRIC],
            "best_epoch": best["epoch"],
        }
    return summary


def _finals(plan: _Plan, workers: Workers, log: Log) -> bool:
    """Train the best configuration and the baselines over the seeds, and open ``test`` for them; return whether all ended."""
    jobs = _final_jobs(plan)
    if jobs is None:
        log("no trial was completed, so there is nothing to train again")
        return True
    _test_teacher(plan)
    known = {row["number"] for row in plan.store.final_rows()}
    todo = [job for job in jobs if job.number not in known]
    if not todo:
        return True
    group = replace(workers, count=max(1, count_groups(replace(workers, count=1))))
    log(f"final runs: {len(todo)} on one group of {group.count} workers; test is opened at the end of each")
    with _collecting(plan, todo, log):
        run_jobs(todo, group, plan.storage.path, f"finals-{todo[0].number:05d}", plan.config.max_failures)
    known = {row["number"] for row in plan.store.final_rows()}
    return all(job.number in known for job in todo)


def _final_jobs(plan: _Plan) -> list[Job] | None:
    """Return a job per method and seed, numbered for good: one that was listed before keeps its number."""
    study = read_study(plan.storage)
    best = best_trials(study.trials, 1)
    if best.empty:
        return None
    winner = resolve(trial_params(best.iloc[0]), plan.config.base)
    plan.store.update_meta(best={"trial": int(best.iloc[0].number), "config": to_dict(winner)})
    runs = {method: baseline(plan.config.base, method) for method in plan.config.baselines} | {"dfkt": winner}
    listed: list[str] = plan.store.meta.get("finals", [])
    jobs = []
    for seed in range(1, plan.config.seeds + 1):
        for run in runs.values():
            seeded = replace(run, train=replace(run.train, seed=seed))
            key = config_key(seeded)
            if key not in listed:
                listed = [*listed, key]
            folder = plan.storage.sub("finals_runs", f"{seeded.method}-seed{seed}-{key}")
            teacher = plan.storage.path if needs_teacher(seeded) else None
            jobs.append(Job(seeded, folder.path, teacher, listed.index(key), test=True))
    plan.store.update_meta(finals=listed)
    return jobs


@contextlib.contextmanager
def _collecting(plan: _Plan, jobs: Sequence[Job], log: Log) -> Iterator[None]:
    """While final runs go on, write each into the store as its result appears."""
    left = {job.number: job for job in jobs}
    over = threading.Event()

    def collect() -> None:
        for number, job in list(left.items()):
            data = Storage(job.storage).read(RESULT_FILE)
            if data is not None:
                _save_final(plan, left.pop(number), json.loads(data), log)

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


def _save_final(plan: _Plan, job: Job, payload: Payload, log: Log) -> None:
    failure = payload.get("failure")
    records = payload["records"]
    row = {"number": job.number, "method": job.config.method, "seed": job.config.train.seed}
    row |= summarise(records, payload) | {"key": config_key(job.config), "attempts": 1, "ended": _now()}
    row |= {n: payload[n] for n in ("test_accuracy", "test_loss", "started", "wall_seconds") if n in payload}
    row |= {"state": "FAIL" if failure else "COMPLETE", "error": failure}
    plan.store.save_final(row, records)
    Storage(job.storage).delete("state.pt")
    outcome = f"failed: {failure}" if failure else f"test {100 * payload['test_accuracy']:.2f} %"
    log(f"final {job.config.method} seed {job.config.train.seed}: {outcome}")


def _test_teacher(plan: _Plan) -> None:
    """Measure the teacher on ``test``, once."""
    teacher = plan.store.meta["teacher"]
    if "test_accuracy" not in teacher:
        base = plan.config.base
        data = images_for(base.data, pick_device(), test=True)
        assert data.test is not None
        network = teacher_for(base.teacher, data, plan.storage.path).network
        accuracy, _ = evaluate(network, data, data.test, base.train)
        plan.store.update_meta(teacher=teacher | {"test_accuracy": accuracy})


def _journal(storage: Storage) -> Path:
    """Return Optuna's journal: in the study's folder, or for a remote one a local copy that is sent there after every trial."""
    if storage.is_local:
        return Path(storage.path) / "optuna.journal"
    path = Path("~/.cache/dfkt/journals").expanduser() / f"{config_key({'path': storage.path})}.journal"
    data = storage.read("optuna.journal")
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is not None:
        path.write_bytes(data)
    else:
        path.unlink(missing_ok=True)
    return path


def _about_data(data: ImageSet) -> dict[str, Any]:
    return {
        "title": data.title,
        "classes": data.num_classes,
        "train": len(data.train),
        "val": len(data.val),
        "image_size": list(data.image_size),
        "channels": data.channels,
        "notes": list(data.notes),
    }


def _trial_line(row: dict[str, Any], params: dict[str, Any], done: int, total: int) -> str:
    words = {"COMPLETE": "", "PRUNED": f" (stopped at epoch {row.get('epochs') or 0:.1f})", "FAIL": " failed"}[
        row["state"]
    ]
    accuracy = row.get("last_val_accuracy")
    value = f"val {100 * accuracy:.2f} %" if accuracy is not None else "no val accuracy"
    tail = f": {row['error']}" if row["error"] else f"  {describe_params(params)}"
    return f"[{done}/{total}] trial {row['number']:>3}: {value}{words}, {row['wall_seconds']:.0f} s{tail}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "the trial's process ended without a message"


def _now() -> datetime:
    return datetime.now(UTC)
