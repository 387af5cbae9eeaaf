"""One run in one process, from its checkpoint to its last report."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dfkt.methods.builders import baseline

from dfkt.config import FlowConfig, OptimizerConfig, RunConfig, TaskConfig, TrainConfig
from dfkt.data.load import load_data
from dfkt.store.files import Storage
from dfkt.training import run as worker
from dfkt.training.run import Job, Payload, images_for, run_job, teacher_for
from dfkt.training.state import load_state
from dfkt.training.teacher import find_teacher, publish_teacher

CPU = torch.device("cpu")
TIMES = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_CACHE", worker._Cache())


@pytest.fixture
def job(run_config: RunConfig, tmp_path: Path) -> Job:
    teacher = find_teacher(run_config.teacher, load_data(run_config.data), lambda line: None)
    publish_teacher(teacher, Storage(tmp_path / "study"))
    return Job(run_config, str(tmp_path / "study" / "run"), str(tmp_path / "study"), number=7)


class StopHereError(Exception):
    """Stands for a kill."""


def run(job: Job, stop: int | None = None) -> list[Payload]:
    """Run a job, or kill it at a report; return its reports."""
    reports: list[Payload] = []

    def report(payload: Payload) -> None:
        reports.append(payload)
        if len(reports) == stop:
            raise StopHereError

    if stop is None:
        run_job(job, report, device=CPU)
    else:
        with pytest.raises(StopHereError):
            run_job(job, report, device=CPU)
    return reports


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def records_of(reports: list[Payload]) -> list[dict[str, Any]]:
    """Return the records by index, the latest report's where several hold one."""
    kept = {record["index"]: record for payload in reports for record in payload["records"]}
    return timeless([kept[index] for index in sorted(kept)])


def test_reports_say_what_tune_and_the_store_need(job):
    reports = run(job)

    assert [payload["complete"] for payload in reports] == [*[False] * (len(reports) - 1), True]
    assert all(len(payload["records"]) == 1 for payload in reports)
    assert [r["index"] for r in records_of(reports)] == list(range(len(reports)))
    for payload in reports:
        task = payload["records"][-1]["phase"] == "task"
        assert ("val_accuracy" in payload) == ("rung_epoch" in payload) == task
        assert payload["workers"] == payload["attempts"] == 1
        assert 0 < payload["device_seconds"] <= payload["wall_seconds"]
        assert "failure" not in payload
        assert "test_accuracy" not in payload
    assert reports[-1]["rung_epoch"] == pytest.approx(job.config.train.epochs)
    assert reports[-1]["val_accuracy"] == records_of(reports)[-1]["val_accuracy"]
    assert reports == json.loads(json.dumps(reports))
    assert not Storage(job.storage).exists("result.json")


def test_the_peak_of_memory_is_that_of_the_process(job):
    peaks = [payload["peak_memory_bytes"] for payload in run(job)]

    assert all(2**20 < peak < 2**40 for peak in peaks)
    assert peaks == sorted(peaks)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_job_equals_an_uninterrupted_one(job, tmp_path, every):
    job = replace(job, config=replace(job.config, train=replace(job.config.train, checkpoint_every=every)), test=True)
    whole = replace(job, storage=str(tmp_path / "whole"))
    expected = run(whole)
    weights = load_state(Storage(whole.storage), "student.pt")
    assert weights is not None

    for stop in range(1, len(expected) + 1):
        broken = replace(job, storage=str(tmp_path / f"stopped-{stop}"))
        run(broken, stop)
        (Path(broken.storage) / "result.json").unlink(missing_ok=True)  # killed just before its last report
        kept = stop - stop % every if stop < len(expected) else stop
        torch.manual_seed(99)
        later = run(broken)

        assert len(later[0]["records"]) == min(kept + 1, len(expected))  # all that was there before, and one more
        assert records_of(later) == records_of(expected)
        assert later[-1]["attempts"] == (2 if kept else 1)
        assert {n: later[-1][n] for n in ("val_accuracy", "test_accuracy", "test_loss")} == {
            n: expected[-1][n] for n in ("val_accuracy", "test_accuracy", "test_loss")
        }
        student = load_state(Storage(broken.storage), "student.pt")
        assert student is not None
        assert all(torch.equal(value, weights[name]) for name, value in student.items())


