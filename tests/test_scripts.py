"""Every study script says what it is and chooses a study; the comparison's switches make the studies that they say."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cli.switches import OWN_METHOD, OWN_NETWORKS, TINY, make_folder
from conftest import RAY_MARKS, load_script

from dfkt.imports import import_name
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.registry import METHODS
from dfkt.methods.scratch import Scratch
from dfkt.networks.taps import StudentTaps
from dfkt.store.files import Storage
from dfkt.store.study_store import read_study
from dfkt.study.config import ABLATIONS, StudyConfig
from dfkt.study.search import random_draws

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "studies").glob("*.py"))
SWEEPS = [path for path in SCRIPTS if path.stem != "compare"]
TAPS = StudentTaps(4, (0, 1, 2, 3))
SMALL = ["--data", "digits", "--pairs", "resnet8:resnet8", "--teacher-epochs", "1", "--epochs", "1", "--trials", "1"]


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return load_script(ROOT / "studies" / "compare.py")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_title_page_has_question_data_networks_budget_and_command(path: Path) -> None:
    page = load_script(path).__doc__ or ""
    assert page.splitlines()[0].endswith(("?", "."))
    for word in ("Question", "Data", "Networks", "Budget", "Command"):
        assert re.search(rf"^{word} +\S", page, re.MULTILINE), word
    assert f"python studies/{path.name}" in page


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_script_chooses_a_study_of_its_name(path: Path) -> None:
    script = load_script(path)
    assert isinstance(script.STUDY, StudyConfig)
    assert script.STUDY.name == path.stem
    (searched,) = script.STUDY.searched
    assert {str(n) for n in (searched.trials, script.STUDY.seeds)} <= set(re.findall(r"\d+", script.__doc__ or ""))
    assert f"{script.STUDY.train.epochs:g} epochs" in (script.__doc__ or "")
    assert f"({script.STUDY.teacher.train.epochs:g} epochs)" in (script.__doc__ or "")


def studies_of(compare: ModuleType, *argv: str) -> dict[str, StudyConfig]:
    """Return the studies that the comparison's switches make, by name, with nothing run."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_all", lambda configs, folder, a: seen.append(configs) or 0)
        assert compare.main(argv) == 0
    found = {config.name: config for config in seen[0]}
    assert len(found) == len(seen[0])
    return found


def arms_of(config: StudyConfig) -> dict[str, int]:
    return {arm.name: arm.trials for arm in config.arms}


def test_every_image_set_meets_every_pair_and_every_method(compare: ModuleType) -> None:
    found = studies_of(compare, "--data", "digits,mnist", "--pairs", "resnet14:resnet8,torchvision:resnet18:resnet8")
    pairs = ("resnet14-resnet8", "torchvision_resnet18-resnet8")
    assert list(found) == [f"{data}-{pair}" for data in ("digits", "mnist") for pair in pairs]
    for name, config in found.items():
        assert arms_of(config) == dict.fromkeys(METHODS, compare.TRIALS)
        assert all(arm.method == METHODS[arm.name]() for arm in config.arms)
        assert config.data.name == name.partition("-")[0]
        assert not config.early_stopping
        assert config.train == compare.BASE.train
    last = found["mnist-torchvision_resnet18-resnet8"]
    assert (last.teacher.network.name, last.student.name) == ("torchvision:resnet18", "resnet8")


def test_without_switches_it_is_what_the_title_page_says(compare: ModuleType) -> None:
    (config,) = studies_of(compare).values()
    assert config.name == "cifar10-resnet26-resnet8"
    said = f"{config.train.epochs:g} epochs, {config.arms[0].trials} trials of each method, {config.seeds} seeds"
    assert said in compare.__doc__


def test_own_networks_make_a_pair(compare: ModuleType) -> None:
    (config,) = studies_of(compare, "--data", "digits", "--pairs", "mynet:f:mynet:g").values()
    assert (config.teacher.network.name, config.student.name) == ("mynet:f", "mynet:g")
    assert config.name == "digits-mynet_f-mynet_g"


