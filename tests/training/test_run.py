"""One run in one process, from its checkpoint to its last report."""

import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import DROPPING, METHODS, same, timeless

from dfkt.config import DataConfig, NetworkConfig, Placement
from dfkt.data.image_set import ImageSet
from dfkt.data.load import load_data
from dfkt.errors import CheckpointError, ConfigError, DataError, TapError
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.kd import Kd
from dfkt.methods.scratch import Scratch
from dfkt.store.files import Storage
from dfkt.training import cached as module
from dfkt.training import run as run_module
from dfkt.training.cached import images_for, teacher_for
from dfkt.training.cached import test_images_for as split_for_test
from dfkt.training.evaluate import evaluate
from dfkt.training.parallel import Group
from dfkt.training.run import (
    Job,
    Payload,
    Trained,
    build_student,
    check_run,
    run_job,
)
from dfkt.training.state import load_state, save_state
from dfkt.training.teacher import find_teacher

STUDENT = "student.pt"
SECRETIVE = NetworkConfig(name="small_runs:Secretive")


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHE", module._Cache())


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], str]:
    """The folder of a study that keeps a configuration's teacher; trained once for all tests."""
    kept: dict[Any, str] = {}

    def folder(config: Any) -> str:
        if config.teacher not in kept:
            path = tmp_path_factory.mktemp("study")
            data = load_data(config.data, "unused")
            find_teacher(
                config.teacher, data, Placement(teacher_root=str(path / "all")), lambda line: None, Storage(path)
            )
            kept[config.teacher] = str(path)
        return kept[config.teacher]

    return folder


@pytest.fixture
def job(run_config: Any, placement: Placement, taught: Callable[[Any], str], tmp_path: Path) -> Job:
    return Job(run_config, placement, str(tmp_path / "run"), taught(run_config))


def changed(job: Job, **settings: Any) -> Job:
    """Return the job of another run."""
    return replace(job, config=replace(job.config, **settings))


def keep_weights(storage: Storage, trained: Trained) -> None:
    """Leave a student's weights and accuracies."""
    found = {"accuracies": (trained.val_accuracy, trained.test_accuracy), "weights": trained.network.state_dict()}
    save_state(storage, found, STUDENT)


def kept(folder: str) -> Any:
    """Return the accuracies and the weights that were left in a folder."""
    found = load_state(Storage(folder), STUDENT)
    assert found is not None
    return found["accuracies"], found["weights"]


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
        run_job(job, report)
    else:
        with pytest.raises(StopHereError):
            run_job(job, report)
    return reports


def records_of(reports: list[Payload]) -> list[dict[str, Any]]:
    """Return the records by index, the latest report's where several hold one."""
    kept = {record["index"]: record for payload in reports for record in payload["records"]}
    return [timeless(kept[index]) for index in sorted(kept)]


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
    assert Storage(job.storage).names() == ["state.pt"]


def test_a_rung_is_reported_at_once_with_what_was_measured_there(job):
    job = replace(job, rungs=(0.5,))
    reports = run(job)
    assert [payload["complete"] for payload in reports] == [*[False] * (len(reports) - 1), True]
    at_rung = next(payload for payload in reports if "rung" in payload["records"][-1])
    record = at_rung["records"][-1]
    assert (at_rung["rung_accuracy"], at_rung["rung_epoch"]) == (record["rung_accuracy"], record["rung_epoch"])
    assert ("val_accuracy" in at_rung) == ("val_accuracy" in record)
    assert [r["index"] for r in records_of(reports)] == list(range(len(reports)))


@pytest.mark.slow
@pytest.mark.parametrize(("every", "stops"), [(1, (2,)), (2, (1, 2, 3, 5))])
def test_a_resumed_job_equals_an_uninterrupted_one(job, tmp_path, every, stops):
    job = replace(job, placement=replace(job.placement, checkpoint_every=every), test=True, keep=keep_weights)
    whole = replace(job, storage=str(tmp_path / "whole"))
    expected = run(whole)
    weights = kept(whole.storage)[1]
    assert len(expected) == 5
    for stop in stops:
        broken = replace(job, storage=str(tmp_path / f"stopped-{stop}"))
        run(broken, stop)
        done = stop - stop % every if stop < len(expected) else stop
        torch.manual_seed(99)
        later = run(broken)

        assert len(later[0]["records"]) == min(done + 1, len(expected))  # all that was there before, and one more
        assert records_of(later) == records_of(expected)
        assert later[-1]["attempts"] == (2 if done else 1)
        assert {n: later[-1][n] for n in ("val_accuracy", "test_accuracy", "test_loss")} == {
            n: expected[-1][n] for n in ("val_accuracy", "test_accuracy", "test_loss")
        }
        assert same(kept(broken.storage)[1], weights)


