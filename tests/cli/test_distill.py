"""One run without a study: from a trial or from nothing, to its end, again, and after an interruption."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.switches import OWN_METHOD, OWN_NETWORKS, TINY, run_of
from made import trial
from study.played import tiny

from dfkt.cli import distill
from dfkt.cli.main import main
from dfkt.cli.trial import split_trial
from dfkt.config import (
    DataConfig,
    NetworkConfig,
    OptimizerConfig,
    Placement,
    TeacherConfig,
    TrainConfig,
    to_dict,
)
from dfkt.data.load import load_data
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.kd import Kd
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore
from dfkt.students.package import load_student
from dfkt.study.config import ArmConfig, StudyConfig
from dfkt.study.opened import OpenStudy
from dfkt.study.opening import check_study, open_store
from dfkt.study.teaching import keep_teacher
from dfkt.training import cached
from dfkt.training.config import RunConfig
from dfkt.training.run import check_run, run_job
from dfkt.training.teacher import Teacher

WINNER = Dfkt(pattern="sliding-2", order="local", rounds=2, weight=0.5, span_weights=(1.0, 3.0), clip_norm=None)
STUDY = StudyConfig(
    name="whole",
    data=DataConfig(name="digits", limit_train=300, padding=1),
    teacher=TeacherConfig(network=NetworkConfig(name="resnet14"), rate=0.03, train=TrainConfig(epochs=9)),
    student=NetworkConfig(name="resnet20", width=0.5),
    train=TrainConfig(
        epochs=7, batch_size=48, clip_norm=2.5, sync_batch_norm=False,
        optimizer=OptimizerConfig(schedule="step", momentum=0.7, nesterov=True, weight_decay=3e-4),
    ),
    arms=(
        ArmConfig(name="kd", method=Kd(), trials=2),
        ArmConfig(name="dfkt", method=Dfkt(), trials=2, epochs=5),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A study with a trial of each arm whose settings are no defaults, and a failed one."""
    store = StudyStore.create(Storage(tmp_path / "whole"), {}, ["task"], {"config": to_dict(STUDY), "arms": {}})
    for arm, method, number, accuracy in (
        ("dfkt", WINNER, 0, 0.9),
        ("dfkt", Dfkt(), 1, 0.7),
        ("kd", Kd(weight=0.3, temperature=2.0), 0, 0.8),
        ("kd", Kd(weight=0.4), 1, None),
    ):
        row = trial(number, method.name, "COMPLETE" if accuracy else "FAIL", accuracy)
        store.save("trial", arm, {n: v for n, v in row.items() if not n.startswith("param_")} | settings(method))
    return tmp_path / "whole"


def settings(method: Any) -> dict[str, str]:
    return {"settings": json.dumps(to_dict(method))}


def expected(method: Any, **train: Any) -> RunConfig:
    """Return the run of a trial of the study."""
    return RunConfig(
        method=method,
        data=STUDY.data,
        teacher=STUDY.teacher,
        student=STUDY.student,
        train=replace(STUDY.train, **train),
    )


def test_the_best_trial_is_taken_whole(whole: Path) -> None:
    assert run_of("--trial", "whole") == expected(WINNER, epochs=5)


@pytest.mark.parametrize(
    ("switches", "method", "train"),
    [
        (["--set", "rate=0.02"], replace(WINNER, rate=0.02), {}),
        (["--set", "clip_norm=3"], replace(WINNER, clip_norm=3), {}),
        (["--epochs", "2"], WINNER, {"epochs": 2}),
        (["--seed", "4"], WINNER, {"seed": 4}),
        (["--clip-norm", "1"], WINNER, {"clip_norm": 1}),
        (["--method", "dfkt", "--set", "rounds=1"], replace(WINNER, rounds=1), {}),
    ],
)
def test_one_change_to_a_trial_keeps_all_else(
    switches: Sequence[str], method: Dfkt, train: dict[str, Any], whole: Path
) -> None:
    assert run_of("--trial", "whole", *switches) == expected(method, **{"epochs": 5, **train})


def test_a_trial_is_named_by_arm_and_number(whole: Path) -> None:
    assert run_of("--trial", "whole:kd") == expected(Kd(weight=0.3, temperature=2.0))
    assert run_of("--trial", "whole:kd:1") == expected(Kd(weight=0.4))  # a failed one may be looked into
    assert run_of("--trial", f"{whole}:dfkt:1") == expected(Dfkt(), epochs=5)


def test_another_method_takes_the_place_of_a_trials(whole: Path) -> None:
    assert run_of("--trial", "whole:kd:0", "--method", "dfkt") == expected(Dfkt())
    assert run_of("--trial", "whole:dfkt:0", "--method", "kd", "--set", "weight=0.2").method == Kd(weight=0.2)