def test_seconds_go_on_counting_after_a_restart(job):
    first = run(job, stop=2)
    second = run(job)

    assert second[0]["started"] == first[0]["started"]
    assert second[0]["wall_seconds"] > first[1]["wall_seconds"] * 0.9
    assert second[0]["device_seconds"] > first[1]["device_seconds"]


def test_a_job_with_test_leaves_its_student_and_all_its_records_and_is_not_run_again(job):
    job = replace(job, test=True)
    reports = run(job)
    folder = Storage(job.storage)
    result = json.loads(folder.read("result.json") or b"")

    assert timeless(result["records"]) == records_of(reports)
    assert result["complete"]
    assert 0 <= result["test_accuracy"] <= 1
    assert math.isfinite(result["test_loss"])
    assert {name: result[name] for name in reports[-1] if name != "records"} == {
        name: value for name, value in reports[-1].items() if name != "records"
    }
    student = load_state(folder, "student.pt")
    assert student is not None
    data = images_for(job.config.data, CPU, test=True)
    network = worker.build_student(job.config.student, data, seed=5).network
    network.load_state_dict(student)
    assert data.test is not None
    assert worker.evaluate(network, data, data.test, job.config.train)[0] == result["test_accuracy"]
    assert run(job) == []


@pytest.mark.parametrize("test", [False, True], ids=["trial", "final run"])
def test_a_run_that_cannot_go_on_reports_it_and_does_not_raise(job, test):
    wild = TaskConfig(optimizer=OptimizerConfig(lr=1e30))
    job = replace(job, config=replace(job.config, task=wild, train=TrainConfig(epochs=4, batch_size=64)), test=test)
    reports = run(job)

    assert "became nan or inf in task stage" in reports[-1]["failure"]
    assert not reports[-1].get("complete")
    assert not any("failure" in payload for payload in reports[:-1])
    assert timeless(reports[-1]["records"]) == records_of(reports[:-1])  # what was measured is kept
    assert Storage(job.storage).exists("result.json") == test
    assert not Storage(job.storage).exists("student.pt")
    if test:
        assert run(job) == []


def test_a_method_without_a_teacher_needs_none(job):
    alone = replace(job, config=baseline(job.config, "scratch"), teacher=None)

    assert run(alone)[-1]["complete"]


def test_the_same_seed_gives_the_same_student_whatever_was_drawn_before(run_config):
    data = load_data(run_config.data)
    networks = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        networks.append(worker.build_student(run_config.student, data, seed=3).network.state_dict())
    other = worker.build_student(run_config.student, data, seed=4).network.state_dict()

    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())
    assert not torch.equal(other["fc.weight"], networks[0]["fc.weight"])


def test_images_and_teacher_are_kept_for_the_next_run_of_the_process(job, monkeypatch):
    config = job.config
    data = images_for(config.data, CPU)
    teacher = teacher_for(config.teacher, data, str(job.teacher))
    for name in ("load_data", "load_teacher"):
        monkeypatch.setattr(worker, name, lambda *_, **__: pytest.fail("it is kept already"))

    assert images_for(config.data, CPU) is data
    assert teacher_for(config.teacher, data, str(job.teacher)) is teacher
    assert run(replace(job, config=replace(config, flow=FlowConfig(share=0.9))))[-1]["complete"]


def test_other_images_or_another_teacher_are_loaded_anew(job, tmp_path):
    config = job.config
    data = images_for(config.data, CPU)
    teacher = teacher_for(config.teacher, data, str(job.teacher))
    fewer = images_for(replace(config.data, limit_train=100), CPU)

    assert len(fewer.train) < len(data.train)
    assert len(images_for(config.data, CPU).train) == len(data.train)
    assert images_for(config.data, CPU, test=True).test is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "teacher.pt").write_bytes((tmp_path / "study" / "teacher.pt").read_bytes())
    assert teacher_for(config.teacher, data, str(tmp_path / "other")) is not teacher