def test_a_resumed_job_with_dropout_equals_an_uninterrupted_one_wherever_it_ran_before(job, tmp_path):
    job = changed(job, method=Kd(), student=DROPPING)
    expected = records_of(run(replace(job, storage=str(tmp_path / "whole"))))
    run(changed(replace(job, storage=str(tmp_path / "other")), method=Scratch()))
    run(job, stop=1)
    torch.rand(5)
    before = torch.get_rng_state()

    assert records_of(run(job)) == expected
    assert torch.equal(torch.get_rng_state(), before)


def damage(folder: Path) -> None:
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:500])


def swap(folder: Path) -> None:
    state = load_state(Storage(folder))
    assert state is not None
    save_state(Storage(folder), state | {"key": "another run"})


@pytest.mark.parametrize("spoil", [damage, swap], ids=["damaged", "another run's"])
def test_a_checkpoint_that_is_damaged_or_another_runs_starts_the_run_anew(job, spoil):
    expected = records_of(run(job))
    spoil(Path(job.storage))
    reports = run(job)

    assert records_of(reports) == expected
    assert reports[-1]["attempts"] == 1
    assert all(len(payload["records"]) == 1 for payload in reports)
    assert run(job)[-1]["attempts"] == 2  # what it left now is its own


def test_a_run_that_is_told_to_yield_ends_at_a_checkpoint_and_goes_on_to_the_same_end(job, tmp_path):
    sparse = replace(job, placement=replace(job.placement, checkpoint_every=99), storage=str(tmp_path / "sparse"))
    expected = records_of(run(job))
    parts: list[list[Payload]] = [[]]
    told = iter([False, True, False, True])

    def yields() -> bool:
        return next(told, False)

    while not run_job(sparse, parts[-1].append, yields=yields):
        parts.append([])
    assert [len(part) for part in parts] == [2, 2, len(expected) - 4]
    assert [part[-1]["complete"] for part in parts] == [False, False, True]
    assert [timeless(record) for part in parts[:1] for payload in part for record in payload["records"]] == expected[:2]
    assert records_of([payload for part in parts for payload in part]) == expected


def test_a_warning_leaves_a_checkpoint_at_once(job):
    rare = replace(job, placement=replace(job.placement, checkpoint_every=99))
    reports: list[Payload] = []

    def report(payload: Payload) -> None:
        reports.append(payload)
        if len(reports) == 3:
            raise StopHereError

    warnings = iter([False, True])
    with pytest.raises(StopHereError):
        run_job(rare, report, warned=lambda: next(warnings, False))
    left = load_state(Storage(job.storage))
    assert left is not None
    assert [record["index"] for record in left["history"]] == [0, 1]


def test_seconds_go_on_counting_after_a_restart(job):
    first = run(job, stop=2)
    second = run(job)

    assert second[0]["started"] == first[0]["started"]
    assert second[0]["wall_seconds"] > first[0]["wall_seconds"]
    assert second[0]["device_seconds"] > first[1]["device_seconds"]


def test_a_job_with_test_leaves_its_student_and_opens_the_test_split_behind_the_last_epoch(job, monkeypatch):
    opened: list[int] = []
    load = module.load_test
    monkeypatch.setattr(module, "load_test", lambda *a: opened.append(len(reports)) or load(*a))
    reports: list[Payload] = []
    run_job(replace(job, test=True, keep=keep_weights), reports.append)

    assert opened == [len(reports) - 1]
    assert not any("test_accuracy" in payload for payload in reports[:-1])
    assert math.isfinite(reports[-1]["test_loss"])
    accuracies, student = kept(job.storage)
    assert accuracies == (reports[-1]["val_accuracy"], reports[-1]["test_accuracy"])
    data = images_for(job.config.data, job.placement)
    network = build_student(job.config.student, data, seed=5).network
    network.load_state_dict(student)
    split = split_for_test(job.config.data, job.placement)
    assert evaluate(network, data, split, "auto") == (reports[-1]["test_accuracy"], reports[-1]["test_loss"])


