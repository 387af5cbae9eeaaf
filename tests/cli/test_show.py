"""What ``show`` prints is the page of what lies there."""

from pathlib import Path

import pytest
from made import Arm, write_study

from dfkt.analysis.pages import folder_page
from dfkt.cli.main import main

ARMS = [
    Arm("scratch", {1: 0.7, 2: 0.8}),
    Arm("dfkt", {1: 0.8, 2: 0.85}, planned=3, trials=[("COMPLETE", 0.75), ("COMPLETE", 0.5), ("FAIL", None)]),
]


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["show", *argv]) == 0
    return capsys.readouterr().out


def test_a_studys_page_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "blobs", ARMS)
    out = shown(capsys, "blobs")
    assert out == f"{folder_page('blobs')}\n"
    assert "3 trials: 2 complete, 1 failed" in out
    assert "75.00" in out


def test_the_number_of_best_trials_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "blobs", ARMS)
    assert "50.00" in shown(capsys, "blobs")
    assert "50.00" not in shown(capsys, "blobs", "--best", "1")
    for wrong in ("0", "-1"):
        assert main(["show", "blobs", "--best", wrong]) == 2
        assert f"`best >= 1` must hold, but got best={wrong}" in capsys.readouterr().err


def test_a_folder_of_studies_is_shown_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        write_study(tmp_path / "results" / name, ARMS, name=name)
    (tmp_path / "results" / "else").mkdir()
    out = shown(capsys, "results")
    assert out.index("first:") < out.index("second:")


def test_a_study_that_has_only_begun_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "new", [Arm("scratch"), Arm("dfkt", planned=3)])
    out = shown(capsys, "new")
    assert "no trials yet" in out
    assert "no final runs yet" in out