def test_a_folder_may_have_colons(whole: Path) -> None:
    whole.rename(whole.with_name("a:b"))
    assert split_trial("a:b") == ("a:b", None, None)
    assert split_trial("a:b:kd:1") == ("a:b", "kd", 1)
    assert split_trial("s3://bucket/x?a=b") == ("s3://bucket/x?a=b", None, None)
    assert run_of("--trial", "a:b:kd:1").method == Kd(weight=0.4)


def test_without_a_trial_it_is_dfkt_at_its_reference_settings() -> None:
    assert run_of() == RunConfig()
    assert isinstance(run_of().method, Dfkt)


def test_an_own_method_may_lie_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "distill_own.py").write_text(OWN_METHOD)
    method: Any = run_of("--method", "distill_own:Plain", "--set", "depth=3", "rate=0.2").method
    assert (method.name, method.depth, method.rate) == ("plain", 3, 0.2)


def test_a_network_without_taps_can_be_taught_by_kd_and_learn_from_scratch(tmp_path: Path) -> None:
    (tmp_path / "distill_nets.py").write_text(OWN_NETWORKS)
    data = load_data(DataConfig(limit_train=100), str(tmp_path))
    for method in ("kd", "dkd", "scratch"):
        (stage,) = check_run(run_of("--method", method, "--student", "distill_nets:small"), data)
        assert stage.phase == "task"


