"""Run or resume studies on Ray Tune.

A study's folder is the only truth. Running a study means: read what is finished, and do the rest. So a first run, a
resumed one and an extended one are the same thing, and so are one study and several that share a queue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from dfkt.config import Placement, check_rule, to_dict
from dfkt.errors import is_full, storage_error
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore, hold
from dfkt.study.capacity import Capacity, Demand, fit_workers
from dfkt.study.cluster import cluster, native_errors_unseen, signals_kept
from dfkt.study.config import StudyConfig
from dfkt.study.doctor import check_machines
from dfkt.study.driver import Driver, Run, Workers, trainable
from dfkt.study.keeping import forget
from dfkt.study.loggers import check_loggers, make_loggers
from dfkt.study.newcomers import Newcomers
from dfkt.study.opened import OpenStudy
from dfkt.study.opening import Checked, check_study, has_begun, is_over, open_store
from dfkt.study.precision import decide_precision, stored_precision
from dfkt.study.queue import Queue
from dfkt.study.recorder import Ending, QueueSearcher, Recorder
from dfkt.study.retry import failed_runs, retry_failed
from dfkt.study.search import mend_journal
from dfkt.study.stopping import Stopping
from dfkt.study.teaching import keep_teacher
from dfkt.study.watch import Growing, Watch

Log = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How the run of some studies ended.

    Attributes:
        folders: Theirs, in order.
        interrupted: Whether it was stopped before everything was done.
        failures: Trials and final runs that failed, in this run or earlier.
    """

    folders: tuple[str, ...]
    interrupted: bool
    failures: int


def run_studies(
    configs: Sequence[StudyConfig],
    results: str,
    *,
    placement: Placement | None = None,
    workers: Workers | None = None,
    demand: Demand | None = None,
    address: str | None = None,
    retry: bool = False,
    loggers: Sequence[str] = (),
    log: Log = print,
) -> Outcome:
    """Run studies in one queue to their end: first run, resumed or extended.

    Args:
        configs: The studies; their names differ.
        results: Folder that holds studies, local or any that pyarrow.fs takes; each gets a folder of its name.
        placement: Where data and trained teachers lie; device and threads follow from ``workers``.
        workers: What one run spans; by default one CPU, or one GPU where the cluster has them.
        demand: How many runs at a time are asked of the cluster, and how long machines are waited for.
        address: The Ray cluster to use; ``None`` uses the one around this process, or starts one on this machine.
        retry: Try failed runs again, with the parameters that they had.
        loggers: Trackers that are told how runs go on, by name (:mod:`dfkt.study.loggers`).
        log: Receives the lines that a user reads.

    Raises:
        InputError: If anything that was asked for cannot be done; nothing was trained then.
        RunError: If the storage takes nothing more, or the first runs failed alike. What was finished is kept.
    """
    placement, wanted, demand = placement or Placement(), workers or Workers(), demand or Demand()
    check_asked(configs, results, wanted, loggers)
    folders = [Storage(results).sub(config.name) for config in configs]
    with _storage_watched(results), contextlib.ExitStack() as held:
        for folder in folders:
            held.enter_context(hold(folder))
        configs = list(map(stored_precision, configs, folders))
        checked = [check_study(c, folder, placement, log) for c, folder in zip(configs, folders, strict=True)]
        workers, again = wanted, retry and any(map(_has_failed, configs, folders))
        if starts := again or not is_over(configs, folders, [known.taps for known in checked]):
            held.enter_context(cluster(address, log))
            check_machines(configs, folders[0], placement, log)
            workers = fit_workers(wanted, demand, log)
            placement = workers.place(placement)
            configs = [decide_precision(*both, workers, log) for both in zip(configs, folders, strict=True)]
        given = {"placement": to_dict(placement), "workers": to_dict(wanted), "demand": to_dict(demand)}
        studies = [
            _opened(config, folder, known, placement, given)
            for config, folder, known in zip(configs, folders, checked, strict=True)
        ]
        for study in studies if starts else ():
            _make_ready(study, again, log)
        for study in studies:  # when all are open: one that is stopped here can be resumed with all others
            keep_teacher(study, log)
        queue = Queue(studies, log)
        failures = max(config.max_failures for config in configs)
        if queue.over:
            _tidy(queue, quiet=True)  # a kill at the very end may have left something
        else:
            driver = Driver(workers, failures, demand.wait * 60)
            run_queue(queue, driver, Capacity(workers, demand), max_failures=failures, loggers=loggers, log=log)
        return Outcome(tuple(folder.path for folder in folders), not queue.over, queue.failures)


def check_studies(
    configs: Sequence[StudyConfig],
    results: str,
    *,
    placement: Placement,
    workers: Workers,
    loggers: Sequence[str] = (),
    log: Log = print,
) -> None:
    """Check studies as :func:`run_studies` does and say what it would train; no file stays behind, and Ray is not started.

    Args:
        configs: As for :func:`run_studies`.
        results: As for :func:`run_studies`.
        placement: As for :func:`run_studies`.
        workers: As for :func:`run_studies`.
        loggers: As for :func:`run_studies`.
        log: As for :func:`run_studies`.

    Raises:
        InputError: If anything that was asked for cannot be done.
    """
    check_asked(configs, results, workers, loggers)
    for config in configs:
        folder = Storage(results).sub(config.name)
        with hold(folder):
            check_study(stored_precision(config, folder), folder, placement, log)
        log(f"{config.name}: {config.describe()}")