def test_folders_of_images_are_named_by_their_last_part(compare: ModuleType, tmp_path: Path) -> None:
    make_folder(tmp_path / "some where" / "my images", "ab")
    (config,) = studies_of(compare, "--data", "some where/my images").values()
    assert config.name == "my_images-resnet26-resnet8"
    assert config.data.name == str(tmp_path / "some where" / "my images")


def test_methods_can_be_chosen_own_ones_too(compare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "compare_own.py").write_text(OWN_METHOD)
    (config,) = studies_of(compare, *SMALL, "--methods", "kd, dfkt,compare_own:Plain", "--trials", "0").values()
    assert arms_of(config) == {"kd": 0, "dfkt": 0, "plain": 0}
    assert type(config.arms[-1].method) is import_name("compare_own:Plain")


def test_ablations_are_an_arm_each_behind_dfkt_and_one_with_a_weight_per_pair(compare: ModuleType) -> None:
    (config,) = studies_of(compare, *SMALL, "--methods", "kd,dfkt", "--ablations").values()
    names = [f"dfkt-{name}" for name in ABLATIONS]
    assert arms_of(config) == {"kd": 1, "dfkt": 1} | dict.fromkeys(names, 0) | {"dfkt-pair-weights": 1}
    for arm in config.arms:
        assert (arm.parent, arm.change) == (("dfkt", ABLATIONS[arm.name[5:]]) if arm.name in names else (None, {}))
    assert config.arms[-1].method == Dfkt(weights="pair")
    (config,) = studies_of(compare, *SMALL, "--methods", "dfkt", "--ablations", "--trials", "0").values()
    assert "dfkt-pair-weights" not in arms_of(config)


def test_a_narrowed_search_is_that_of_dfkt_with_either_kind_of_weights(compare: ModuleType) -> None:
    switches = ["--ablations", "--search", "rate=0.1..0.2", "weight_span_1=1..2", "rounds=2"]
    (config,) = studies_of(compare, *SMALL, "--methods", "kd,dfkt", *switches).values()
    arms = {arm.name: arm for arm in config.arms}
    assert not arms["kd"].space.changes
    for name in ("dfkt", "dfkt-pair-weights"):
        methods: list[Any] = random_draws(arms[name], TAPS, 20)
        arms[name].space.check(arms[name].method.columns(TAPS))
        assert all(0.1 <= method.rate <= 0.2 for method in methods)


def test_a_student_of_its_teachers_size_has_a_third_of_the_steps_in_flow_stages_and_a_third_behind(
    compare: ModuleType,
) -> None:
    pairs = ["--pairs", "resnet14:resnet8,resnet14:resnet20", "--teacher-epochs", "30", "--epochs", "7"]
    found = studies_of(compare, "--data", "digits", *pairs, "--same-size")
    assert list(found) == ["digits-resnet14-resnet8", "digits-resnet14-same-size", "digits-resnet14-resnet20"]
    same = found["digits-resnet14-same-size"]
    assert same.student == same.teacher.network
    runs = {arm.name: same.run(arm, arm.method) for arm in same.arms}
    assert {name: run.train.epochs for name, run in runs.items()} == pytest.approx(
        {"scratch": 30, "scratch-third": 10, "dfkt": 20}
    )
    assert {type(runs[name].method) for name in ("scratch", "scratch-third")} == {Scratch}
    spent: dict[str, float] = {"flow": 0, "task": 0}
    for stage in runs["dfkt"].method.schedule(20, TAPS):
        spent[stage.phase] += stage.epochs
    assert spent == pytest.approx({"flow": 10, "task": 10})


def test_smoke_is_small_has_a_name_of_its_own_and_leaves_what_is_given(compare: ModuleType) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Any] = []
        patch.setattr(compare, "run_all", lambda configs, folder, a: seen.extend([*configs, folder]) or 0)
        assert compare.main(["--smoke", "--epochs", "2"]) == 0
    config, folder = seen
    assert Path(folder).name == "compare-smoke"
    assert (config.data.name, config.train.epochs, config.seeds) == ("digits", 2, 2)
    assert (config.data.limit_train, config.data.limit_test) == (600, 600)


