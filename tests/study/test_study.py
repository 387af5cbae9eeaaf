"""A study runs to its end whatever stops it, and its store tells the truth.

All studies run on one Ray cluster, which a process of its own holds, but for the one that is killed: it starts its own.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import CPUS, RAY_MARKS, processes_of

from dfkt.cli.main import run_script
from dfkt.config import (
    DataConfig,
    FlowConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    StudyConfig,
    TeacherConfig,
    TrainConfig,
)
from dfkt.errors import ConfigError, StudyError
from dfkt.store.study_store import read_study
from dfkt.store.files import Storage
from dfkt.study.study import StudyResult, run_study
from dfkt.study.driver import Workers

pytestmark = RAY_MARKS


def tiny(home: Path, name: str, **changes: Any) -> StudyConfig:
    """A study of seconds."""
    base = RunConfig(
        data=DataConfig(name="digits", limit_train=300, limit_test=60),
        teacher=TeacherConfig(
            network=NetworkConfig(name="resnet8", width=0.5),
            train=TrainConfig(epochs=1, batch_size=64),
            root=str(home / "teachers"),
        ),
        student=NetworkConfig(name="resnet8", width=0.25),
        train=TrainConfig(epochs=2, batch_size=64),
    )
    settings: dict[str, Any] = {"base": base, "trials": 2, "seeds": 1, "baselines": ("scratch",)}
    return StudyConfig(name=name, **{**settings, "early_stopping": False, **changes})


def run(config: StudyConfig, home: Path, address: str, **more: Any) -> tuple[StudyResult, list[str]]:
    lines: list[str] = []
    return run_study(config, str(home), address=address, log=lines.append, **more), lines


@pytest.fixture(scope="module")
def first(home: Path, address: str) -> StudyResult:
    """The study that most tests here look at, run once."""
    return run(tiny(home, "first"), home, address)[0]


def same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(one, other)
    return True


def test_a_study_runs_to_its_end(first: StudyResult, home: Path) -> None:
    study = read_study(home / "first")
    assert (first.interrupted, first.failures) == (False, 0)
    assert list(study.trials.number) == [0, 1]
    assert set(study.trials.state) == {"COMPLETE"}
    assert study.trials.last_val_accuracy.between(0, 1).all()
    assert study.trials.param_pattern.notna().all()
    assert study.epochs.groupby("number").step.max().nunique() == 1  # the same number of steps for all
    assert study.epochs[study.epochs.phase == "flow"].val_accuracy.isna().all()

    assert sorted(study.finals.method) == ["dfkt", "scratch"]
    assert set(study.finals.state) == {"COMPLETE"}
    assert study.finals.test_accuracy.between(0, 1).all()
    assert 0 <= study.meta["teacher"]["test_accuracy"] <= 1
    assert len(study.meta["sessions"]) == 1


def test_nothing_is_left_behind_but_the_study(first: StudyResult, home: Path) -> None:
    folder = home / "first"
    assert not (folder / "ray").exists()
    assert not list(folder.glob("runs/*"))
    assert not list(folder.glob("finals_runs/*/state.pt"))
    assert len(list(folder.glob("finals_runs/*/student.pt"))) == 2


def test_a_finished_study_run_again_does_nothing_new(first: StudyResult, home: Path, address: str) -> None:
    again, lines = run(tiny(home, "first"), home, address)
    assert (again.interrupted, again.failures) == (False, 0)
    for table in ("trials", "epochs", "finals", "final_epochs"):
        assert same(getattr(again.study, table), getattr(first.study, table))
    assert not any(line.startswith(("search", "final", "[")) for line in lines)


def test_more_trials_are_added_to_those_there_are(first: StudyResult, home: Path, address: str) -> None:
    shutil.copytree(home / "first", home / "more" / "first")
    more, lines = run(tiny(home, "first", trials=3, baselines=("scratch", "kd")), home / "more", address)

    assert list(more.study.trials.number) == [0, 1, 2]
    assert same(more.study.trials.head(2), first.study.trials)
    assert any("3 trials, 2 done before" in line for line in lines)
    old = more.study.finals[more.study.finals.number.isin(first.study.finals.number)].reset_index(drop=True)
    assert same(old, first.study.finals)
    assert {"kd", "scratch", "dfkt"} <= set(more.study.finals.method)


def test_another_configuration_is_refused_with_the_difference_named(
    first: StudyResult, home: Path, address: str
) -> None:
    config = tiny(home, "first")
    longer = dataclasses.replace(
        config, base=dataclasses.replace(config.base, train=TrainConfig(epochs=5, batch_size=64))
    )
    with pytest.raises(StudyError, match=r"base\.train\.epochs was 2, is 5"):
        run(longer, home, address)


def test_a_folder_in_use_is_refused(home: Path) -> None:
    with Storage(home / "busy").lock(), pytest.raises(StudyError, match="in use"):
        run_study(tiny(home, "busy"), str(home))


def test_more_workers_than_the_cluster_has_are_refused_before_anything_is_written(home: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=f"takes 3 CPU, but the cluster has {CPUS}"):
        run(tiny(home, "wide"), home, address, workers=Workers(count=3))
    assert not (home / "wide" / "study.json").exists()
    assert not (home / "wide" / "teacher.pt").exists()


def test_no_cluster_at_an_address_is_bad_input(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(tiny(home, "alone"), "", ["--results", str(home), "--address", "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: No Ray cluster answers at nonsense")


def test_a_trial_whose_loss_becomes_nan_is_failed_with_its_place(
    home: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(home, "nan")
    explosive = FlowConfig(optimizer=OptimizerConfig(weight_decay=1e30))
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, flow=explosive))

    assert run_script(config, "", ["--results", str(home), "--address", address]) == 1

    trials = read_study(home / "nan").trials
    assert list(trials.state) == ["FAIL", "FAIL"]
    assert trials.error.str.contains(r"in (?:round|task).*stage.*, epoch").all()
    assert trials.error.str.contains(r"epoch \d+, step \d+").all()
    assert trials.last_val_accuracy.isna().all()
    assert list(trials.attempts) == [1, 1]  # it would end the same
    assert "no trial was completed" in capsys.readouterr().out


def test_a_trial_may_span_several_workers(home: Path, address: str) -> None:
    result, _ = run(tiny(home, "spread", trials=1, baselines=()), home, address, workers=Workers(count=2))
    assert (list(result.study.trials.state), list(result.study.trials.workers)) == (["COMPLETE"], [2])
    assert list(result.study.finals.state) == ["COMPLETE"]


def command(home: Path, name: str, *more: str) -> list[str]:
    switches = f"--name {name} --results {home} --trials 6 --seeds 1 --epochs 3 --batch-size 64 --limit-train 300"
    networks = f"--teacher resnet8 --student-width 0.25 --teacher-epochs 1 --teacher-root {home / 'teachers'}"
    return [sys.executable, "-m", "dfkt", "study", *switches.split(), *networks.split(), "--baselines", "", *more]


def start_and_wait_for_a_trial(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a study, and return when its first finished trial was told while others are left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[1/6]"):
            return process
    assert process.stderr is not None
    raise AssertionError(process.stderr.read())


@pytest.mark.timeout(480)
def test_a_killed_study_goes_on_and_leaves_no_process(home: Path, address: str) -> None:
    process = start_and_wait_for_a_trial(command(home, "killed"))
    with process:
        process.kill()
    before = read_study(home / "killed").trials
    finished = before[before.state != "RUNNING"].reset_index(drop=True)
    assert 1 <= len(finished) < 6

    deadline = time.monotonic() + 180  # Ray notices after a while that its driver is gone
    while left := processes_of(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)

    done = subprocess.run(
        command(home, "killed", "--address", address), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    trials = read_study(home / "killed").trials
    assert list(trials.number) == list(range(6))
    assert not (trials.state == "RUNNING").any()
    assert same(trials[trials.number.isin(finished.number)].reset_index(drop=True), finished)
    assert (trials[trials.number.isin(before[before.state == "RUNNING"].number)].attempts >= 2).all()


def test_ctrl_c_keeps_what_was_finished(home: Path, address: str) -> None:
    process = start_and_wait_for_a_trial(command(home, "stopped", "--address", address))
    with process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the same command goes on from there" in out + err
    assert "Traceback" not in out + err
    trials = read_study(home / "stopped").trials
    assert (trials.state != "RUNNING").any()
    assert trials.number.is_unique
