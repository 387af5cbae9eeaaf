"""``doctor`` prints what was found, and its exit code says whether a study would fail."""

from pathlib import Path
from typing import Any

import pytest

from dfkt.cli.main import main
from dfkt.study import doctor
from dfkt.study.doctor import Report
from dfkt.study.findings import Finding

WARNING = Finding(False, "its clock is 8 s from this machine's", "two", "Set it")
FAILURE = Finding(True, "ray is 1, here it is 2", "one", "Install it")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the machines are asked; ``findings`` is what comes of it."""
    given: dict[str, Any] = {"findings": []}

    def look(results: str, data: str | None, **more: Any) -> Report:
        given.update(more, results=results, data=data)
        return Report(given["findings"], 2)

    monkeypatch.setattr(doctor, "look", look)
    return given


@pytest.mark.parametrize(
    ("findings", "code", "said"),
    [
        ([], 0, "nothing found"),
        ([WARNING], 0, "1 finding to know of"),
        ([FAILURE], 1, "1 finding that fails"),
        ([FAILURE, FAILURE, WARNING], 1, "2 findings that fail and 1 finding to know of"),
    ],
)
def test_the_exit_code_says_whether_a_study_would_fail(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str], findings: list[Finding], code: int, said: str
) -> None:
    asked["findings"] = findings
    assert main(["doctor"]) == code
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [finding.describe() for finding in findings]
    assert last.startswith("2 machines asked in ")
    assert last.endswith(f" s: {said}")


def test_what_is_asked_is_what_the_switches_say(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    main(["doctor"])
    assert (asked["results"], asked["data"], asked["address"]) == ("results", None, None)
    main(["doctor", "--results", "s3://b/c", "--data", "images", "--data-root", "root", "--address", "h:1"])
    assert (asked["results"], asked["data"]) == ("s3://b/c", str(tmp_path / "images"))
    assert (asked["data_root"], asked["address"]) == (str(tmp_path / "root"), "h:1")
    main(["doctor", "--data", "mnist"])
    assert asked["data"] == "mnist"


def test_files_alone_are_looked_at_where_any_are_given(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("a: 1\nregion: CHANGE-ME-REGION  # CHANGE-ME-NOT\n")
    assert main(["doctor", str(file)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"fails: {file}, line 2: CHANGE-ME-REGION is not filled in. docs/cluster.md")
    assert out.endswith(f"{file}: 1 finding that fails\n")
    file.write_text("region: here\n")
    assert main(["doctor", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: nothing found\n"
    assert "results" not in asked


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["absent.yaml"], "A cluster's file must be readable, but absent.yaml is not: FileNotFoundError"),
        (["."], "IsADirectoryError"),
        (["--results", ""], "got an empty text"),
        (["--results", "s3://"], "s3://"),
        (["--data", ""], "not be empty"),
        (["--data-root", ""], "A path must not be empty"),
        (["--address", "127.0.0.1:1"], "No Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *argv]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert more == []
    assert list(tmp_path.iterdir()) == []
