"""What cannot be done is refused in one line before anything starts; a study's folder is opened without losing anything."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from study.played import ABOUT, TAPS, Played, arm, tiny, toy

from dfkt.config import DataConfig, NetworkConfig, Placement, TeacherConfig, TrainConfig
from dfkt.errors import DfktError, InputError, StudyError
from dfkt.methods.base import Method, Schedule, Stage, TaskTerm, searched, task_stage
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.fsp import Fsp
from dfkt.methods.kd import Kd, SoftTerm
from dfkt.methods.scratch import Scratch
from dfkt.methods.space import Range, Space
from dfkt.networks.taps import StudentTaps
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore, hold
from dfkt.study.config import ArmConfig, StudyConfig, ablations
from dfkt.study.opening import check_store, check_study, open_store
from dfkt.study.study import run_studies


@dataclass(frozen=True, kw_only=True)
class Forgetful(Scratch):
    """A method that does not list one of its terms."""

    name = "forgetful"
    taught = True

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one stage."""
        return (task_stage(epochs, self.rate, SoftTerm(temperature=2.0)),)


@dataclass(frozen=True, kw_only=True)
class Endless(Scratch):
    """A method that never comes to its task stage."""

    def schedule(self, epochs: float, taps: StudentTaps) -> Schedule:
        """Return one stage."""
        return (Stage(phase="warm", epochs=epochs, terms=(TaskTerm(),), rate=0.1),)


@dataclass(frozen=True, kw_only=True)
class Whole(Scratch):
    """A method whose ``weight`` is a whole number, where KD's is a fraction."""

    name = "whole"
    weight: int = searched(2, 1, 3)


def searching(method: Method, trials: int = 2, **settings: Any) -> ArmConfig:
    return ArmConfig(name="a", method=method, trials=trials, **settings)


