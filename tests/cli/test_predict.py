"""``predict`` gives the same answers from a student's folder and from its file, and goes on behind what is broken."""

import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import write_image
from exports import left

from dfkt.cli.main import main
from dfkt.students.export import about, onnx_bytes, to_onnx, to_pt2
from dfkt.students.package import load_student


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student's folder, and three images beside it."""
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        write_image(tmp_path / f"images/{k}.png", (20 + k, 30), seed=k)
    return left(tmp_path / "student")


def answers(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> list[list[str]]:
    """Return the cells that are printed."""
    assert main(["predict", *argv]) == code
    return [line.split("  ") for line in capsys.readouterr().out.splitlines()]


def test_each_image_is_told_with_its_likeliest_classes(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = answers(capsys, "student", "images", "--top", "2")
    assert [row[0] for row in rows] == [f"images/{k}.png" for k in range(3)]
    for _, *told in rows:
        shares = [float(text.split()[1]) for text in told]
        assert len(told) == 2
        assert 100 >= shares[0] >= shares[1]
        assert all(text.split()[0] in "0123" and text.endswith(" %") for text in told)
    assert len(answers(capsys, "student", "images/0.png", "images/1.png")[0]) == 1 + 4  # there are no more classes


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_folder_and_files_give_the_same_answers(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    found = load_student(student, "float32")
    (student / "a.onnx").write_bytes(onnx_bytes(to_onnx(found), about(found, "onnx")))
    (student / "a.pt2").write_bytes(to_pt2(found))
    tables = []
    for source in ("student", "student/a.onnx", "student/a.pt2"):
        assert main(["predict", source, "images", "--out", "a.parquet"]) == 0
        tables.append(pd.read_parquet("a.parquet"))
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_table_has_a_row_for_each_image(student: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    rows = answers(capsys, "student", "images", "--top", "2", "--out", name)
    table = pd.read_csv(name, dtype={"class": str}) if name == "a.csv" else pd.read_parquet(name)
    assert list(table) == ["path", "class", "probability", "class_2", "probability_2"]
    shown = [f"{name} {100 * share:.2f} %" for name, share in zip(table["class"], table["probability"], strict=True)]
    assert shown == [row[1] for row in rows]


def test_a_broken_file_is_named_and_the_rest_goes_on(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("images/1.png").write_text("no image")
    assert main(["predict", "student", "images", "nowhere.png"]) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["images/0.png", "images/2.png"]
    first, second, last = said.err.splitlines()
    assert "images/1.png" in first
    assert "nowhere.png" in second
    assert last == "2 of 4 images could not be read"


def test_names_that_are_no_text_or_too_long_stop_nothing(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(b"images/1.png", b"images/caf\xe9.png")
    assert main(["predict", "student", "images", "x" * 300 + ".png", "--out", "a.csv"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "1 of 4 images could not be read"
    assert [Path(path).name for path in pd.read_csv("a.csv").path] == ["0.png", "2.png", "caf\\udce9.png"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["student", "empty"], "There must be an image"),
        (["student", "nowhere.png"], "there is no such file"),
        (["student", "images", "--out", "a.xlsx"], "the table ends in .parquet or .csv"),
        (["student", "images", "--out", "none/a.csv"], "must exist, but"),
        (["student", "images", "--out", ".csv"], "the table has a name before its ending"),
        (["student", "images", "--top", "0"], "top >= 1"),
        (["nowhere", "images"], "has no config.json"),
        (["nowhere.onnx", "images"], "there is none at"),
        (["images/0.png.onnx", "images"], "cannot be read as a student in ONNX"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    student: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    pytest.importorskip("onnxruntime")
    Path("empty").mkdir()
    Path("images/0.png.onnx").write_text("no model")
    assert main(["predict", *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not Path("none").exists()


def test_a_table_that_cannot_be_written_is_refused_before_any_image_is_read(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "student", "images", "--out", "/proc/table.csv"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "/proc" in captured.err
