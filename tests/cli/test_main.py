"""The command line: bad input is one line and exit code 2, before anything is trained; the rest does what it says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dfkt.cli import distill as distill_module
from dfkt.cli.main import main, run_script, study_config
from dfkt.config import NetworkConfig, RunConfig, StudyConfig, TeacherConfig
from dfkt.networks.build import build_network
from dfkt.store.files import Storage

DATA = ["--data", "digits", "--limit-train", "300", "--limit-test", "60", "--batch-size", "64"]
NETWORKS = ["--teacher", "resnet8", "--teacher-width", "0.5", "--student-width", "0.25", "--teacher-epochs", "1"]
TINY = [*DATA, *NETWORKS]


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_folder(root: Path, classes: str) -> None:
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(np.full((8, 8), 20 * k, dtype=np.uint8)).save(root / name / f"{k}.png")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Folders and files of every kind of wrong."""
    make_folder(tmp_path / "one", "a")
    make_folder(tmp_path / "hollow", "ab")
    (tmp_path / "hollow" / "c").mkdir()
    make_folder(tmp_path / "broken", "ab")
    (tmp_path / "broken" / "b" / "bad.png").write_text("no image")
    (tmp_path / "file").write_text("")
    (tmp_path / "garbage.pt").write_text("garbage")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pt")
    return tmp_path


BOTH = [
    ("--data nowhere", "must be one of cifar10"),
    ("--data ''", "not empty"),
    ("--data file", "or an existing folder, but got 'file'"),
    ("--data one", "two or more classes, but has only 'a'"),
    ("--data hollow", "but c has none"),
    ("--data broken", "bad.png"),
    ("--student nonsense", "Unknown network 'nonsense'"),
    ("--student resnet9", "The nearest is resnet8"),
    ("--student no.such:thing", "Cannot import network"),
    ("--student-width -1", "width > 0"),
    ("--student-width nan", "width > 0"),
    ("--student-width 1e9", "Cannot build resnet8"),
    ("--student-taps stem,nothing", "Unknown tap 'nothing'"),
    ("--student-taps stem", "A flow pair needs two taps"),
    ("--student-taps stem,stem", "differ from each other"),
    ("--teacher-taps stem,layer1.0", "grids cannot be matched"),
    ("--teacher-checkpoint absent.pt", "does not exist"),
    ("--teacher-checkpoint ''", "must not be empty"),
    ("--teacher-checkpoint .", "cannot be read"),
    ("--teacher-checkpoint garbage.pt", "cannot be read"),
    ("--teacher-checkpoint other.pt", "does not fit resnet8"),
    ("--epochs 0", "epochs > 0"),
    ("--epochs inf", "epochs > 0"),
    ("--batch-size 0", "batch_size >= 1"),
    ("--image-size 0", "image_size >= 1"),
    ("--limit-train 5", "raise limit_train"),
    ("--clip-norm nan", "clip_norm > 0"),
]
STUDY = [
    ("--results file/below", "must be writable"),
    ("--results nowhere://x", "URI that pyarrow knows"),
    ("--trials -1", "trials >= 0"),
    ("--seeds 0", "seeds >= 1"),
    ("--search-seed -1", "search_seed >= 0"),
    ("--name ../up", "study name holds"),
    ("--name ''", "study name holds"),
    ("--baselines nonsense", "must be one of scratch, kd, fitnets"),
    ("--workers-per-trial 0", "workers > 0"),
    ("--gpus-per-worker nan", "gpus_per_worker > 0"),
]
DISTILL = [
    ("--out file/below", "must be writable"),
    ("--out ''", "empty"),
    ("--pattern nonsense", "Unknown overlap pattern"),
    ("--pattern dense-9", "1 <= span <= 3"),
    ("--pattern dense-²", "Unknown overlap pattern"),
    ("--pattern sliding", "needs a span"),
    ("--rounds 0", "rounds >= 1"),
    ("--flow-share 1", "0 < share < 1"),
    ("--flow-lr inf", "lr > 0"),
    ("--kd-weight nan", "0 <= kd_weight <= 1"),
    ("--temperature 0", "temperature > 0"),
    ("--seed -1", "0 <= seed"),
    ("--seed 99999999999999999999", "0 <= seed"),
    ("--teacher-root file/below", "must be writable"),
]
TEACHER = [
    ("--teacher nonsense", "Unknown network"),
    ("--teacher-checkpoint absent.pt", "does not exist"),
    ("--teacher-root file/below", "must be writable"),
    ("--epochs 0", "epochs > 0"),
]
CASES = [
    *(("study", *case) for case in BOTH + STUDY),
    *(("distill", *case) for case in BOTH + DISTILL),
    *(("teacher", *case) for case in TEACHER),
    ("show", ".", "must have a study.json"),
    ("show", "''", "empty"),
    ("show", "file", "must have a study.json"),
]


