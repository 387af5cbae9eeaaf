"""A comparison runs every arm on its way to the same end whatever stops it; what it cannot run it refuses before.

Most tests play Tune (:class:`test_arms.Toy`), so nothing is trained. At the end one comparison really runs, on one Ray
cluster, through ``studies/compare.py``.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import CPUS, RAY_MARKS, load_script
from test_queue import TEACHER, Toy

from dfkt.cli.main import main as dfkt_main
from dfkt.study.compare import PARTS, Arm, ComparisonConfig, Setting, run_comparison
from dfkt.analysis.statistics import read_comparison
from dfkt.config import (
    METHODS,
    DataConfig,
    FlowConfig,
    RunConfig,
    StudyConfig,
    TaskConfig,
    TrainConfig,
    flatten,
    to_dict,
)
from dfkt.data.load import load_data
from dfkt.errors import ConfigError
from dfkt.methods.builders import baseline, build_schedule
from dfkt.store.study_store import StudyStore, read_study
from dfkt.store.files import Storage
from dfkt.study.study import about_data
from dfkt.training.teacher import WEIGHTS_FILE
from dfkt.study.driver import Workers

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "studies" / "compare.py"
DATA = ["--data", "digits", "--limit-train", "300", "--limit-test", "60"]
NETWORKS = ["--pairs", "resnet8:resnet8", "--teacher-width", "0.5", "--student-width", "0.25", "--teacher-epochs", "1"]
TINY = [*DATA, *NETWORKS, "--epochs", "1", "--batch-size", "64", "--trials", "1", "--seeds", "2"]
PAIR = "digits-resnet8-resnet8"
SAME_SIZE = "digits-resnet8-same-size"
TABLES = ("trials", "epochs", "finals", "final_epochs")


script = load_script(SCRIPT)


def arguments(*argv: str) -> Namespace:
    """Return what the command line's switches become."""
    seen: list[Namespace] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "compare", lambda a: seen.append(a) or 0)
        assert script.main(argv) == 0
    return seen[0]


def settings_of(*argv: str) -> dict[str, Setting]:
    return {setting.name: setting for setting in script.settings(arguments(*argv))}


def names_of(setting: Setting) -> list[str]:
    return [arm.name for arm in setting.arms]


def arm(name: str, **more: Any) -> Arm:
    return Arm(**{"name": name, "run": RunConfig(), "trials": 1, **more})


BAD_CONFIGS = [
    (lambda: arm(""), "arm name .* name=''"),
    (lambda: arm("a/b"), "arm name .* name='a/b'"),
    (lambda: arm("x", part="nonsense"), "part is one of adjacent.* part='nonsense'"),
    (lambda: Setting(name="s", arms=(arm("kd"), arm("kd"))), r"different names.* arms=\['kd', 'kd'\]"),
    (
        lambda: Setting(name="s", arms=(arm("p", part="dense"), arm("dfkt"))),
        r"dfkt stands before.*\['p', 'dfkt'\].*add it",
    ),
    (lambda: Setting(name="s", arms=(arm("p", part="dense"),)), r"dfkt stands before its parts.* arms=\['p'\]"),
    (lambda: Setting(name="s", arms=()), r"a setting has arms.* arms=\[\]"),
    (lambda: Setting(name="../s", arms=(arm("kd"),)), r"setting name .* name='\.\./s'"),
    (
        lambda: Setting(name="s", arms=(arm("a"), arm("b", run=RunConfig(data=DataConfig(limit_train=5))))),
        "the same images.* setting='s'",
    ),
    (lambda: ComparisonConfig(name="c", settings=()), r"has a setting.* settings=\[\]"),
    (
        lambda: ComparisonConfig(name="c", settings=(Setting(name="s", arms=(arm("a"),)),) * 2),
        "different names.*'s', 's'",
    ),
    (
        lambda: ComparisonConfig(name="c", settings=(Setting(name="s", arms=(arm("a"),)),), seeds=0),
        "seeds >= 1.*seeds=0",
    ),
    (lambda: ComparisonConfig(name="", settings=(Setting(name="s", arms=(arm("a"),)),)), "comparison name.*--name"),
]