def run_queue(
    queue: Queue,
    driver: Callable[[Run], None],
    capacity: Capacity,
    *,
    max_failures: int,
    loggers: Sequence[str] = (),
    log: Log = print,
) -> None:
    """Let Tune do a queue's runs, as many at a time as the cluster holds; Ctrl-C returns early.

    What ends the queue before its end is raised when all its runs have been stopped.

    Args:
        queue: The runs.
        driver: Called in a process of its own with every run.
        capacity: How many runs there shall be at once.
        max_failures: Restarts of a run whose process died.
        loggers: Trackers that are told how runs go on.
        log: Receives a line per run.
    """
    workers, before = capacity.workers, sum(arm.done_before for arm in queue.arms.values())
    at_once = min(capacity.wanted, queue.total)
    more = "" if capacity.holds >= at_once else f" as machines come (the cluster holds {capacity.holds} now)"
    log(f"{queue.total} runs to do{f', {before} done before' if before else ''}, {at_once} at a time{more}")
    storage, recorder = queue.studies[0].store.storage, Recorder(queue, log)
    tuner = tune.Tuner(
        trainable(driver, workers),
        tune_config=tune.TuneConfig(
            search_alg=Growing(QueueSearcher(queue), capacity),
            scheduler=Stopping.of(queue),
            num_samples=-1,  # the queue knows when there are no more
            reuse_actors=workers.alone,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=storage.sub("ray").path,
            callbacks=[
                recorder,
                Watch(queue, capacity),
                Newcomers.of(queue),
                *make_loggers(loggers, queue.studies, recorder.say),
            ],
            stop=Ending(queue),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            verbose=0,
        ),
    )
    with signals_kept(), native_errors_unseen(), contextlib.closing(recorder):
        tuner.fit()
    _tidy(queue, quiet=queue.broken is not None)
    if isinstance(queue.broken, OSError):
        raise storage_error(queue.broken, storage.path) from queue.broken
    if queue.broken is not None:
        raise queue.broken


def _tidy(queue: Queue, *, quiet: bool) -> None:
    """Delete what only studies on their way need; where storage takes nothing more, that may be no matter."""
    with contextlib.suppress(OSError) if quiet else contextlib.nullcontext():
        for study in queue.studies:
            for name in ("ray", "runs") if queue.over else ("ray",):
                study.store.storage.sub(name).delete_all()
            if queue.over:
                forget(study.config, study.placement, study.store.storage.path)


def check_asked(configs: Sequence[StudyConfig], results: str, workers: Workers, loggers: Sequence[str]) -> None:
    """Refuse what no study can be run with, whatever its settings.

    Raises:
        ConfigError: If so.
    """
    names = [config.name for config in configs]
    check_rule(len(set(names)) == len(names) > 0, "studies have different names", names=names)
    check_shares(workers, configs)
    check_loggers(loggers, Storage(results))


def check_shares(workers: Workers, configs: Sequence[StudyConfig]) -> None:
    """Refuse workers of a run that get no share of a batch, or whose number changes where it would change the result.

    Raises:
        ConfigError: If so.
    """
    batch = min(config.train.batch_size for config in configs)
    check_rule(workers.most <= batch, "workers_per_run <= batch_size", workers=workers.most, batch_size=batch)
    synchronised = all(config.train.sync_batch_norm for config in configs)
    check_rule(
        workers.most == workers.count or synchronised,
        "a number of workers that may change needs synchronised batch norm (no --no-sync-batch-norm)",
        sync_batch_norm=synchronised,
    )


@contextlib.contextmanager
def _storage_watched(results: str) -> Iterator[None]:
    """Say what is wrong with a storage that takes nothing more, and that what was finished is kept."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise storage_error(error, Storage(results).path) from error


def _has_failed(config: StudyConfig, folder: Storage) -> bool:
    return has_begun(folder) and bool(failed_runs(StudyStore.open(folder), config))


def _opened(
    config: StudyConfig, folder: Storage, known: Checked, placed: Placement, given: Mapping[str, Any]
) -> OpenStudy:
    store = open_store(config, folder, known.about, known.taps, **given)
    return OpenStudy(config, store, placed, known.taps, known.pairs)


def _make_ready(study: OpenStudy, again: bool, log: Log) -> None:
    """Let failed runs be tried again, if they shall be, and see to it that Optuna's journal says what the store says."""
    if again:
        retry_failed(study.store, study.config)
    mend_journal(study.store.storage, partial(study.store.rows, "trial"), log)


def _trial_name(trial: Trial) -> str:
    run: Run = trial.config["run"]
    return f"{run.folder_name}-{trial.trial_id}"
