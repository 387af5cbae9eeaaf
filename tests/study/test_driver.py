"""A driver does one run: in Tune's process, or on a group of workers; Ray's parts are replaced here."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from study.played import Played, idle, toy

from dfkt.study import driver as driver_module
from dfkt.study.driver import Driver, Run, Workers, trainable
from dfkt.training.run import Job, Payload, Report


def test_a_run_of_one_worker_is_done_in_tunes_process_and_reports_to_tune(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(driver_module, "run_job", lambda *given, **asked: seen.append((*given, asked)))
    Driver(Workers(), 2)(runs[0])
    assert seen == [(runs[0].job, tune.report, {"warned": driver_module.warned})]


def test_a_run_whose_code_raises_reports_that_and_ends_what_may_pass_reaches_tune(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Payload] = []
    monkeypatch.setattr(tune, "report", told.append)

    def raise_it(job: Job, report: Report, warned: Any) -> None:
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


def test_a_run_travels_and_is_named_alike_whenever_it_is_taken_up(runs: list[Run], tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(runs)) == runs
    assert len({run.id for run in runs}) == len({run.folder_name for run in runs}) == len(runs)
    again = Played(tmp_path / "elsewhere", toy()).run().handed
    assert [run.folder_name for run in again] == [run.folder_name for run in runs]


def test_a_run_is_warned_where_a_machine_is_about_to_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    draining: dict[str, int] = {}
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: draining)
    assert not driver_module.warned()
    draining["a node"] = 120_000
    assert driver_module.warned()
    monkeypatch.delattr(ray._private.state.state, "get_draining_nodes")
    assert not driver_module.warned()
