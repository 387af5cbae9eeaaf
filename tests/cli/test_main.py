"""Bad input is one line and exit code 2, before anything is trained; what fails later is 1, Ctrl-C is 130."""

import re
from pathlib import Path

import pytest
import torch
from cli.switches import OWN_METHOD, OWN_NETWORKS, make_folder
from made import Arm, write_study

from dfkt.cli.main import main
from dfkt.store.files import Storage

BOTH = [
    ("--data nowhere", "must be one of cifar10"),
    ("--data ''", "not empty"),
    ("--data file", "or an existing folder, but got 'file'"),
    ("--data one", "two or more classes, but has only 'a'"),
    ("--data hollow", "but c has none"),
    ("--data broken", "bad.png"),
    ("--data-root ''", "A path must not be empty"),
    ("--student nonsense", "Unknown network 'nonsense'"),
    ("--student resnet9", "The nearest is resnet8"),
    ("--student no.such:thing", "Cannot import 'no.such:thing'"),
    ("--student mynets_of_main:small", "does not know its taps"),
    ("--student-width -1", "0 < width <= 64"),
    ("--student-width 1e9", "0 < width <= 64"),
    ("--student-taps stem,nothing", "Unknown tap 'nothing'"),
    ("--student-taps stem", "A flow pair needs two taps"),
    ("--student-taps stem,stem", "differ from each other"),
    ("--teacher-taps stem,layer1.0", "grids cannot be matched"),
    ("--teacher-checkpoint absent.pt", "does not exist"),
    ("--teacher-checkpoint ''", "must not be empty"),
    ("--teacher-checkpoint .", "must be a file, but is a folder"),
    ("--teacher-checkpoint garbage.pt", "cannot be read"),
    ("--teacher-checkpoint other.pt", "does not fit resnet8"),
    ("--teacher-pretrained", "Only torchvision:NAME and timm:NAME have weights of their own"),
    ("--teacher-pretrained absent.pt", "does not exist"),
    ("--teacher-pretrained other.pt", "must fit resnet8 but for its last layer"),
    ("--teacher-pretrained a.pt --teacher-checkpoint b.pt", "has a checkpoint or begins with one"),
    ("--teacher-rate 0", "rate > 0"),
    ("--teacher timm:nonsense", "Unknown network 'timm:nonsense'"),
    ("--epochs 0", "0 < epochs <= 1e6"),
    ("--batch-size 0", "batch_size >= 1"),
    ("--checkpoint-every 0", "checkpoint_every >= 1"),
    ("--image-size 0", "1 <= image_size <= 4096"),
    ("--limit-train 5", "raise limit_train"),
    ("--method nonsense", "Unknown method 'nonsense'"),
    ("--method mymethods_of_main:Nothing", "Cannot import 'mymethods_of_main:Nothing'"),
    ("--method mymethods_of_main:Plain --set rounds=1", "Settings of plain are given as NAME=VALUE with rate, depth"),
    ("--set nonsense=1", "Settings of dfkt are given as NAME=VALUE with"),
    ("--set rounds", "Settings of dfkt are given as NAME=VALUE with"),
    ("--set rounds=x", "`rounds` of dfkt must be a whole number"),
    ("--set rounds=-1", "rounds is finite and >= 0"),
    ("--set share=1", "0 < share < 1"),
    ("--set rate=inf", "must be a number"),
    ("--set weight=2", "weight <= 1"),
    ("--set temperature=0", "temperature > 0"),
    ("--set span_weights=3", "`span_weights` of dfkt must be"),
    ("--set pattern=nonsense", "nonsense"),
    ("--set pattern=dense-9", "dense-9"),
    ("--set pattern=dense-²", "dense-²"),
    ("--set pattern=sliding", "sliding"),
]
STUDY = [
    ("--results file/below", "must be writable"),
    ("--results nowhere://x", "URI that pyarrow knows"),
    ("--results . --name one", "holds a. Take another --name"),
    ("--results . --name file", "is a file"),
    ("--trials -1", "trials >= 0"),
    ("--seeds 0", "seeds >= 1"),
    ("--search-seed -1", "search_seed >= 0"),
    ("--max-failures -1", "max_failures >= 0"),
    ("--name ../up", "study name holds"),
    ("--name ''", "study name holds"),
    ("--baselines nonsense", "Unknown method 'nonsense'"),
    ("--baselines dfkt", "leave out the method that is searched"),
    ("--workers-per-run 0", "workers per run >= 1"),
    ("--workers-per-run two", "takes a number, or a range such as 2..8"),
    ("--workers-per-run 8..2", "most workers per run >= fewest"),
    ("--workers-per-run 2..8 --no-sync-batch-norm", "needs synchronised batch norm"),
    ("--workers-per-run 2..999", "workers_per_run <= batch_size"),
    ("--dry-run --workers-per-run 2..999", "workers_per_run <= batch_size"),
    ("--dry-run --workers-per-run two", "takes a number, or a range such as 2..8"),
    ("--at-once 0", "runs at once >= 1"),
    ("--dry-run --at-once 0", "runs at once >= 1"),
    ("--wait -1", "minutes of waiting >= 0"),
    ("--silence -1", "minutes of silence >= 0"),
    ("--search rate", "NAME=LOW..HIGH"),
    ("--search rate=2..1", "low <= high"),
    ("--search nonsense=1..2", "Unknown parameter nonsense"),
    ("--search rate=a,b", "Parameter rate takes numbers, but got 'a'"),
    ("--search rounds=1.5..2", "Parameter rounds takes whole numbers, but got 1.5"),
    ("--search pattern=1..2", "takes some of"),
    ("--search pattern=dense-9", "takes some of"),
    ("--search rate=-2..-1", "rate is finite and >= 0"),
    ("--search rate=1..2 --set rate=1", "rate is both"),
    ("--search rate=1..2 --trials 0", "dfkt has none"),
]
DISTILL = [
    ("--out file/below", "must be writable"),
    ("--out ''", "empty"),
    ("--out taken", "holds config.json, but no run.json. Take another --out"),
    ("--out strange", "is damaged: it does not say which run"),
    ("--seed -1", "0 <= seed"),
    ("--seed -1", "0 <= seed"),
    ("--threads 0", "threads >= 1"),
    ("--device nonsense", "`device` must be one of cpu"),
    ("--trial nowhere", "must have a study.json"),
    ("--trial blobs:9", "has no trial 9. Its trials are 0 of scratch, 1 of kd, 1 of dfkt."),
    ("--trial blobs:scratch", "has no complete trial of arm scratch"),
    ("--trial blobs:nonsense:0", "has the arms scratch, kd, dfkt, but 'blobs:nonsense:0' names nonsense"),
    ("--trial blobs:0", "has a trial 0 in kd, dfkt. Name it FOLDER:ARM:NUMBER"),
]
TEACHER = [
    ("--teacher nonsense", "Unknown network"),
    ("--teacher-checkpoint absent.pt", "does not exist"),
    ("--teacher-root file/below", "must be writable"),
    ("--epochs 0", "0 < epochs <= 1e6"),
    ("--data nowhere", "must be one of cifar10"),
]
CASES = [
    *(("study", *case) for case in BOTH + STUDY),
    *(("distill", *case) for case in BOTH + DISTILL),
    *(("teacher", *case) for case in TEACHER),
    ("show", "one", "must hold a study"),
    ("show", "''", "empty"),
    ("show", "file", "must hold a study"),
]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders and files of every kind of wrong, in a place where no cluster may be started."""

    def refuse(address: str | None) -> None:
        raise AssertionError("a cluster would be started")

    monkeypatch.setattr("dfkt.study.study.cluster", refuse)
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "one", "a")
    make_folder(tmp_path / "hollow", "ab")
    (tmp_path / "hollow" / "c").mkdir()
    make_folder(tmp_path / "broken", "ab")
    (tmp_path / "broken" / "b" / "bad.png").write_text("no image")
    for name in ("taken/config.json", "strange/run.json", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "garbage.pt").write_text("garbage")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "mymethods_of_main.py").write_text(OWN_METHOD)
    (tmp_path / "mynets_of_main.py").write_text(OWN_NETWORKS)
    complete = [("COMPLETE", 0.5)]
    arms = [Arm("scratch"), Arm("kd", planned=1, trials=complete), Arm("dfkt", planned=1, trials=complete)]
    write_study(tmp_path / "blobs", arms)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder, without locks and what Python leaves there."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("name", "wrong", "reason"), CASES)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_touched(
    name: str, wrong: str, reason: str, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(prepared)
    given = ["" if word == "''" else word for word in wrong.split(" ")]
    usual = [] if name == "show" else ["--teacher", "resnet8", "--teacher-root", str(prepared / "teachers")]
    assert main([name, *usual, *given]) == 2

    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert reason in err
    assert contents(prepared) == before
    assert not (prepared / "one" / ".lock").exists()


@pytest.mark.parametrize(
    "wrong",
    ["study --trials many", "study --precision half", "distill --out", "nonsense", "", "show", "teacher --set a=1"],
)
def test_argparse_refuses_with_exit_code_2(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(wrong.split())
    assert raised.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["study", "resume", "distill", "teacher", "show", "report"])
def test_every_command_says_its_switches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    assert "usage: python -m dfkt" in capsys.readouterr().out


def test_the_versions_that_matter_are_said_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    number = r"\d+\.\d+\S*"
    names = ("dfkt", "python", "torch", "ray", "optuna")
    assert re.fullmatch(", ".join(f"{name} {number}" for name in names) + "\n", capsys.readouterr().out)


def test_a_study_folder_in_use_is_bad_input(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Storage(prepared / "results" / "busy").lock():
        assert main(["study", "--name", "busy"]) == 2
    assert "in use by process" in capsys.readouterr().err


def test_a_distill_folder_in_use_is_bad_input(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Storage(prepared / "run").lock():
        assert main(["distill", "--out", "run"]) == 2
    assert "in use by process" in capsys.readouterr().err
