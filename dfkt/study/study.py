"""Ray Tune + Optuna: run or resume one study.

The study's folder is the only truth. Running a study means: read what is finished, finish the rest, then the final
runs. So a first run, a resumed one and an extended one are the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train import TrainingFailedError

from dfkt.study.cluster import cluster, count_groups, fit_workers
from dfkt.config import RunConfig, StudyConfig, config_key, flatten, to_dict
from dfkt.data.load import ImageSet, load_data
from dfkt.errors import RunError, StudyError
from dfkt.study.finals import run_finals
from dfkt.methods.builders import baseline, build_schedule
from dfkt.study.recorder import Recorder, now
from dfkt.store.study_store import Study, StudyStore, environment, read_study
from dfkt.study.search import build_scheduler, build_search, open_optuna, reconcile
from dfkt.methods.space import SearchSpace
from dfkt.store.files import Storage
from dfkt.networks.taps import group_ends, match_taps
from dfkt.training.teacher import check_checkpoint, find_teacher, publish_teacher
from dfkt.study.driver import Driver, Workers, trainable
from dfkt.training.run import build_student, images_for, pick_device

Log = Callable[[str], None]
EXTENDABLE = ("trials", "seeds", "max_failures", "baselines", "base.data.root", "base.teacher.root")
"""Settings that may differ between two runs of one study."""


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
        results: Folder that holds studies, local or any that pyarrow.fs takes; this one gets a folder of its name.
        workers: What one trial spans; by default one CPU, or one GPU where the cluster has them.
        address: The Ray cluster to use; ``None`` uses the one around this process, or starts one on this machine.
        log: Receives the lines that a user reads.

    Raises:
        InputError: If anything that was asked for cannot be done; nothing was trained then.
        RunError: If the workers of the final runs failed too often; what was finished is kept.
    """
    storage = Storage(results).sub(config.name)
    storage.check_writable()
    with storage.lock():
        data = load_data(config.base.data)
        space = check_networks(config, data)
        check_store(config, storage, data)
        for note in data.notes:
            log(f"note: {note}")
        with cluster(address):
            workers = fit_workers(workers or Workers())
            store = open_store(config, storage, data, space)
            keep_teacher(config, store, log)
            finished = _search(config, store, space, workers, log)
            try:
                finished = finished and run_finals(config, store, workers, log)
            except TrainingFailedError as error:
                raise RunError(
                    f"The workers of the final runs failed too often: {str(error).splitlines()[0]}"
                ) from error
        study = read_study(storage)
    failures = int((study.trials.state == "FAIL").sum() + (study.finals.state == "FAIL").sum())
    return StudyResult(study, not finished, failures)


def check_networks(config: StudyConfig, data: ImageSet) -> SearchSpace:
    """Build both networks once, match their taps and try the schedules; return the search space.

    Raises:
        InputError: If a network, tap or pattern is unknown or does not fit.
    """
    base = config.base
    student = build_student(base.student, data, seed=0)
    check_checkpoint(base.teacher, data)
    match_taps(student.taps, build_student(base.teacher.network, data, seed=0).taps)
    for method in config.baselines:
        build_schedule(baseline(base, method), len(student.taps), group_ends(student.taps))
    build_schedule(base, len(student.taps), group_ends(student.taps))
    return SearchSpace(len(student.taps), config.weights, base.method)


def check_store(config: StudyConfig, storage: Storage, data: ImageSet) -> None:
    """Refuse a folder that holds another study: one of another configuration, or of other images.

    Raises:
        StudyError: If a setting differs that a study cannot change; the differences are listed.
    """
    if not _has_begun(storage):
        return
    meta = StudyStore.open(storage).meta
    old = flatten({"config": meta["config"], "data": meta["data"]})
    new = flatten({"config": to_dict(config), "data": about_data(data)})
    names = (name.removeprefix("config.") for name in sorted(old.keys() | new.keys()))
    changed = [n for n in names if n not in EXTENDABLE and _value(old, n) != _value(new, n)]
    if changed:
        shown = "; ".join(f"{name} was {_value(old, name)!r}, is {_value(new, name)!r}" for name in changed)
        raise StudyError(
            f"Study {storage.path} has another configuration ({shown}). Take another --name, or the settings it has."
        )


def open_store(config: StudyConfig, storage: Storage, data: ImageSet, space: SearchSpace) -> StudyStore:
    """Open the study's store, or create it, and note this run in it."""
    if _has_begun(storage):
        store = StudyStore.open(storage)
    else:
        storage.delete_all()
        store = StudyStore.create(storage, space.types(), {"data": about_data(data), "sessions": []})
    session = {"started": now().isoformat(), **environment()}
    store.update_meta(config=to_dict(config), sessions=[*store.meta["sessions"], session])
    return store