BAD = [
    ("--methods nonsense", "Unknown method 'nonsense'"),
    ("--methods ''", "a study has an arm"),
    ("--methods kd,kd", "methods have different names"),
    ("--methods kd,fsp --ablations", "Add dfkt to them"),
    ("--methods kd,fsp --search rate=1..2", "Add dfkt to them"),
    ("--search rate=1..2 --trials 0", "dfkt has none"),
    ("--search nonsense=1..2", "Unknown parameter nonsense"),
    ("--pairs resnet26", "TEACHER:STUDENT"),
    ("--pairs :resnet8", "TEACHER:STUDENT"),
    ("--pairs resnet8:", "TEACHER:STUDENT"),
    ("--pairs ''", "has images and a pair of networks"),
    ("--pairs resnet8:no.such:thing", "Cannot import 'no.such:thing'"),
    ("--pairs resnet8:resnet8,resnet8:resnet8", "studies have different names"),
    ("--teacher resnet8", "`--pairs TEACHER:STUDENT` names the networks"),
    ("--data nowhere", "must be one of cifar10"),
    ("--data ''", "has images and a pair of networks"),
    ("--trials -1", "`trials >= 0` must hold, but got trials=-1"),
    ("--seeds 0", "`seeds >= 1` must hold, but got seeds=0"),
    ("--name ''", "is that of a folder"),
    ("--name ../up", "is that of a folder"),
    ("--results file/below", "must be writable"),
    ("--results ''", "empty"),
    ("--export file/below", "must be writable"),
    ("--workers-per-run 0", "workers per run >= 1"),
    ("--epochs 0", "0 < epochs <= 1e6"),
    ("--teacher-checkpoint absent.pt", "does not exist"),
]


@pytest.mark.parametrize(("wrong", "reason"), BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_begins(
    wrong: str,
    reason: str,
    compare: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(address: str | None) -> None:
        raise AssertionError("a cluster would be started")

    monkeypatch.setattr("dfkt.study.study.cluster", refuse)
    (tmp_path / "file").write_text("")
    given = ["" if word == "''" else word for word in wrong.split(" ")]
    assert compare.main([*SMALL, "--teacher-root", "teachers", *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert reason in err
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".pt", ".parquet")]


def test_figures_are_exported_of_what_was_finished(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(compare, "read_figures", lambda folder: folder)
    monkeypatch.setattr(compare, "save_figures", lambda *given: saved.append(given))
    for code in (1, 130, 0):
        monkeypatch.setattr(compare, "run_all", lambda configs, folder, a, code=code: code)
        assert compare.main([*SMALL, "--export", "figures"]) == code
    assert saved == [(Storage(tmp_path / "results" / "compare").path, "figures")]


def test_a_script_finds_networks_and_methods_in_the_folder_where_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "own_of_script.py").write_text(OWN_NETWORKS)
    (tmp_path / "elsewhere" / "script.py").write_text(
        "from dfkt.imports import import_name\nprint(import_name('own_of_script:small').__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "elsewhere" / "script.py")],
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("small\n", 0), done.stderr


def ray_test(test: Any) -> Any:
    for mark in RAY_MARKS:
        test = mark(test)
    return test


@ray_test
def test_a_script_runs_to_its_end_with_a_network_and_a_method_of_the_users_own(
    home: Path, address: str, tmp_path: Path
) -> None:
    (tmp_path / "ray_own.py").write_text(OWN_METHOD + OWN_NETWORKS)
    switches = [*TINY, "--student-width", "1", "--student", "ray_own:small", "--epochs", "1", "--trials", "1"]
    own = ["--method", "ray_own:Plain", "--baselines", "", "--seeds", "1", "--results", str(home), "--name", "own"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "studies" / "digits_sweep.py"), *switches, *own, "--address", address],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "plain seed 1: test" in done.stdout
    study = read_study(home / "own")
    assert list(study.trials.state) == list(study.finals.state) == ["COMPLETE"]