def test_a_job_without_test_never_opens_the_test_split(job, monkeypatch):
    monkeypatch.setattr(module, "load_test", lambda *_: pytest.fail("nobody asked for it"))

    assert run(job)[-1]["complete"]
    assert not Storage(job.storage).exists(STUDENT)


@pytest.mark.parametrize("test", [False, True], ids=["trial", "final run"])
def test_a_run_that_cannot_go_on_reports_it_and_does_not_raise(job, test):
    job = replace(changed(job, method=Dfkt(pattern="dense-2", share=0.5, rate=1e30)), test=test, keep=keep_weights)
    reports = run(job)

    assert "became nan or inf in task stage" in reports[-1]["failure"]
    assert not reports[-1].get("complete")
    assert not any("failure" in payload for payload in reports[:-1])
    assert [timeless(r) for r in reports[-1]["records"]] == records_of(reports[:-1])  # what was measured is kept
    assert len(reports[-1]["records"]) >= 2
    assert reports[-1]["device_seconds"] >= reports[-2]["device_seconds"]
    assert reports[-1]["wall_seconds"] > reports[-2]["wall_seconds"]
    assert not Storage(job.storage).exists(STUDENT)


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": DataConfig(name="absent")}, "existing folder, but got 'absent'"),
    "network": ({"student": NetworkConfig(name="resnet9")}, "resnet9"),
    "taps": ({"student": NetworkConfig(name="resnet8", width=0.25, taps=("stem", "layer9"))}, "layer9"),
    "pattern": ({"method": Dfkt(pattern="nonsense")}, "nonsense"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_be_begun_is_a_failure_too_and_not_raised(job, case):
    settings, message = FAILURES[case]
    reports = run(changed(job, **settings))

    assert len(reports) == 1
    assert message in reports[0]["failure"]
    assert (reports[0]["records"], reports[0]["device_seconds"]) == ([], 0)
    assert reports[0]["attempts"] == 1


def test_a_teacher_that_is_gone_and_too_many_workers_are_failures(job, tmp_path):
    assert "there are none" in run(replace(job, teacher=str(tmp_path / "gone")))[0]["failure"]
    reports: list[Payload] = []
    run_job(job, reports.append, Group(0, 100))
    assert "workers <= batch_size" in reports[0]["failure"]


def test_device_and_threads_are_those_of_the_placement(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # nobody asks what there is
    absent = changed(job, data=DataConfig(name="absent"))  # ends at once
    seen: list[int] = []
    try:
        for threads in (3, 2):
            placement = replace(job.placement, threads=threads)
            run_job(replace(absent, placement=placement), lambda payload: seen.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(1)

    assert seen == [3, 2]
    run_job(job, lambda payload: seen.append(torch.get_num_threads()))
    assert set(seen[2:]) == {1}


def test_images_go_to_the_device_that_was_named(run_config, placement):
    data = images_for(run_config.data, placement)
    moved: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSet, "to", lambda self, device: moved.append(device) or self)
        images_for(run_config.data, replace(placement, device="cuda:1"))

    assert moved == ["cuda:1"]
    assert data.train.images.device == torch.device("cpu")


def test_a_method_without_a_teacher_needs_none(job):
    assert run(replace(changed(job, method=Scratch()), teacher=None))[-1]["complete"]


@pytest.mark.parametrize("method", ["scratch", "kd", "dkd"])
def test_networks_whose_taps_cannot_be_told_learn_where_none_are_read(job, taught, method):
    teacher = replace(job.config.teacher, network=SECRETIVE)
    job = changed(job, method=METHODS[method], student=SECRETIVE, teacher=teacher)
    data = images_for(job.config.data, job.placement)
    check_run(job.config, data)

    assert run(replace(job, teacher=taught(job.config)))[-1]["complete"]
    with pytest.raises(TapError):
        check_run(replace(job.config, method=METHODS["attention"]), data)


def test_the_check_before_a_run_says_what_would_stop_it(job, tmp_path):
    config, data = job.config, images_for(job.config.data, job.placement)

    assert [stage.phase for stage in check_run(config, data)] == ["flow", "flow", "flow", "task"]
    with pytest.raises(ConfigError, match="Every stage needs a step"):
        check_run(replace(config, train=replace(config.train, epochs=0.2)), data)
    with pytest.raises(CheckpointError, match="does not exist"):
        check_run(replace(config, teacher=replace(config.teacher, checkpoint=str(tmp_path / "absent.pt"))), data)
    few = replace(config.student, taps=("stem", "layer1.0"))
    with pytest.raises(TapError, match="cannot be matched"):
        check_run(replace(config, method=METHODS["attention"], student=few), data)
    alone = replace(config, method=Scratch(), teacher=replace(config.teacher, checkpoint="absent.pt"))
    assert len(check_run(alone, data)) == 1


def test_the_same_seed_gives_the_same_student_whatever_was_drawn_before(run_config):
    data = load_data(run_config.data, "unused")
    networks = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        networks.append(build_student(run_config.student, data, seed=3).network.state_dict())
    other = build_student(run_config.student, data, seed=4).network.state_dict()

    assert same(networks[0], networks[1])
    assert not torch.equal(other["fc.weight"], networks[0]["fc.weight"])


def teacher_of(job: Job, data: ImageSet, **more: Any) -> Any:
    return teacher_for(job.config.teacher, data, str(job.teacher), **({"tapped": True, "precision": "auto"} | more))


def test_images_and_teacher_are_kept_for_the_next_run_of_the_process(job, monkeypatch):
    data = images_for(job.config.data, job.placement)
    teacher = teacher_of(job, data)
    for name in ("load_data", "load_teacher"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it is kept already"))

    assert images_for(job.config.data, job.placement) is data
    assert teacher_of(job, data) is teacher
    assert run(changed(job, method=Dfkt(pattern="dense-2", share=0.9)))[-1]["complete"]


def test_another_teacher_or_another_way_to_read_it_is_made_anew(job, taught):
    data = images_for(job.config.data, job.placement)
    teacher = teacher_of(job, data)
    other = replace(job.config, teacher=replace(job.config.teacher, rate=0.05))

    assert len(teacher_of(job, data, tapped=False).taps) == 0
    assert next(teacher_of(job, data, precision="float64").network.parameters()).dtype == torch.float64
    assert teacher_for(other.teacher, data, taught(other), tapped=True, precision="auto") is not teacher


def test_one_set_of_images_is_held_at_a_time_and_the_old_one_is_let_go_first(job, monkeypatch):
    load, held = module.load_data, []

    def watched(*arguments: Any) -> ImageSet:
        held.append([kind for kind in module._CACHE.entries if kind == "images"])
        return load(*arguments)

    monkeypatch.setattr(module, "load_data", watched)
    first = images_for(job.config.data, job.placement)
    fewer = images_for(replace(job.config.data, limit_train=100), job.placement)

    assert held == [[], []]
    assert len(fewer.train) < len(first.train)
    assert [value for kind, (_, value) in module._CACHE.entries.items() if kind == "images"] == [fewer]
    assert images_for(job.config.data, job.placement) is not first


def test_data_that_fails_to_load_leaves_nothing_half_made(job):
    images_for(job.config.data, job.placement)
    with pytest.raises(DataError):
        images_for(DataConfig(name="absent"), job.placement)

    assert "images" not in module._CACHE.entries
    assert len(images_for(job.config.data, job.placement).train) > 0


def test_nothing_of_a_run_outlives_it_in_its_process(job, monkeypatch):
    """A process does many runs: what they leave to the garbage collector adds up."""
    built: list[Any] = []
    build = run_module.build_training
    monkeypatch.setattr(run_module, "build_training", lambda *given: noted(build(*given)))

    def noted(training: Any) -> Any:
        built.append(weakref.ref(training))
        return training

    gc.collect()
    gc.disable()
    try:
        run(replace(changed(job, method=Scratch()), rungs=(0.5,)))
    finally:
        gc.enable()

    assert [found() for found in built] == [None]