def test_what_lies_in_the_folder_beside_a_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "run_job", lambda job, report: report(REPORT))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(["distill", "--method", "scratch", "--out", "out"]) == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert {"run.json", "result.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


REPORT = {"records": [], "val_accuracy": 0.5, "test_accuracy": 0.25, "complete": True}


def test_a_run_that_is_done_is_told_again_and_a_failed_one_fails_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [{"records": [], "failure": "The loss became nan"}, REPORT]
    monkeypatch.setattr(distill, "run_job", lambda job, report: report(reports.pop()))
    for out, code, said in (("good", 0, "val 50.00 %, test 25.00 %"), ("bad", 1, "failed: The loss became nan")):
        for _ in range(2):
            assert main(["distill", "--method", "scratch", "--out", out]) == code
            assert said in capsys.readouterr().out
    assert not reports


def teacher_found(asked: list[Any], config: Any) -> Teacher:
    """Return a teacher that needs no training, and note who asked."""
    asked.append(config)
    return Teacher(build_network(NetworkConfig(name="resnet8"), num_classes=10, in_channels=1), "key", 0.5)


def test_only_a_taught_method_asks_for_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(distill, "find_teacher", lambda *given: teacher_found(asked, given[0]))
    monkeypatch.setattr(distill, "run_job", lambda job, report: report(REPORT))
    assert main(["distill", "--method", "scratch", "--out", "a"]) == 0
    assert not asked
    assert main(["distill", "--method", "kd", "--out", "b", "--teacher", "resnet14"]) == 0
    assert [config.network.name for config in asked] == ["resnet14"]


@pytest.fixture
def searched(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A study with one trial that was really trained, in the second of two sessions, on two threads; its last record."""
    placement = Placement(teacher_root=str(tmp_path / "teachers"), data_root=str(tmp_path / "data"), threads=2)
    data = DataConfig(name="digits", limit_train=100, limit_test=60)
    train = TrainConfig(epochs=2, batch_size=32)
    config = tiny("searched", ArmConfig(name="kd", method=Kd(), trials=1), data=data, train=train)
    method = Kd(weight=0.5)
    storage = Storage(tmp_path / "searched")
    known = check_study(config, storage, placement, print)
    about, taps = known.about, known.taps
    for threads in (1, 2):
        noted = to_dict(replace(placement, threads=threads))
        store = open_store(config, storage, about, taps, placement=noted)
    study = OpenStudy(config, store, placement, taps)
    keep_teacher(study, print)
    (tmp_path / "teachers").rename(tmp_path / "gone")  # what is trained again learns from the study's own teacher
    records: list[dict[str, Any]] = []
    job = study.job("trial", config.run(config.arms[0], method), "runs", "kd-00000")
    started = datetime.now(UTC)
    run_job(job, lambda payload: records.extend(payload["records"]))
    row = {"number": 0, "state": "COMPLETE", "started": started, "last_val_accuracy": records[-1]["val_accuracy"]}
    store.save("trial", "kd", row | settings(method))
    open_store(config, storage, about, taps, placement=to_dict(replace(placement, threads=1)))  # a later session
    yield records[-1]
    torch.set_num_threads(1)


@pytest.mark.slow
def test_a_trial_is_trained_again_to_the_last_bit_and_tested_when_asked(
    searched: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Any] = []
    load_test = cached.load_test
    monkeypatch.setattr(cached, "load_test", lambda *given: opened.append(given) or load_test(*given))
    monkeypatch.setattr(cached, "_CACHE", cached._Cache())
    argv = ["distill", "--trial", "searched:0", "--out", "again"]
    assert main(argv) == 0
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert torch.get_num_threads() == 2
    for name in ("loss", "val_loss", "val_accuracy"):
        assert result["records"][-1][name] == searched[name]
    assert result["val_accuracy"] == searched["val_accuracy"]
    assert "test_accuracy" not in result
    assert not opened
    val = f"kd: val {100 * searched['val_accuracy']:.2f} %, "
    assert f"{val}test with --test\n" in capsys.readouterr().out

    assert len(load_student(tmp_path / "again").classes) == 10
    student = (tmp_path / "again" / "model.safetensors").read_bytes()
    monkeypatch.setattr(distill, "run_job", lambda *given: pytest.fail("it is trained already"))
    assert main([*argv, "--test"]) == 0
    assert len(opened) == 1
    tested = json.loads((tmp_path / "again" / "result.json").read_text())
    assert tested == result | {name: tested[name] for name in ("test_accuracy", "test_loss")}
    assert f"{val}test {100 * tested['test_accuracy']:.2f} %\n" in capsys.readouterr().out
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == student
    assert main(argv) == 0
    assert "test with --test" in capsys.readouterr().out

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main([*argv[:-1], "at-once", "--test"]) == 0
    at_once = json.loads((tmp_path / "at-once" / "result.json").read_text())
    assert [at_once[name] for name in ("test_accuracy", "test_loss")] == [tested["test_accuracy"], tested["test_loss"]]


def test_a_trial_lies_where_its_study_said_unless_switches_say_otherwise(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(distill, "run_distill", lambda *some, **more: given.append((*some, more)) or {})
    session = {"started": "2026-11-22T15:00:36+00:00", "placement": to_dict(Placement(data_root="/there", threads=3))}
    store = StudyStore.open(Storage(whole))
    for sessions in ([], [{"started": session["started"]}], [session]):
        store.update_meta(sessions=sessions)
        assert main(["distill", "--trial", "whole:kd:0"]) == 0
    assert main(["distill", "--trial", "whole:kd:0", "--threads", "2", "--teacher", "resnet26", "--test"]) == 0
    assert main(["distill", "--method", "kd"]) == 0
    assert [(one[1].threads, one[1].data_root, one[4]["test"]) for one in given] == [
        *[(1, Placement().data_root, False)] * 2,
        (3, "/there", False),
        (2, "/there", True),
        (1, Placement().data_root, True),
    ]
    assert [getattr(one[4]["teacher"], "path", None) for one in given] == [*[str(whole)] * 3, None, None]


def test_flow_pairs_that_are_left_out_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "find_teacher", lambda *given: teacher_found([], None))
    monkeypatch.setattr(distill, "run_job", lambda job, report: report(REPORT))
    deep = ["--student", "resnet14", "--student-width", "0.25", "--teacher", "resnet8"]
    assert main(["distill", *deep, "--set", "pattern=adjacent", "--out", "a"]) == 0
    assert "flow pairs (1,2) (3,4) (5,6) are left out, both taps meet one tap of the teacher" in capsys.readouterr().out
    assert main(["distill", *deep, "--method", "kd", "--out", "b"]) == 0
    assert "left out" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_student_deeper_than_its_teacher_is_trained(tmp_path: Path) -> None:
    deep = ["--student", "resnet14", "--epochs", "3", "--set", "pattern=dense-2", "--out", "deep"]
    assert main(["distill", *TINY, *deep, "--teacher-root", "teachers"]) == 0
    records = json.loads((tmp_path / "deep" / "result.json").read_text())["records"]
    assert all(record["flow_loss"] > 0 for record in records if record["phase"] == "flow")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_end_and_is_then_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def argv(out: str) -> list[str]:
        return ["distill", *TINY, "--epochs", "3", "--out", out, "--teacher-root", "teachers"]

    assert main(argv("whole")) == 0
    run_job = distill.run_job

    def interrupted(job: Any, report: Any) -> None:
        def stop_later(payload: dict[str, Any]) -> None:
            report(payload)
            if payload["records"] and payload["records"][-1]["index"] == 2:
                raise KeyboardInterrupt

        run_job(job, stop_later)

    monkeypatch.setattr(distill, "run_job", interrupted)
    assert main(argv("parts")) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(distill, "run_job", run_job)
    assert main(argv("parts")) == 0
    first = capsys.readouterr().out.splitlines()

    results = [json.loads((tmp_path / out / "result.json").read_text()) for out in ("whole", "parts")]
    assert [result["attempts"] for result in results] == [1, 2]
    for name in ("val_accuracy", "test_accuracy", "test_loss"):
        assert results[0][name] == results[1][name]
    indices = [record["index"] for record in results[1]["records"]]
    assert indices == list(range(len(indices)))
    assert load_student(tmp_path / "parts").config == load_student(tmp_path / "whole").config

    assert main(argv("parts")) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == first[-2:]
    assert main([*argv("parts"), "--set", "rate=0.01"]) == 2
    assert "holds another run. Take another --out" in capsys.readouterr().err
