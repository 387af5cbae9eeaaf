"""``export`` writes a student beside its package, measures it, and touches nothing else."""

import re
from pathlib import Path

import pytest
from exports import left, taught_digits
from made import Arm, write_study

from dfkt.cli import export
from dfkt.cli.main import main
from dfkt.config import DataConfig
from dfkt.errors import DataError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the line that refuses a command."""
    assert main(["export", *argv]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    return said.err


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_student_is_exported_measured_and_told_by_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = taught_digits(tmp_path / "digits")
    assert main(["export", "digits", "--to", "int8", "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    shares = re.findall(r"^(student resnet8|the same in ONNX|student\.int8\.onnx) .* ([\d.]+)$", out, re.MULTILINE)
    assert [name for name, _ in shares] == ["student resnet8", "the same in ONNX", "student.int8.onnx"]
    assert shares[0][1] == shares[1][1]
    assert abs(float(shares[2][1]) - float(shares[0][1])) < 3
    assert out.endswith("student.int8.onnx: calibrated on 256 training images; accuracies of 359 test images.\n")
    assert main(["export", "digits", "--to", "onnx", "-o", "other.onnx", "--seconds", "0"]) == 0
    assert "other.onnx: its logits are the student's within " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "other.onnx"]
    (folder / "student.onnx").write_bytes(b"something else")
    assert main(["cost", "./digits", "--seconds", "0.01", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    rows = [line for line in said.out.splitlines() if line.startswith("student")]
    assert [row.split("  ")[0] for row in rows] == ["student resnet8", "student.int8.onnx"]
    assert rows[1].endswith(shares[2][1])
    assert rows[1].count("[") == 2  # times
    assert said.err.startswith("left out: ")
    assert said.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_studys_best_student_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "blobs", [Arm("scratch", {1: 0.7, 2: 0.8})])
    for seed in (1, 2):
        left(tmp_path / f"blobs/students/scratch-seed{seed}")
    assert main(["export", "blobs", "--to", "pt2", "--seconds", "0"]) == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt2")] == [
        "blobs/students/scratch-seed1/student.pt2"
    ]


@pytest.mark.slow
def test_an_operator_that_cannot_be_exported_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left(tmp_path / "odd", "exports:bessel")
    assert "uses prims.bessel_j0" in refused(capsys, "odd", "--to", "onnx")
    assert not (tmp_path / "odd/student.onnx").exists()


def test_what_cannot_be_done_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left(tmp_path / "student", name="")
    assert "the file ends in .onnx" in refused(capsys, "student", "--to", "int8", "-o", "a.pt2")
    assert "must exist, but" in refused(capsys, "student", "--to", "onnx", "-o", "none/a.onnx")
    assert "has no config.json" in refused(capsys, "nowhere", "--to", "onnx")
    assert "seconds >= 0" in refused(capsys, "student", "--to", "onnx", "--seconds", "-1")
    (folder / "student.pt2").write_text("mine")
    assert "replaces none but its like" in refused(capsys, "student", "--to", "pt2")
    assert (folder / "student.pt2").read_text() == "mine"
    (folder / "model.safetensors").unlink()
    assert "has none beside config.json" in refused(capsys, "student", "--to", "onnx")


def test_eight_bits_without_the_students_images_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left(tmp_path / "student", name="", **{"image_size": 8})
    said = refused(capsys, "student", "--to", "int8", "--data", "gone")
    assert "calibrated on the student's training images." in said
    assert "an existing folder, but got" in said
    assert "must be the student's, 4 and [1, 8, 8], but digits has 10 classes" in refused(
        capsys, "student", "--to", "int8", "--data", "digits"
    )


def test_int8_looks_for_the_sets_where_the_study_had_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(config: DataConfig, root: str) -> None:
        raise DataError(f"nothing in {root}.")

    monkeypatch.setattr(export, "load_data", look)
    store = write_study(tmp_path / "far", [Arm("scratch", {1: 0.7})])
    sessions = store.meta["sessions"]
    store.update_meta(sessions=[sessions[-1] | {"placement": {"data_root": str(tmp_path / "sets")}}])
    left(tmp_path / "far/students/scratch-seed1")
    assert f"nothing in {tmp_path / 'sets'}." in refused(capsys, "far", "--to", "int8")
    others = str(tmp_path / "others")
    assert f"nothing in {others}." in refused(capsys, "far", "--to", "int8", "--data-root", others)
