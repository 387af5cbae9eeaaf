"""``cost`` tells of networks, of students and of studies what they cost, side by side."""

import re
from pathlib import Path

import pytest
from conftest import synthetic_images
from made import Arm, write_study

from dfkt.cli.main import main
from dfkt.config import NetworkConfig
from dfkt.methods.kd import Kd
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.students.keep import keep_student
from dfkt.training.config import RunConfig
from dfkt.training.run import Trained

SMALL = NetworkConfig(name="resnet8", width=0.25)


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def left(folder: str, *, taught: bool = True) -> None:
    """Keep a student in a folder."""
    run = RunConfig(method=Kd() if taught else Scratch(), student=SMALL)
    network = build_network(SMALL, num_classes=4, in_channels=1)
    teacher = {"key": "abc", "network": "resnet26", "width": 1.0, "test_accuracy": 0.9}  # as study.json has it
    keep_student(Storage(folder), Trained(run, network, synthetic_images(), 0.5, 0.25), teacher)


def rows(capsys: pytest.CaptureFixture[str], *argv: str) -> list[list[str]]:
    """Return the cells of the table that is printed."""
    assert main(["cost", *argv]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    starts = [match.start() for match in re.finditer(r"(?<=  )\S|^\S", lines[0])]
    return [[line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)] for line in lines]


def test_named_networks_are_told_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(capsys, "resnet20", "resnet56", "--seconds", "0") == [
        ["network", "parameters", "MACs", "MiB"],
        ["resnet20", "0.27 M", "40.6 M", "1.03"],
        ["resnet56", "0.853 M", "125 M", "3.27"],
    ]
    wide = rows(capsys, "resnet20", "--image-size", "64", "--classes", "100", "--channels", "1", "--seconds", "0")
    assert wide[1][:3] == ["resnet20", "0.275 M", "161 M"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_student_is_measured_beside_its_teacher_and_the_last_line_says_on_what(
    capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    left("student")
    argv = ["./student", "--seconds", "0.01", "--precision", precision, "--device", "cpu", "--threads", "1"]
    head, teacher, student = rows(capsys, *argv)
    assert head == ["network", "parameters", "MACs", "MiB", *(f"ms an image, batch {n}" for n in (1, 64)), "test %"]
    assert (teacher[0], teacher[1], teacher[-1]) == ("teacher resnet26", "0.366 M", "90.00")
    assert (student[0], student[1], student[-1]) == ("student resnet8", "4.83 k", "25.00")
    for cell in (*teacher[4:6], *student[4:6]):
        low, high = map(float, re.findall(r"\[(.*), (.*)\]", cell)[0])
        assert 0 < low <= float(cell.split()[0]) <= high
    assert main(["cost", *argv]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Time: median and quartiles over up to 200 forward passes, networks in turns, ")
    named = {"float32": "float32 on ", "bfloat16": "bfloat16 (files of `export`: float32) on "}
    assert named[precision] in last
    assert last.endswith(", 1 thread.")


def test_a_studys_best_student_is_measured_beside_its_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    write_study(Path("blobs"), [Arm("scratch", {1: 0.7, 2: 0.8})])
    left("blobs/students/scratch-seed1", taught=False)
    found = rows(capsys, "blobs", "--seconds", "0")
    assert [(row[0], row[-1]) for row in found[1:]] == [("teacher resnet26", "90.00"), ("student resnet8", "25.00")]


def test_a_student_without_a_teacher_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    left("student", taught=False)
    assert [row[0] for row in rows(capsys, "student", "--seconds", "0")] == ["network", "student resnet8"]


BAD = [
    ("resnet9", "`depth = 6n+2, n >= 1` must hold, but got resnet9"),
    ("nonsense", "Unknown network 'nonsense'"),
    ("./nowhere", "must hold a student (config.json) or a study (study.json)"),
    ("empty", "must have a complete final run"),
    ("damaged", "model.safetensors is damaged"),
    ("gone", "has no config.json"),
    ("resnet8 --image-size 0", "`image_size >= 1` must hold"),
    ("resnet8 --classes -1", "`classes >= 1` must hold"),
    ("resnet8 --channels 0", "`channels >= 1` must hold"),
    ("resnet8 --seconds -1", "`seconds >= 0` must hold"),
    ("resnet8 --threads 0", "`threads >= 1` must hold"),
    ("resnet8 --device tpu", "`device` must be one of cpu"),
    ("torchvision:vit_b_16", "must take images of 3x32x32, but does not: AssertionError: Wrong image height"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[argv for argv, _ in BAD])
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    write_study(Path("empty"), [Arm("scratch")])
    write_study(Path("gone"), [Arm("scratch", {1: 0.7})])
    left("damaged")
    Path("damaged/model.safetensors").write_bytes(b"x")
    assert main(["cost", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
