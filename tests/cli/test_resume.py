"""A study goes on by what its folder says, where it was going; what is done is told without a cluster."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli.switches import OWN_METHOD, make_folder
from study.played import ABOUT, TAPS, Played, arm, tiny

from dfkt.cli.main import main
from dfkt.config import DataConfig, Placement, to_dict
from dfkt.data.load import load_data
from dfkt.errors import ConfigError
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.registry import find_method
from dfkt.methods.space import Range, Space
from dfkt.store.files import Storage
from dfkt.study.capacity import Demand
from dfkt.study.config import ArmConfig, StudyConfig, ablations
from dfkt.study.driver import Workers
from dfkt.study.opening import about_data, open_store

SEARCHED = ArmConfig(
    name="dfkt",
    method=Dfkt(norm="unit", span_weights=(1.0, 2.0)),
    trials=5,
    space=Space({"rate": Range(0.05, 0.2, log=True), "rounds": (1, 2)}),
    epochs=2.5,
)
WHOLE = tiny("whole", arm("scratch"), SEARCHED, *ablations(SEARCHED, ["one-round"]), early_stopping=True, seeds=4)
PLACED = Placement(data_root="/images", teacher_root="/teachers", checkpoint_every=3)


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test starts a cluster."""

    def refuse(*given: Any) -> None:
        raise ConfigError("a cluster would be started")

    monkeypatch.setattr("dfkt.study.study.cluster", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked to be run, with nothing run."""
    seen: list[Any] = []

    def run_studies(configs: Any, results: str, **given: Any) -> Any:
        seen.append((list(configs), results, given))
        return SimpleNamespace(interrupted=True, failures=0)

    monkeypatch.setattr("dfkt.study.study.run_studies", run_studies)
    return seen


def begin(folder: Path, config: StudyConfig, workers: Workers | None = None, placement: Placement = PLACED) -> Path:
    """Leave a study as a session leaves it that was stopped at once."""
    given = {} if workers is None else {"placement": to_dict(placement), "workers": to_dict(workers)}
    store = open_store(config, Storage(folder / config.name), ABOUT, TAPS, **given)
    store.update_meta(arms={config.arms[0].name: {}})
    return folder / config.name


def test_a_study_goes_on_as_its_last_session_had_it(tmp_path: Path, asked: list[Any]) -> None:
    folder = begin(tmp_path / "results", WHOLE, Workers(count=2, cpus=3, gpus=0.0))
    assert main(["resume", str(folder)]) == 130

    ((config,), results, given) = asked[0]
    assert to_dict(config) == to_dict(WHOLE)
    assert config.arms[1].space == SEARCHED.space
    assert results == str(tmp_path / "results")
    assert given["workers"] == Workers(count=2, cpus=3, gpus=0.0)
    assert (given["placement"], given["address"]) == (PLACED, None)


def test_switches_say_otherwise(tmp_path: Path, asked: list[Any]) -> None:
    folder = begin(tmp_path, WHOLE, Workers(count=2, cpus=3))
    switches = ["--data-root", "here", "--teacher-root", "there", "--address", "auto", "--cpus-per-worker", "1"]
    assert main(["resume", str(folder), *switches, "--workers-per-run", "4", "--checkpoint-every", "9"]) == 130

    given = asked[0][2]
    assert (given["workers"], given["address"]) == (Workers(count=4, cpus=1), "auto")
    assert given["placement"] == Placement(
        data_root=str(tmp_path / "here"), teacher_root=str(tmp_path / "there"), checkpoint_every=9
    )


def test_what_was_asked_of_the_cluster_is_asked_again(tmp_path: Path, asked: list[Any]) -> None:
    workers, demand = Workers(count=2, up_to=8, gpus=0.0, spread=True), Demand(at_once=5, wait=1, silence=2)
    given = {"placement": to_dict(PLACED), "workers": to_dict(workers), "demand": to_dict(demand)}
    open_store(WHOLE, Storage(tmp_path / "whole"), ABOUT, TAPS, **given).update_meta(arms={WHOLE.arms[0].name: {}})
    assert main(["resume", str(tmp_path / "whole")]) == 130
    assert (asked[0][2]["workers"], asked[0][2]["demand"]) == (workers, demand)
    assert (
        main(["resume", str(tmp_path / "whole"), "--workers-per-run", "3", "--placement", "pack", "--wait", "9"]) == 130
    )
    assert asked[1][2]["workers"] == Workers(count=3, gpus=0.0)
    assert asked[1][2]["demand"] == Demand(at_once=5, wait=9, silence=2)


def test_a_study_that_noted_nothing_of_its_sessions_is_resumed_with_the_usual(tmp_path: Path, asked: list[Any]) -> None:
    begin(tmp_path, WHOLE)
    assert main(["resume", "whole/"]) == 130
    assert asked[0][2]["workers"] == Workers()
    assert asked[0][2]["placement"] == Placement()


def test_arms_that_the_last_session_left_out_stay_out(tmp_path: Path, asked: list[Any]) -> None:
    begin(tmp_path, WHOLE)
    folder = begin(tmp_path, replace(WHOLE, arms=WHOLE.arms[1:], seeds=7))
    assert main(["resume", str(folder)]) == 130
    ((config,), *_) = asked[0]
    assert ([a.name for a in config.arms], config.seeds) == (["dfkt", "dfkt-one-round"], 7)


def test_all_studies_of_a_folder_go_on_in_one_queue(
    tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    many = tmp_path / "two words"
    for name in ("b", "a"):
        begin(many, replace(WHOLE, name=name), Workers(cpus=2))
    (many / "notes").mkdir()
    assert main(["resume", str(many)]) == 130
    (configs, results, given) = asked[0]
    assert ([config.name for config in configs], results) == (["a", "b"], str(many))
    assert given["workers"] == Workers(cpus=2)
    assert f"`python -m dfkt resume '{many}'` goes on from there" in capsys.readouterr().out


def test_an_own_method_is_resumed_where_it_can_be_imported(
    tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "resumed_own.py").write_text(OWN_METHOD)
    method = find_method("resumed_own:Plain")(depth=3)  # type: ignore[call-arg]
    folder = begin(tmp_path, tiny("own", ArmConfig(name="plain", method=method)))
    assert main(["resume", str(folder)]) == 130
    assert asked[0][0][0].arms[0].method == method

    text = (folder / "study.json").read_text().replace("resumed_own:", "resumed_gone:")
    (folder / "study.json").write_text(text)
    assert main(["resume", str(folder)]) == 2
    assert "cannot be resumed: Cannot import 'resumed_gone:Plain'" in capsys.readouterr().err


def test_a_users_teacher_that_is_gone_is_read_from_the_studys_own_copy(tmp_path: Path, asked: list[Any]) -> None:
    file = tmp_path / "mine.pt"
    folder = begin(tmp_path, replace(WHOLE, teacher=replace(WHOLE.teacher, checkpoint=str(file))))
    (folder / "teacher.pt").write_bytes(b"weights")
    for there, expected in ((False, folder / "teacher.pt"), (True, file)):
        if there:
            file.write_bytes(b"weights")
        assert main(["resume", str(folder)]) == 130
        assert asked[-1][0][0].teacher.checkpoint == str(expected)


def damaged(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(meta | changes))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "must hold a study.json, or several studies below it"),
        ("''", "empty"),
        ("torn", "study.json in"),
        ("no-config", "is damaged: config is None"),
        ("odd-arms", "is damaged: config.arms.0 is 'scratch'"),
        ("odd-setting", "cannot be resumed: Unknown setting turns"),
        ("renamed", "holds whole. Rename renamed to whole"),
        ("imageless", "or an existing folder, but got"),
    ],
)
def test_what_cannot_be_resumed_is_refused_on_one_line(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for broken, changes in {
        "torn": {},
        "no-config": {"config": None},
        "odd-arms": {"config": to_dict(WHOLE) | {"name": "odd-arms", "arms": ["scratch"]}},
        "odd-setting": {"config": to_dict(WHOLE) | {"turns": 1}},
    }.items():
        damaged(begin(tmp_path, replace(WHOLE, name=broken)), **changes)
    (tmp_path / "torn" / "study.json").write_text("{")
    begin(tmp_path, WHOLE).rename(tmp_path / "renamed")
    make_folder(tmp_path / "images" / "train", "ab")
    begin(tmp_path, replace(WHOLE, name="imageless", data=DataConfig(name=str(tmp_path / "images"))))
    shutil.rmtree(tmp_path / "images")

    assert main(["resume", name.strip("'")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A study of real images whose runs are all done, with made-up figures."""
    config = tiny("done", arm("scratch", 2), arm("scratch-ref"), seeds=2)
    monkeypatch.setattr("study.played.ABOUT", about_data(load_data(config.data, str(tmp_path))))
    Played(tmp_path, config).run()
    return config


def test_a_study_that_is_done_is_told_again_without_a_cluster(
    done: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tmp_path / "done" / "study.json").read_text()
    assert main(["resume", "done"]) == 0
    out = capsys.readouterr().out
    assert "final runs:" in out
    assert "look further: python -m dfkt show" in out
    after = (tmp_path / "done" / "study.json").read_text()
    assert json.loads(before)["arms"] == json.loads(after)["arms"]


@pytest.mark.parametrize("more", ["trial", "seed", "arm", "unfinished"])
def test_a_study_that_is_not_done_asks_for_a_cluster_and_is_left_as_it_is_where_there_is_none(
    more: str, done: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "trial": replace(done, arms=(arm("scratch", 3), done.arms[1])),
        "seed": replace(done, seeds=3),
        "arm": replace(done, arms=(*done.arms, arm("scratch-more"))),
        "unfinished": replace(done, name="other"),
    }[more]
    if more == "unfinished":
        Played(tmp_path, config).run(limit=1)
    else:
        damaged(tmp_path / "done", config=to_dict(config), sessions=[])
    before = (tmp_path / config.name / "study.json").read_text()
    assert main(["resume", config.name]) == 2
    assert "a cluster would be started" in capsys.readouterr().err
    assert (tmp_path / config.name / "study.json").read_text() == before


def test_ctrl_c_outside_of_runs_says_how_to_go_on_once_there_is_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dfkt.study.study.check_study", stop)
    assert main(["study", "--name", "whole", "--data", "digits"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    folder = begin(tmp_path / "results", WHOLE)
    assert main(["study", "--name", "whole", "--data", "digits"]) == 130
    said = f"interrupted; what was finished is kept; `python -m dfkt resume {folder}` goes on from there\n"
    assert capsys.readouterr().out == said