@pytest.mark.parametrize(("build", "message"), BAD_CONFIGS)
def test_what_breaks_a_rule_is_refused_with_rule_and_value(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_every_data_set_meets_every_pair_and_every_method() -> None:
    found = settings_of("--data", "digits,mnist", "--pairs", "resnet14:resnet8,torchvision:resnet18:resnet8")
    assert list(found) == [
        f"{data}-{pair}"
        for data in ("digits", "mnist")
        for pair in ("resnet14-resnet8", "torchvision_resnet18-resnet8")
    ]
    for name, setting in found.items():
        assert names_of(setting) == list(METHODS)
        for one in setting.arms:
            assert one.run.method == one.name
            assert one.run.data.name == name.partition("-")[0]
            assert one.trials == script.TRIALS
            assert (one.part, one.weights) == (None, "span")
    run = found["mnist-torchvision_resnet18-resnet8"].arms[0].run
    assert (run.teacher.network.name, run.student.name) == ("torchvision:resnet18", "resnet8")


def test_methods_can_be_chosen_and_without_trials_they_stand_at_their_reference_settings() -> None:
    (setting,) = settings_of(*TINY, "--methods", "kd, dfkt", "--trials", "0").values()
    assert names_of(setting) == ["kd", "dfkt"]
    for one in setting.arms:
        assert one.trials == 0
        assert one.run == baseline(one.run, one.run.method)
    assert setting.arms[0].run.task.kd_weight == 0.9


def test_parts_are_an_arm_each_behind_dfkt_and_one_with_a_weight_per_pair() -> None:
    (setting,) = settings_of(*TINY, "--parts").values()
    parts = setting.arms[len(METHODS) :]
    assert [one.name for one in parts] == [*(f"dfkt-{part}" for part in PARTS), "dfkt-pair-weights"]
    assert [one.part for one in parts] == [*PARTS, None]
    assert [one.trials for one in parts] == [0] * len(PARTS) + [1]
    assert {one.weights for one in parts[:-1]} == {"span"}
    assert parts[-1].weights == "pair"
    assert {one.run.method for one in parts} == {"dfkt"}


def test_the_student_of_its_teachers_size_has_a_third_of_the_steps_in_flow_stages_and_a_third_behind() -> None:
    teacher = ["--teacher-epochs", "30", "--epochs", "7"]
    found = settings_of(*TINY, *teacher, "--pairs", "resnet14:resnet8,resnet14:resnet20", "--same-size")
    assert list(found) == ["digits-resnet14-resnet8", "digits-resnet14-same-size", "digits-resnet14-resnet20"]
    arms = {one.name: one.run for one in found["digits-resnet14-same-size"].arms}
    assert {one.trials for one in found["digits-resnet14-same-size"].arms} == {0}
    assert all(run.student == run.teacher.network for run in arms.values())
    lengths = {name: (run.method, pytest.approx(run.train.epochs)) for name, run in arms.items()}
    assert lengths == {"scratch": ("scratch", 30), "scratch-third": ("scratch", 10), "dfkt": ("dfkt", 20)}
    schedule = build_schedule(arms["dfkt"], 4, (0, 1, 2, 3))
    assert sum(stage.epochs for stage in schedule if stage.phase == "flow") == pytest.approx(10)
    assert sum(stage.epochs for stage in schedule if stage.phase == "task") == pytest.approx(10)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("adjacent", {"flow.pattern": "adjacent"}),
        ("sliding", {"flow.pattern": "sliding-2"}),
        ("dense", {"flow.pattern": "dense-3"}),
        ("joint", {"flow.order": "joint", "flow.rounds": 1, "flow.freeze_below": False}),
        ("sequential", {"flow.order": "cumulative", "flow.freeze_below": False}),
        ("one-round", {"flow.rounds": 1}),
        ("two-rounds", {"flow.rounds": 2}),
        ("equal-weights", {"flow.span_weights": [], "flow.pair_weights": []}),
        ("unit-norm", {"flow.norm": "unit"}),
        ("labels-only", {"task.kd_weight": 0.0}),
        ("no-flow", {"method": "kd", "train.epochs": 15.0}),
    ],
)
def test_a_part_changes_what_it_says_and_nothing_else(part: str, change: dict[str, Any]) -> None:
    weights: dict[str, Any] = {"span_weights": (2.0,), "pair_weights": ((0, 1, 3.0),)}
    flow = FlowConfig(pattern="dense-2", order="local", freeze_below=True, rounds=3, share=0.5, **weights)
    run = RunConfig(flow=flow, task=TaskConfig(kd_weight=0.5), train=TrainConfig(epochs=30))
    old, new = flatten(run), flatten(PARTS[part](run))
    assert {name: value for name, value in new.items() if value != old[name]} == change