def about_data(data: ImageSet) -> dict[str, Any]:
    """Return what tells one image set from another, as JSON values."""
    return {
        "title": data.title,
        "classes": data.num_classes,
        "train": len(data.train),
        "val": len(data.val),
        "image_size": list(data.image_size),
        "channels": data.channels,
    }


def _has_begun(storage: Storage) -> bool:
    """Whether a folder holds a study with anything that was trained, or is being trained, for it."""
    if not storage.exists("study.json"):
        return False
    if any(storage.sub(name).names() for name in ("trials", "finals")):
        return True
    try:
        return bool(StudyStore.open(storage).meta.get("finals"))  # final runs were listed, and may have checkpoints
    except StudyError:
        return False


def _value(flat: dict[str, Any], name: str) -> Any:
    return flat.get(f"config.{name}", flat.get(name))


def teach(config: RunConfig, folder: Storage, log: Log) -> dict[str, Any]:
    """Find or train a run's teacher in this process, and leave it in a folder; return what tells it from others."""
    teacher = find_teacher(config.teacher, images_for(config.data, pick_device()), log)
    publish_teacher(teacher, folder)
    return {"key": teacher.key, "network": config.teacher.network.name, "val_accuracy": teacher.val_accuracy}


def keep_teacher(config: StudyConfig, store: StudyStore, log: Log) -> None:
    """Leave the teacher where every worker finds it; it is trained where a GPU is, if the cluster has any."""
    known = store.meta.get("teacher", {})
    if pick_device().type == "cpu" and ray.cluster_resources().get("GPU", 0) >= 1:
        about = ray.get(ray.remote(num_gpus=1)(teach).remote(config.base, store.storage, print))
    else:
        about = teach(config.base, store.storage, log)
    if known and known["key"] != about["key"]:
        raise StudyError(f"The study's teacher must stay {known['key']}, but {about['key']} was found.")
    store.update_meta(teacher=known | about)


def _search(config: StudyConfig, store: StudyStore, space: SearchSpace, workers: Workers, log: Log) -> bool:
    """Run the trials that are still to be done; return whether all are."""
    rows = store.trial_rows()
    done = [row for row in rows if row["state"] != "RUNNING"]
    missing = config.trials - len(done)
    if missing <= 0:
        return True
    journal = journal_of(store.storage)
    unfinished = reconcile(open_optuna(config, journal, space, rows), rows)
    limit = min(count_groups(workers), missing)
    again = f", {len(done)} done before, {len(unfinished)} taken up again" if rows else ""
    log(f"search: {config.trials} trials{again}, {limit} at a time")
    epochs = {row["number"]: store.trial_epochs(row["number"]) for row in done}
    tune_trials(
        Driver(config.base, store.storage.path, workers, config.max_failures),
        workers,
        store.storage,
        search=build_search(config, journal, space, unfinished),
        scheduler=build_scheduler(config, done, epochs),
        recorder=Recorder(store, config, journal, log),
        count=missing,
        max_failures=config.max_failures,
    )
    return sum(row["state"] != "RUNNING" for row in store.trial_rows()) >= config.trials


def tune_trials(
    run: Callable[[dict[str, Any]], None],
    workers: Workers,
    storage: Storage,
    *,
    search: Any,
    recorder: tune.Callback,
    count: int,
    max_failures: int,
    scheduler: Any = None,
) -> None:
    """Let Tune run trials, as many at a time as the cluster holds; Ctrl-C returns early.

    Args:
        run: Called in a process of its own with every trial's parameters.
        workers: What a trial spans.
        storage: Folder for what Ray writes meanwhile; deleted at the end.
        search: Tune's searcher, which hands out the parameters.
        recorder: Is told how trials start, report and end; keeps all that shall be kept.
        count: At most so many trials.
        max_failures: Restarts of a trial whose process died.
        scheduler: Tune's scheduler, which may stop trials early.
    """
    tuner = tune.Tuner(
        trainable(run, workers),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=count,
            max_concurrent_trials=min(count_groups(workers), count),
            reuse_actors=workers.count == 1,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.sub("ray").path,
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=max_failures),
            verbose=0,
        ),
    )
    tuner.fit()
    storage.sub("ray").delete_all()


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['number']:05d}-{trial.trial_id}"


def journal_of(storage: Storage) -> Path:
    """Return Optuna's journal: in the study's folder, or for a remote one a local copy, sent there after every trial."""
    if storage.is_local:
        return Path(storage.path) / "optuna.journal"
    path = Path("~/.cache/dfkt/journals").expanduser() / f"{config_key({'path': storage.path})}.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = storage.read("optuna.journal")
    if data is not None:
        path.write_bytes(data)
    else:
        path.unlink(missing_ok=True)
    return path
