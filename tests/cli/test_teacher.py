"""The command trains a teacher once, finds it then, and a study finds it too."""

from pathlib import Path
from typing import Any

import pytest
from cli.switches import study_of

from dfkt.cli.main import main
from dfkt.config import DataConfig, TeacherConfig, TrainConfig
from dfkt.study.config import StudyConfig
from dfkt.training.config import with_precision
from dfkt.training.optim import decided

SWITCHES = [
    "--data",
    "digits",
    "--limit-train",
    "300",
    "--limit-test",
    "60",
    "--batch-size",
    "64",
    "--teacher",
    "resnet8",
]


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command asks for, with nothing trained."""
    seen: list[Any] = []
    monkeypatch.setattr("dfkt.training.cached.images_for", lambda config, placement: config)
    monkeypatch.setattr("dfkt.training.teacher.find_teacher", lambda *given: seen.append(given))
    return seen


def test_it_is_the_teacher_that_a_study_with_these_switches_asks_for(asked: list[Any]) -> None:
    assert main(["teacher", *SWITCHES, "--epochs", "3", "--teacher-width", "0.5"]) == 0
    ((teacher, data, *_),) = asked
    study = study_of(
        StudyConfig(name="s"), *SWITCHES, "--teacher-epochs", "3", "--teacher-width", "0.5", "--epochs", "9"
    )
    chosen = decided("auto", "cpu")
    assert (teacher, data) == (with_precision(study, chosen, chosen).teacher, study.data)


def test_without_switches_it_is_the_default_one(asked: list[Any]) -> None:
    assert main(["teacher"]) == 0
    train = TrainConfig(precision=decided("auto", "cpu"))
    assert asked[0][:2] == (TeacherConfig(train=train), DataConfig())


def test_it_takes_as_many_threads_as_it_is_given_and_one_as_a_study_does(asked: list[Any]) -> None:
    assert main(["teacher", "--threads", "3"]) == 0
    assert main(["teacher"]) == 0
    assert [placement.threads for _, _, placement, _ in asked] == [3, 1]


@pytest.mark.slow
def test_a_teacher_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["teacher", *SWITCHES, "--teacher-root", "teachers", "--epochs", "1"]
    assert main(argv) == 0
    assert "trained in" in capsys.readouterr().out
    assert main(argv) == 0
    assert "found in" in capsys.readouterr().out
    assert len([path for path in (tmp_path / "teachers").iterdir() if path.is_dir()]) == 1