SHORT = TrainConfig(epochs=1, batch_size=64)  # of 270 images: four steps in all
BAD: list[tuple[Callable[[], StudyConfig], str]] = [
    (lambda: tiny("s", searching(Dfkt()), train=SHORT), r"Arm a \(\S+ \w+.* x\d.*Every stage needs a step"),
    (lambda: tiny("s", arm("dfkt"), train=replace(SHORT, epochs=0.5)), r"Arm dfkt \(.*4 stages share 2 steps"),
    (
        lambda: tiny("s", arm("dfkt"), *ablations(arm("dfkt"), ["two-rounds"]), train=SHORT),
        r"Arm dfkt-two-rounds \(.*7 stages share 4 steps",
    ),
    (lambda: tiny("s", searching(Forgetful(), 0)), "`losses` of forgetful must name every term, but lacks soft"),
    (lambda: tiny("s", searching(Endless(), 0)), "The last stage of scratch must be a task stage"),
    (lambda: tiny("s", searching(Kd(), space=Space({"wait": (1,)}))), "Unknown parameter wait in a space; known: rate"),
    (lambda: tiny("s", searching(Dfkt(), space=Space({"order": ("up",)}))), "order takes some of .* got 'up'"),
    (lambda: tiny("s", searching(Dfkt(), space=Space({"order": Range(1, 2)}))), "order takes some of .* got a range"),
    (
        lambda: tiny("s", arm("dfkt"), ArmConfig(name="odd", method=Dfkt(), parent="dfkt", change={"turns": 1})),
        "turns",
    ),
    (
        lambda: tiny("s", arm("dfkt"), ArmConfig(name="odd", method=Dfkt(), parent="dfkt", change={"pattern": "x"})),
        "Unknown overlap pattern",
    ),
    (
        lambda: tiny("s", ArmConfig(name="kd", method=Kd(), trials=1), searching(Whole())),
        "A parameter must have one type in all arms, but weight is float and int",
    ),
    (lambda: tiny("s", student=NetworkConfig(name="nonsense")), "Unknown network 'nonsense'"),
    (lambda: tiny("s", teacher=TeacherConfig(network=NetworkConfig(name="nonsense"))), "Unknown network 'nonsense'"),
    (lambda: tiny("s", teacher=TeacherConfig(checkpoint="absent.pt")), "absent.pt"),
    (lambda: tiny("s", data=DataConfig(name="nowhere")), "nowhere"),
    (
        lambda: tiny("s", teacher=TeacherConfig(network=NetworkConfig(name="resnet8", taps=("stem", "layer1.0")))),
        "cannot be matched",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_cannot_be_done_is_one_line_and_nothing_is_trained(
    make: Callable[[], StudyConfig], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfkt.study.study.cluster", lambda address: pytest.fail("a cluster would be started"))
    with pytest.raises(InputError, match=message) as raised:
        run_studies([make()], str(tmp_path), placement=Placement(teacher_root=str(tmp_path / "teachers")), log=print)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "teachers").exists()
    assert list(tmp_path.rglob("*")) == []


def test_a_method_that_fits_is_not_refused_though_it_is_short(tmp_path: Path) -> None:
    for space, epochs in ((Space({"rounds": (1,)}), 1), (Space({}), 3)):
        config = tiny("s", searching(Dfkt(), space=space), train=replace(SHORT, epochs=epochs))
        assert check_study(config, Storage(tmp_path), Placement(), print).taps.count == 4


@pytest.mark.parametrize(("kind", "fits"), [(Kd, True), (Scratch, True), (Dfkt, False)])
def test_taps_that_do_not_match_are_no_problem_where_no_arm_reads_any(
    kind: type[Method], fits: bool, tmp_path: Path
) -> None:
    teacher = TeacherConfig(network=NetworkConfig(name="resnet8", taps=("stem", "layer1.0")))
    config = tiny("s", searching(kind()), teacher=teacher, train=TrainConfig(epochs=9, batch_size=64))
    if fits:
        assert check_study(config, Storage(tmp_path), Placement(), print).taps.count == 0
    else:
        with pytest.raises(DfktError, match="cannot be matched"):
            check_study(config, Storage(tmp_path), Placement(), print)


@pytest.mark.parametrize(("depth", "arms", "said"), [
    ("resnet14", [arm("dfkt", method=Dfkt(pattern="adjacent"))], "(1,2) (3,4) (5,6) are left out"),
    ("resnet14", [searching(Dfkt(), space=Space({"pattern": ("sliding-1",)}))], "(1,2) (3,4) (5,6) are left out"),
    ("resnet14", [ArmConfig(name="fsp", method=Fsp()), arm("scratch")], None),
    ("resnet8", [searching(Dfkt())], None),
])  # fmt: skip
def test_flow_pairs_that_are_left_out_are_said_once(
    depth: str, arms: list[ArmConfig], said: str | None, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = tiny("s", *arms, student=NetworkConfig(name=depth, width=0.25), train=TrainConfig(epochs=9, batch_size=64))
    taps = check_study(config, Storage(tmp_path), Placement(), lines.append).taps
    assert taps.matched == ((0, 1, 1, 2, 2, 3, 3) if depth == "resnet14" else (0, 1, 2, 3))
    notes = [line for line in lines if line.startswith("note: ")]
    assert [said in line for line in notes] == [True] if said else notes == []


def test_a_study_without_taught_arms_looks_at_no_teacher(tmp_path: Path) -> None:
    config = tiny("s", arm("scratch"), teacher=TeacherConfig(network=NetworkConfig(name="nonsense")))
    about = check_study(config, Storage(tmp_path), Placement(), print).about
    assert (about["train"], about["val"], about["classes"]) == (270, 30, 10)
    assert list(tmp_path.iterdir()) == []


def test_studies_need_different_names(tmp_path: Path) -> None:
    for configs in ([], [toy("s"), toy("s")]):
        with pytest.raises(InputError, match="studies have different names"):
            run_studies(configs, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkt.study.study.cluster", lambda address: pytest.fail("a cluster would be started"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("no_cluster")
def test_a_folder_that_is_not_a_studys_is_refused_and_nothing_in_it_is_touched(tmp_path: Path) -> None:
    for name in ("thesis.tex", "trials/notes.txt", "runs/deep/result"):
        path = tmp_path / "tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(StudyError, match=r"holds runs, thesis\.tex, trials"):
        run_studies([tiny()], str(tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("no_cluster")
def test_a_study_in_use_is_refused_before_any_other_is_begun(tmp_path: Path) -> None:
    with hold(Storage(tmp_path / "two")), pytest.raises(StudyError, match="in use by process"):
        run_studies([tiny("one"), tiny("two")], str(tmp_path))
    assert list(tmp_path.rglob("*")) == []
    with hold(Storage(tmp_path / "one")):  # and what was held is free again
        pass


def test_opening_deletes_nothing_that_the_study_did_not_write_and_keeps_its_lock(tmp_path: Path) -> None:
    config, storage = toy("s"), Storage(tmp_path)
    with hold(storage):
        open_store(config, storage, ABOUT, TAPS)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "students").mkdir()
        lock = (tmp_path / ".lock").stat().st_ino
        store = open_store(replace(config, search_seed=5), storage, ABOUT, TAPS)  # nothing was trained: it begins anew
        assert store.meta["config"]["search_seed"] == 5
        assert len(store.meta["sessions"]) == 1
        assert (tmp_path / ".lock").stat().st_ino == lock
        with pytest.raises(StudyError, match="in use"), hold(storage):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt", "study.json"]


def test_a_study_in_which_something_runs_is_not_begun_anew(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch", 1)))
    run.ask()  # then the main process is killed
    later = Played(tmp_path, toy("s", arm("scratch", 1)))
    assert len(later.store().meta["sessions"]) == 2
    assert list(later.study().trials.state) == ["RUNNING"]


CHANGES: list[tuple[Callable[[StudyConfig], StudyConfig], dict[str, Any], str]] = [
    (lambda c: replace(c, train=replace(c.train, epochs=5)), {}, r"train\.epochs was 3, is 5"),
    (lambda c: replace(c, data=DataConfig(padding=2)), {}, r"data\.padding was None, is 2"),
    (lambda c: replace(c, search_seed=3), {}, "search_seed was 0, is 3"),
    (
        lambda c: replace(c, arms=(arm("scratch", method=Scratch(rate=0.2)),)),
        {},
        "scratch: method.rate was 0.1, is 0.2",
    ),
    (lambda c: replace(c, arms=(arm("dfkt", 2, epochs=9),)), {}, "dfkt: epochs was None, is 9"),
    (lambda c: replace(c, arms=(arm("dfkt", 2, space=Space({"rounds": (1,)})),)), {}, r"dfkt: space\.rounds was None"),
    (lambda c: replace(c, student=NetworkConfig(name="resnet14")), {}, "student.name was 'resnet8', is 'resnet14'"),
    (lambda c: c, {"checksum": 8}, r"images\.checksum was 7, is 8"),
    (lambda c: c, {"train": 90, "val": 30}, r"images\.train was 96, is 90; images\.val was 24, is 30"),
]


@pytest.mark.parametrize(("change", "about", "message"), CHANGES)
def test_another_configuration_is_refused_with_the_differences_named(
    change: Callable[[StudyConfig], StudyConfig], about: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = Played(tmp_path, toy()).run()
    before = contents(tmp_path)
    with pytest.raises(StudyError, match=rf"another configuration \(.*{message}.*Take another --name"):
        check_store(change(toy()), run.store().storage, ABOUT | about)
    assert contents(tmp_path) == before


def test_a_whole_number_written_as_a_fraction_is_no_difference(tmp_path: Path) -> None:
    run = Played(tmp_path, toy()).run()
    check_store(toy(train=TrainConfig(epochs=3.0, batch_size=32)), run.store().storage, ABOUT)


def test_a_study_says_what_it_is_and_how_it_was_run(tmp_path: Path) -> None:
    run = Played(tmp_path, toy())
    meta = run.store().meta
    assert meta["data"] == ABOUT
    assert meta["config"]["arms"][1]["method"]["name"] == "dfkt"
    assert set(meta["sessions"][0]) == {"started", "arms", "versions", "commit", "dirty", "hardware", "command"}
    assert meta["sessions"][0]["arms"] == ["scratch", "dfkt"]
    assert StudyStore.open(run.store().storage).meta == meta


def test_a_damaged_study_is_refused(tmp_path: Path) -> None:
    Played(tmp_path, toy()).run()
    (tmp_path / "toy" / "study.json").write_text("{")
    with pytest.raises(StudyError, match="damaged"):
        Played(tmp_path, toy())


def test_where_no_cluster_answers_nothing_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})
    with pytest.raises(InputError, match="No Ray cluster answers at nonsense"):
        run_studies([tiny()], str(tmp_path), address="nonsense")
    assert list(tmp_path.rglob("*")) == []