def test_every_part_is_tested() -> None:
    (marks,) = test_a_part_changes_what_it_says_and_nothing_else.pytestmark  # type: ignore[attr-defined]
    assert [part for part, _ in marks.args[1]] == list(PARTS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which no cluster may be started."""

    def refuse(address: str | None) -> None:
        raise AssertionError("a cluster would be started")

    monkeypatch.setattr("dfkt.study.compare.cluster", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    return tmp_path


BAD_INPUT = [
    ("--methods nonsense", "`--methods` must be among scratch, kd"),
    ("--methods ''", "a setting has arms"),
    ("--methods kd,kd", "arms of a setting have different names"),
    ("--methods kd,fsp --parts", "add it to the methods"),
    ("--pairs resnet26", "TEACHER:STUDENT, separated by commas, but got 'resnet26'"),
    ("--pairs :resnet8", "TEACHER:STUDENT, separated by commas, but got ':resnet8'"),
    ("--pairs resnet8:", "TEACHER:STUDENT, separated by commas, but got 'resnet8:'"),
    ("--pairs torchvision:resnet18", "but got 'torchvision:resnet18'"),
    ("--pairs ''", "a comparison has a setting"),
    ("--pairs resnet8:nonsense", "for nonsense, but got width=0.25"),
    ("--pairs nonsense:resnet8", "for nonsense, but got width=0.5"),
    ("--pairs resnet8:resnet8,resnet8:resnet8", "settings have different names"),
    ("--teacher resnet8", "`--pairs TEACHER:STUDENT` names the networks"),
    ("--data nowhere", "must be one of cifar10"),
    ("--data ''", "a comparison has a setting"),
    ("--trials -1", "`trials >= 0` must hold, but got trials=-1"),
    ("--seeds 0", "`seeds >= 1` must hold, but got seeds=0"),
    ("--search-seed -1", "`search_seed >= 0`"),
    ("--name ''", "comparison name is that of a folder"),
    ("--name ../up", "comparison name is that of a folder"),
    ("--results file/below", "must be writable"),
    ("--results ''", "empty"),
    ("--export file/below", "must be writable"),
    ("--workers-per-run 0", "workers > 0"),
    ("--epochs 0", "epochs > 0"),
    ("--teacher-checkpoint absent.pt", "does not exist"),
]


@pytest.mark.parametrize(("wrong", "reason"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_begins(
    wrong: str, reason: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["" if word == "''" else word for word in wrong.split(" ")]
    assert script.main([*TINY, "--teacher-root", "teachers", *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert reason in err
    assert not (place / "teachers").exists()
    for name in ("comparison.json", "study.json", "teacher.pt"):
        assert not list(place.rglob(name))


def test_another_configuration_under_the_same_name_is_refused_with_the_difference_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings_of(*TINY)[PAIR].arms[0].run
    study = StudyConfig(name="scratch", base=run, trials=1, seeds=2, baselines=(), early_stopping=False)
    meta = {"config": to_dict(study), "data": about_data(load_data(run.data))}
    store = StudyStore.create(Storage(place / "results" / "compare" / PAIR / "scratch"), {"task_lr": float}, meta)
    store.save_trial({"number": 0, "state": "COMPLETE"})

    assert script.main([*TINY, "--epochs", "3"]) == 2
    assert "base.train.epochs was 1.0, is 3.0" in capsys.readouterr().err


def test_a_comparison_in_use_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Storage(place / "results" / "compare").lock():
        assert script.main(TINY) == 2
    assert "in use by process" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 2, "settings": {}}'])
def test_a_damaged_index_is_refused(content: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Storage(place / "results" / "compare").write("comparison.json", content.encode())
    assert script.main(TINY) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: comparison.json ")
    assert err.count("\n") == 1


class Stage:
    """Runs comparisons with Tune, the cluster and the teacher played; ``accuracy`` says how a run ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accuracy: Callable[[dict[str, Any]], float] = lambda params: 0.5
        self.toy: Toy | None = None
        self.lines: list[str] = []

    def run(self, *argv: str, limit: int | None = None) -> tuple[bool, int]:
        """Run what the switches name, to its end or until ``limit`` runs have ended."""
        a = arguments(*TINY, "--teacher-root", str(self.folder / "teachers"), *argv)
        config = ComparisonConfig(name="c", settings=tuple(script.settings(a)), seeds=a.seeds)

        def tune_trials(run: Any, workers: Any, storage: Any, *, search: Any, count: int, **more: Any) -> None:
            self.toy = Toy(search)
            self.toy.run(2, limit, self.accuracy)
            assert len(self.toy.handed) <= count

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dfkt.study.compare.tune_trials", tune_trials)
            return run_comparison(config, str(self.folder), workers=Workers(), log=self.lines.append)

    @property
    def handed(self) -> int:
        """How many runs began."""
        assert self.toy is not None
        return len(self.toy.handed)

    def index(self) -> dict[str, Any]:
        """Return what ``comparison.json`` says."""
        found: dict[str, Any] = json.loads((self.folder / "c" / "comparison.json").read_text())
        return found

    def study(self, name: str) -> Any:
        """Return an arm's study."""
        return read_study(self.folder / "c" / PAIR / name)

    def runs(self, name: str) -> pd.DataFrame:
        """Return an arm's final runs, as tables show them."""
        runs = read_comparison(self.folder / "c").runs
        return runs[runs.arm == name]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    def keep_teacher(config: StudyConfig, store: StudyStore, log: Any) -> None:
        store.storage.write(WEIGHTS_FILE, b"weights")
        store.update_meta(teacher=TEACHER)

    monkeypatch.setattr("dfkt.study.compare.cluster", lambda address: contextlib.nullcontext())
    monkeypatch.setattr("dfkt.study.compare.fit_workers", lambda workers: workers)
    monkeypatch.setattr("dfkt.study.compare.keep_teacher", keep_teacher)
    return Stage(tmp_path)


def test_parts_begin_with_the_winner_of_the_search_and_those_that_change_nothing_are_left_out(stage: Stage) -> None:
    assert stage.run("--methods", "dfkt,kd", "--parts") == (True, 0)
    skipped = ["dfkt-dense", "dfkt-sequential", "dfkt-one-round", "dfkt-equal-weights", "dfkt-labels-only"]
    assert stage.index()["settings"][PAIR]["skipped"] == skipped
    assert all(f"{PAIR} {name}: dfkt is that already" in stage.lines for name in skipped)
    for name in stage.index()["settings"][PAIR]["arms"]:
        assert list(stage.runs(name).seed) == ([] if name in skipped else [1, 2])
    assert stage.study("dfkt-adjacent").meta["teacher"] == TEACHER
    assert (stage.folder / "c" / PAIR / "dfkt-adjacent" / WEIGHTS_FILE).read_bytes() == b"weights"


def test_with_another_winner_the_parts_are_its_own(stage: Stage) -> None:
    switches = ["--methods", "dfkt", "--parts"]
    stage.run(*switches)
    old = {name: set(stage.runs(name).key) for name in ("dfkt", "dfkt-adjacent", "dfkt-two-rounds")}
    assert all(old.values())
    stage.accuracy = lambda params: 0.9 if params.get("rounds") == 2 else 0.5
    assert stage.run(*switches, "--trials", "16") == (True, 0)

    winner = stage.study("dfkt").meta["best"]["config"]
    assert winner["flow"]["rounds"] == 2  # among so many trials there is one
    assert stage.study("dfkt-one-round").meta["config"]["base"]["flow"] == winner["flow"] | {"rounds": 1}
    skipped = stage.index()["settings"][PAIR]["skipped"]
    assert "dfkt-two-rounds" in skipped
    assert "dfkt-one-round" not in skipped
    assert not len(stage.runs("dfkt-two-rounds"))  # what ran before belongs to the earlier winner
    for name in ("dfkt", "dfkt-one-round"):
        assert list(stage.runs(name).seed) == [1, 2]
        assert not set(stage.runs(name).key) & old.get(name, set())


def test_parts_of_a_search_without_a_complete_trial_are_left_out(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "end", lambda toy, trial, accuracy: toy.die(trial))
    assert stage.run("--methods", "dfkt", "--parts") == (True, 2)  # dfkt, and dfkt with a weight per pair
    assert f"{PAIR} dfkt-joint: dfkt has no complete trial" in stage.lines


def test_arms_of_earlier_runs_stay_in_the_index(stage: Stage) -> None:
    stage.run("--methods", "scratch")
    stage.run("--methods", "kd")
    assert stage.index()["settings"][PAIR]["arms"] == ["scratch", "kd"]
    assert len(stage.index()["commands"]) == 2
    assert list(stage.runs("scratch").seed) == list(stage.runs("kd").seed) == [1, 2]


@pytest.mark.parametrize(
    "switches",
    [
        ["--methods", "scratch,dfkt"],
        ["--methods", "scratch,dfkt", "--parts"],
        ["--methods", "scratch", "--same-size"],
        ["--methods", "scratch,fsp", "--trials", "0"],
    ],
    ids=" ".join,
)
def test_run_again_it_begins_nothing_and_killed_in_between_it_does_what_is_missing(
    switches: list[str], stage: Stage
) -> None:
    assert stage.run(*switches) == (True, 0)
    whole = stage.handed
    assert stage.run(*switches) == (True, 0)
    assert stage.handed == 0
    shutil.rmtree(stage.folder / "c")

    assert stage.run(*switches, limit=whole - 3) == (False, 0)
    assert stage.run(*switches) == (True, 0)
    assert stage.handed == 3


@pytest.fixture(scope="module")
def switches(home: Path, address: str) -> list[str]:
    """What every comparison here that really runs is given."""
    return [*TINY, "--results", str(home), "--teacher-root", str(home / "teachers"), "--address", address]


FIRST = ["--name", "first", "--parts", "--same-size"]


def run_script(*argv: str) -> tuple[int, str]:
    """Run the script in this process; return its exit code and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = script.main(argv)
    return code, out.getvalue()


def studies_of(folder: Path) -> dict[str, Any]:
    """Return every arm's study, by setting and arm."""
    found = sorted(path.parent for path in folder.glob("*/*/study.json"))
    return {f"{path.parent.name} {path.name}": read_study(path) for path in found}


def same(one: Any, other: Any) -> bool:
    for table in TABLES:
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table))
    return True