@pytest.mark.parametrize(("name", "wrong", "reason"), CASES)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_trained(
    name: str, wrong: str, reason: str, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = wrong.split(" ")
    given = [first, *("" if word == "''" else word for word in rest)] if first != "''" else [""]
    usual = [] if name == "show" else ["--teacher", "resnet8", "--teacher-root", str(prepared / "teachers")]
    assert main([name, *usual, *given]) == 2

    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert reason in err
    assert not list((prepared / "teachers").glob("*"))
    assert not list(prepared.rglob("teacher.pt"))
    assert not list(prepared.rglob("study.json"))


@pytest.mark.parametrize("wrong", ["study --trials many", "distill --order sideways", "nonsense", "", "show"])
def test_argparse_refuses_with_exit_code_2(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(wrong.split())
    assert raised.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_study_folder_in_use_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Storage(tmp_path / "results" / "busy").lock():
        assert main(["study", "--name", "busy"]) == 2
    assert "in use by process" in capsys.readouterr().err


def arguments_of(monkeypatch: pytest.MonkeyPatch, argv: list[str], config: StudyConfig) -> StudyConfig:
    seen: list[StudyConfig] = []

    def remember(arguments: Any, given: StudyConfig) -> int:
        seen.append(study_config(given, arguments))
        return 0

    monkeypatch.setattr("dfkt.cli.main._study", remember)
    assert run_script(config, "", argv) == 0
    return seen[0]


def test_smoke_shrinks_a_study_under_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = StudyConfig(name="big", trials=60, seeds=5)
    small = arguments_of(monkeypatch, ["--smoke"], whole)
    assert (small.name, small.trials, small.seeds) == ("big-smoke", 2, 2)
    assert small.base.train.epochs == small.base.teacher.train.epochs == 3
    assert small.base.data.limit_train == 1000
    assert arguments_of(monkeypatch, ["--smoke", "--trials", "5"], whole).trials == 5


def test_another_method_can_be_searched_and_leaves_the_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    config = arguments_of(monkeypatch, ["--method", "kd"], StudyConfig(name="big"))
    assert (config.base.method, config.baselines) == ("kd", ("scratch", "fsp"))


def test_no_trials_mean_reference_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    config = arguments_of(monkeypatch, ["--method", "kd", "--trials", "0"], StudyConfig(name="big"))
    assert config.base.task.kd_weight == 0.9


def test_other_images_make_another_study_unless_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_folder(tmp_path / "my images", "ab")
    config = StudyConfig(name="big")
    assert arguments_of(monkeypatch, ["--data", "mnist"], config).name == "big-mnist"
    named = arguments_of(monkeypatch, ["--data", "my images", "--name", "mine"], config)
    assert (named.name, named.base.data.name) == ("mine", str(tmp_path / "my images"))


@pytest.mark.slow
def test_distill_runs_to_the_end_and_again_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["distill", *TINY, "--epochs", "2", "--out", "run", "--teacher-root", "teachers"]
    assert main(argv) == 0
    first = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    student = build_network(NetworkConfig(name="resnet8", width=0.25), num_classes=10, in_channels=1)
    student.load_state_dict(torch.load(tmp_path / "run" / "student.pt", weights_only=True))
    assert result["complete"]
    assert 0 <= result["test_accuracy"] <= 1

    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == first[-2:]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result

    assert main([*argv, "--lr", "0.01"]) == 2
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_distill_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def argv(out: str) -> list[str]:
        return ["distill", *TINY, "--epochs", "3", "--out", out, "--teacher-root", "teachers"]

    assert main(argv("whole")) == 0
    run_job = distill_module.run_job

    def interrupted(job: Any, report: Any, **more: Any) -> None:
        def stop_later(payload: dict[str, Any]) -> None:
            report(payload)
            if len(payload["records"]) and payload["records"][-1]["index"] == 2:
                raise KeyboardInterrupt

        run_job(job, stop_later, **more)

    monkeypatch.setattr(distill_module, "run_job", interrupted)
    assert main(argv("parts")) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(distill_module, "run_job", run_job)
    assert main(argv("parts")) == 0

    whole, parts = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("whole", "parts"))
    assert parts["attempts"] == 2
    for name in ("val_accuracy", "test_accuracy", "test_loss"):
        assert parts[name] == whole[name]
    assert [r["index"] for r in parts["records"]] == list(range(len(parts["records"])))


@pytest.mark.slow
@pytest.mark.parametrize("odd", ["--batch-size 100000", "--epochs 1 --rounds 3 --order local", "--epochs 0.01"])
def test_odd_but_possible_settings_run(odd: str, tmp_path: Path) -> None:
    argv = ["distill", *TINY, "--epochs", "1", "--out", "run", "--teacher-root", "teachers", *odd.split()]
    assert main(argv) == 0


@pytest.mark.slow
def test_a_run_that_explodes_has_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["distill", *TINY, "--epochs", "2", "--out", "run", "--teacher-root", "teachers", "--lr", "1e30"]
    assert main(argv) == 1
    assert "failed: The loss became nan or inf in task stage" in capsys.readouterr().out


@pytest.mark.slow
def test_a_teacher_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["teacher", *DATA, "--teacher", "resnet8", "--teacher-root", "teachers", "--epochs", "1"]
    assert main(argv) == 0
    assert "trained in" in capsys.readouterr().out
    assert main(argv) == 0
    assert "found in" in capsys.readouterr().out
    assert len(list((tmp_path / "teachers").iterdir())) == 1


def test_show_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dfkt.config import to_dict
    from dfkt.store.study_store import StudyStore
    from dfkt.methods.space import SearchSpace

    base = RunConfig(teacher=TeacherConfig(network=NetworkConfig(name="resnet14")))
    meta = {"config": to_dict(StudyConfig(name="shown", base=base))}
    store = StudyStore.create(Storage(tmp_path / "shown"), SearchSpace(4).types(), meta)
    assert main(["show", "shown"]) == 0
    assert "no trials yet" in capsys.readouterr().out

    params = SearchSpace(4).start() | {"pattern": "dense-3"}
    row = {"number": 0, "state": "COMPLETE", "last_val_accuracy": 0.75, "best_val_accuracy": 0.8, "epochs": 3.0}
    store.save_trial(row | {"wall_seconds": 2.0} | {f"param_{name}": value for name, value in params.items()})
    assert main(["show", "shown"]) == 0
    out = capsys.readouterr().out
    assert "1 trials: 1 complete" in out
    assert "75.00" in out
    assert "dense-3" in out


def test_show_prints_a_comparison_and_names_the_arms_that_have_no_runs_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = {"format": 1, "settings": {"blobs": {"arms": ["scratch", "kd"]}}}
    Storage(tmp_path / "compared").write("comparison.json", json.dumps(index).encode())
    assert main(["show", "compared"]) == 0
    out = capsys.readouterr().out
    assert "blobs" in out
    assert "no complete final run: scratch, kd" in out

    Storage(tmp_path / "compared").write("comparison.json", b"{")
    assert main(["show", "compared"]) == 2
    assert "comparison.json" in capsys.readouterr().err
