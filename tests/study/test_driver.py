"""A driver does one run: in Tune's process, or on a group of workers; Ray's parts are replaced here."""

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray import tune
from study.played import Played, idle, toy

from dfkt.study import driver as driver_module
from dfkt.study.driver import Driver, Run, Workers, trainable
from dfkt.training.run import Job, Payload, Report


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """A trial and a final run, as a queue hands them out."""
    return Played(tmp_path, toy()).run().handed


def test_a_run_of_one_worker_is_done_in_tunes_process_and_reports_to_tune(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(driver_module, "run_job", lambda *given: seen.append(given))
    Driver(Workers(), 2)(runs[0])
    assert seen == [(runs[0].job, tune.report)]


def test_a_run_whose_code_raises_reports_that_and_ends_what_may_pass_reaches_tune(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Payload] = []
    monkeypatch.setattr(tune, "report", told.append)

    def raise_it(job: Job, report: Report) -> None:
        raise error

    monkeypatch.setattr(driver_module, "run_job", raise_it)
    error: Exception = ValueError("a bug")
    Driver(Workers(), 2)(runs[0])
    assert [(one["failure"].split(" (")[0], "ValueError: a bug\n" in one["traceback"]) for one in told] == [
        ("ValueError: a bug", True)
    ]
    error = ConnectionError("far")
    with pytest.raises(ConnectionError, match="far"):
        Driver(Workers(), 2)(runs[0])
    assert len(told) == 1


@pytest.mark.parametrize(
    ("workers", "takes"),
    [
        (Workers(1, 2, 0), {"CPU": 2}),
        (Workers(1, 1, 0.5), {"CPU": 1, "GPU": 0.5}),
        (Workers(2, 4, 1), {"node:__internal_head__": 0.001}),  # its workers take the rest
    ],
)
def test_a_run_takes_the_resources_of_its_worker_or_next_to_none(workers: Workers, takes: dict[str, float]) -> None:
    (bundle,) = trainable(idle, workers)._resources.bundles  # type: ignore[attr-defined]
    assert bundle == takes


def test_the_driver_is_given_what_the_searcher_handed_out(runs: list[Run]) -> None:
    seen: list[Run] = []
    trainable(seen.append, Workers(gpus=0))({"run": runs[0]})
    assert seen == [runs[0]]


def test_trials_and_final_runs_take_the_same_workers_and_the_same_batch(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    def trainer(loop: Any, **given: Any) -> Any:
        made.append(given)
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    monkeypatch.setattr(
        driver_module, "TuneReportCallback", ray.train.UserCallback
    )  # Tune's own wants to be inside Tune
    trial, final = runs[0], next(run for run in runs if run.final and run.arm == runs[0].arm)
    drive = Driver(Workers(2, 3, 0), 1)
    drive(trial)
    drive(final)
    scales = [given["scaling_config"] for given in made]
    assert scales[0] == scales[1]
    assert (scales[0].num_workers, scales[0].resources_per_worker, scales[0].use_gpu) == (2, {"CPU": 3}, False)
    jobs = [given["train_loop_config"]["job"] for given in made]
    assert jobs[0].config.train == replace(jobs[1].config.train, seed=jobs[0].config.train.seed)
    assert jobs[0].placement == jobs[1].placement
    assert [job.test for job in jobs] == [False, True]
    assert len({given["run_config"].name for given in made}) == 2
    assert all(Path(given["run_config"].storage_path) == Path(trial.study) / "ray" for given in made)


def test_a_run_travels_and_is_named_alike_whenever_it_is_taken_up(runs: list[Run], tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(runs)) == runs
    assert len({run.id for run in runs}) == len({run.folder_name for run in runs}) == len(runs)
    again = Played(tmp_path / "elsewhere", toy()).run().handed
    assert [run.folder_name for run in again] == [run.folder_name for run in runs]


def test_a_worker_of_a_group_does_its_share_on_the_device_it_is_given(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: "cuda:1")
    monkeypatch.setattr(driver_module, "run_job", lambda job, report, group: seen.append((job, group)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = runs[0].job
    for device in ("cpu", "cuda"):
        driver_module._work({"job": replace(job, placement=replace(job.placement, device=device))})
    assert [done.placement.device for done, _ in seen] == ["cpu", "cuda:1"]
    assert [(group.rank, group.world) for _, group in seen] == [(1, 2)] * 2