@pytest.fixture(scope="module")
def first(home: Path, switches: list[str]) -> tuple[int, str]:
    """The comparison that most tests here look at, run once: exit code and output."""
    return run_script(*switches, *FIRST, "--export", str(home / "export"))


@pytest.fixture(scope="module")
def before(first: tuple[int, str], home: Path) -> dict[str, Any]:
    return studies_of(home / "first")


@pytest.fixture(scope="module")
def again(before: dict[str, Any], home: Path, switches: list[str]) -> dict[str, Any]:
    """The same command once more, on a copy."""
    shutil.copytree(home / "first", home / "again" / "first")
    code, _ = run_script(*switches, *FIRST, "--results", str(home / "again"))
    assert code == 0
    return studies_of(home / "again" / "first")


def ray_test(test: Any) -> Any:
    for mark in RAY_MARKS:
        test = mark(test)
    return test


@ray_test
def test_every_arm_has_its_trials_and_its_final_runs_with_test_accuracies(
    first: tuple[int, str], before: dict[str, Any]
) -> None:
    assert first[0] == 0
    parts = {f"dfkt-{part}" for part in PARTS} - {f"dfkt-{name}" for name in skipped_parts(first[1])}
    searched = {f"{PAIR} {name}" for name in (*METHODS, "dfkt-pair-weights")}
    others = {f"{PAIR} {name}" for name in parts} | {f"{SAME_SIZE} {n}" for n in ("scratch", "scratch-third", "dfkt")}
    assert set(before) == searched | others
    for name, study in before.items():
        assert list(study.trials.state) == (["COMPLETE"] if name in searched else [])
        assert list(study.finals.state) == ["COMPLETE"] * 2
        assert list(study.finals.seed) == [1, 2]
        assert study.finals.test_accuracy.between(0, 1).all()
        assert 0 <= study.meta["teacher"]["test_accuracy"] <= 1
    assert len({study.meta["teacher"]["key"] for study in before.values()}) == 1


def skipped_parts(out: str) -> list[str]:
    return [line.split()[1].removeprefix("dfkt-").rstrip(":") for line in out.splitlines() if "that already" in line]


@ray_test
def test_a_part_is_the_searched_run_with_one_change(first: tuple[int, str], before: dict[str, Any]) -> None:
    winner = before[f"{PAIR} dfkt"].meta["best"]["config"]
    part = before[f"{PAIR} dfkt-adjacent"].meta["config"]["base"]
    assert part == winner | {"flow": winner["flow"] | {"pattern": "adjacent"}}


@ray_test
def test_the_report_names_every_arm_and_show_and_the_export_say_the_same(
    first: tuple[int, str], before: dict[str, Any], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = read_comparison(home / "first"), read_comparison(home / "export")
    assert other.about == one.about
    for table in ("runs", "trials", "curves"):
        pd.testing.assert_frame_equal(getattr(other, table), getattr(one, table))
    for folder in ("first", "export"):
        assert dfkt_main(["show", str(home / folder)]) == 0
        shown = capsys.readouterr().out.strip()
        assert shown in first[1]
        words = {line.split()[0] for line in shown.splitlines() if line.strip()}
        assert {name.split()[1] for name in before} <= words
        assert f"not run, since the searched dfkt is that already: dfkt-{skipped_parts(first[1])[0]}" in shown


@ray_test
def test_nothing_is_left_behind_but_the_studies(first: tuple[int, str], home: Path) -> None:
    assert not (home / "first" / "ray").exists()
    for left in ("*/*/runs/*", "*/*/ray", "*/*/finals_runs/*/state.pt"):
        assert not list((home / "first").glob(left))


@ray_test
@pytest.mark.parametrize("searched", [True, False], ids=["searched", "not searched"])
def test_the_same_command_again_trains_nothing(searched: bool, before: dict[str, Any], again: dict[str, Any]) -> None:
    assert set(again) == set(before)
    chosen = [name for name, study in before.items() if bool(len(study.trials)) == searched]
    assert chosen
    assert all(same(again[name], before[name]) for name in chosen)


@ray_test
def test_more_seeds_are_added_to_those_there_are(before: dict[str, Any], home: Path, switches: list[str]) -> None:
    shutil.copytree(home / "first", home / "more" / "first")
    chosen = ["--name", "first", "--methods", "scratch,kd,dfkt", "--seeds", "3"]
    code, out = run_script(*switches, *chosen, "--results", str(home / "more"))
    assert code == 0
    after = studies_of(home / "more" / "first")
    for method in METHODS:
        old, new = (studies[f"{PAIR} {method}"] for studies in (before, after))
        pd.testing.assert_frame_equal(old.trials, new.trials)
        pd.testing.assert_frame_equal(old.finals, new.finals.head(2))
        assert list(new.finals.seed) == ([1, 2, 3] if f"{method}," in "scratch,kd,dfkt," else [1, 2])
        assert method in out  # also where nothing was asked of it


@ray_test
def test_what_the_cluster_cannot_do_is_refused_before_anything_is_written(
    switches: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, reason in (
        (["--workers-per-run", "3"], f"takes 3 CPU, but the cluster has {CPUS}"),
        (["--address", "nonsense"], "No Ray cluster answers at nonsense"),
    ):
        assert script.main([*switches, "--name", "refused", *wrong]) == 2
        assert reason in capsys.readouterr().err
        assert not list((home / "refused").rglob("*.json"))


@ray_test
def test_a_killed_comparison_goes_on_with_no_run_lost_or_doubled(home: Path, switches: list[str]) -> None:
    chosen = [*switches, "--name", "killed", "--methods", "scratch,kd,dfkt", "--trials", "3", "--epochs", "2"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *chosen],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not any("] trial" in line for line in process.stdout):
            raise AssertionError(process.stderr.read())
        process.send_signal(signal.SIGKILL)
    before = studies_of(home / "killed")
    ended = {name: study.trials[study.trials.state == "COMPLETE"].reset_index() for name, study in before.items()}
    assert 1 <= sum(len(trials) for trials in ended.values()) < 9

    code, _ = run_script(*chosen)
    assert code == 0
    after = studies_of(home / "killed")
    assert set(after) == {f"{PAIR} {method}" for method in ("scratch", "kd", "dfkt")}
    for name, study in after.items():
        assert list(study.trials.number) == [0, 1, 2]
        assert set(study.trials.state) | set(study.finals.state) == {"COMPLETE"}
        assert list(study.finals.seed) == [1, 2]
        kept = study.trials[study.trials.number.isin(ended[name].number)].reset_index()
        pd.testing.assert_frame_equal(kept, ended[name])
        running = before[name].trials[before[name].trials.state == "RUNNING"].number
        assert (study.trials[study.trials.number.isin(running)].attempts >= 2).all()
