"""Switches make the study that they say; a setting that is given is fixed, and no trial draws it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli.switches import OWN_METHOD, make_folder, parsed, study_of

from dfkt.cli import study
from dfkt.cli.main import main
from dfkt.cli.study import run_all, run_script
from dfkt.config import DataConfig
from dfkt.errors import ConfigError
from dfkt.methods.base import Method
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.fsp import Fsp
from dfkt.methods.kd import Kd
from dfkt.methods.space import Range, Space
from dfkt.networks.taps import StudentTaps
from dfkt.study.config import ArmConfig, StudyConfig, default_arms
from dfkt.study.search import random_draws

TAPS = StudentTaps(4, (0, 1, 2, 3))
WHOLE = StudyConfig(name="big", arms=default_arms(trials=60), seeds=5)


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def arms_of(*argv: str, config: StudyConfig = WHOLE) -> dict[str, int]:
    """Return name and trials of the arms that switches make."""
    return {arm.name: arm.trials for arm in study_of(config, *argv).arms}


def drawn(*argv: str, config: StudyConfig = WHOLE) -> list[Method]:
    """Return random methods of the searched arm."""
    return random_draws(study_of(config, *argv).arms[-1], TAPS, 40)


def test_without_switches_a_script_is_what_it_says() -> None:
    assert study_of(WHOLE) == WHOLE


def test_switches_change_what_they_name() -> None:
    changed = study_of(
        WHOLE, "--trials", "3", "--seeds", "2", "--search-seed", "9", "--max-failures", "0", "--epochs", "4"
    )
    assert (changed.seeds, changed.search_seed, changed.max_failures, changed.train.epochs) == (2, 9, 0, 4)
    assert changed.early_stopping
    assert not study_of(WHOLE, "--no-early-stopping").early_stopping
    assert [arm.trials for arm in changed.arms] == [0, 0, 0, 3]


def test_smoke_shrinks_a_study_under_a_name_of_its_own_and_switches_come_on_top() -> None:
    small = study_of(WHOLE, "--smoke")
    assert (small.name, small.seeds, [arm.trials for arm in small.arms]) == ("big-smoke", 2, [0, 0, 0, 2])
    assert small.train.epochs == small.teacher.train.epochs == 3
    assert (small.data.limit_train, small.data.limit_test) == (1000, 1000)
    assert arms_of("--smoke", "--trials", "5")["dfkt"] == 5
    assert study_of(WHOLE, "--smoke", "--epochs", "2", "--data", "mnist").name == "big-smoke-mnist"


def test_another_method_is_searched_as_often_and_leaves_the_baselines() -> None:
    assert arms_of("--method", "kd") == {"scratch": 0, "fsp": 0, "kd": 60}
    assert arms_of("--method", "attention", "--trials", "2") == {"scratch": 0, "kd": 0, "fsp": 0, "attention": 2}


def test_the_method_that_a_script_searches_keeps_its_settings_when_it_is_named() -> None:
    config = replace(WHOLE, arms=default_arms(Dfkt(norm="unit"), trials=4))
    assert study_of(config, "--method", "dfkt") == config


def test_baselines_can_be_chosen_left_out_and_are_not_what_is_searched() -> None:
    assert arms_of("--baselines", "kd, similarity") == {"kd": 0, "similarity": 0, "dfkt": 60}
    assert arms_of("--baselines", "") == {"dfkt": 60}
    with pytest.raises(ConfigError, match="leave out the method that is searched, but got dfkt"):
        study_of(WHOLE, "--baselines", "scratch,dfkt")
    with pytest.raises(ConfigError, match=r"Unknown method 'fst'\. Did you mean fsp"):
        study_of(WHOLE, "--baselines", "fst")


def test_scratch_may_be_all_there_is() -> None:
    assert arms_of("--method", "scratch", "--trials", "0", "--baselines", "") == {"scratch": 0}


def test_no_trials_mean_reference_settings_of_the_same_arm() -> None:
    (*_, arm) = study_of(WHOLE, "--method", "kd", "--trials", "0").arms
    assert (arm.method, arm.trials) == (Kd(), 0)
    config = replace(WHOLE, arms=default_arms(trials=0))
    assert arms_of("--trials", "7", config=config)["dfkt"] == 7


def test_an_own_method_is_named_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "study_of_own.py").write_text(OWN_METHOD)
    config = study_of(WHOLE, "--method", "study_of_own:Plain", "--set", "depth=2", "--baselines", "kd")
    assert [arm.name for arm in config.arms] == ["kd", "plain"]
    assert config.arms[-1].method.depth == 2  # type: ignore[attr-defined]
    assert arms_of("--baselines", "study_of_own:Plain") == {"plain": 0, "dfkt": 60}


def test_other_images_make_another_study_unless_it_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "my images", "ab")
    assert study_of(WHOLE, "--data", "mnist").name == "big-mnist"
    assert study_of(WHOLE, "--data", "digits").name == "big"
    assert study_of(WHOLE, "--data", "my images").name == "big-my_images"
    assert study_of(replace(WHOLE, data=DataConfig(name="mnist")), "--data", "digits").name == "big-digits"
    named = study_of(WHOLE, "--data", "my images", "--name", "mine")
    assert (named.name, named.data.name) == ("mine", str(tmp_path / "my images"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("pattern=dense-2", "pattern", "dense-2"),
        ("pattern=dense order=local rounds=2", "order", "local"),
        ("pattern=dense order=local rounds=2", "rounds", 2),
        ("order=local", "order", "local"),
        ("rounds=2", "rounds", 2),
        ("order=joint rounds=2", "rounds", 2),
        ("norm=unit", "norm", "unit"),
        ("rate=0.05", "rate", 0.05),
        ("weights=pair", "weights", "pair"),
        ("weight=0", "weight", 0.0),
        ("weight=0.7", "weight", 0.7),
        ("share=0.2", "share", 0.2),
        ("clip_norm=none", "clip_norm", None),
        ("freeze_below=false", "freeze_below", False),
        ("span_weights=[1, 2, 3]", "span_weights", (1, 2, 3)),
        ("stage_lengths=[2, 1]", "stage_lengths", (2, 1)),
    ],
)
def test_a_setting_that_is_given_is_what_every_trial_has(text: str, name: str, value: Any) -> None:
    given = text.split() if "[" not in text else [text]
    methods = drawn("--set", *given)
    assert {getattr(method, name) for method in methods} == {value}
    assert getattr(study_of(WHOLE, "--set", *given).arms[-1].method, name) == value
    assert len(set(methods)) == len(methods)  # all else is searched


@pytest.mark.parametrize(
    ("method", "text", "name", "value"),
    [
        ("kd", "temperature=2", "temperature", 2.0),
        ("fsp", "share=0.25", "share", 0.25),
        ("kd", "rate=0.05", "rate", 0.05),
    ],
)
def test_a_setting_of_another_method_is_fixed_as_well(method: str, text: str, name: str, value: float) -> None:
    methods = drawn("--method", method, "--set", text)
    assert {getattr(one, name) for one in methods} == {value}
    assert len(set(methods)) == len(methods)


def test_several_settings_are_fixed_at_once_and_the_space_of_the_script_stays() -> None:
    arm = ArmConfig(
        name="dfkt", method=Dfkt(norm="unit"), trials=4, space=Space({"share": Range(0.2, 0.3), "rounds": (1,)})
    )
    config = replace(WHOLE, arms=(arm,))
    methods: list[Any] = drawn("--set", "pattern=dense-2", "rounds=3", "--search", "rate=0.1,0.2", config=config)
    assert {(one.pattern, one.norm) for one in methods} == {("dense-2", "unit")}
    assert {one.rounds for one in methods} == {3}
    assert {one.rate for one in methods} == {0.1, 0.2}
    assert all(0.2 <= one.share <= 0.3 for one in methods)


def test_a_search_is_narrowed() -> None:
    methods: list[Any] = drawn("--search", "rate=0.05..0.06", "pattern=dense-2,adjacent", "rounds=2..3")
    assert {one.pattern for one in methods} == {"dense-2", "adjacent"}
    assert all(0.05 <= one.rate <= 0.06 for one in methods)
    assert {one.rounds for one in methods} == {2, 3}


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="fixed by --set or searched by --search, but rate is both"):
        study_of(WHOLE, "--set", "rate=0.1", "--search", "rate=0.1..0.2")
    with pytest.raises(ConfigError, match="says what trials draw, but dfkt has none"):
        study_of(WHOLE, "--trials", "0", "--search", "rate=0.1..0.2")


def test_a_setting_of_another_method_than_the_searched_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="Settings of kd are given as"):
        study_of(WHOLE, "--method", "kd", "--set", "rounds=2")
    assert isinstance(study_of(WHOLE, "--method", "fsp").arms[-1].method, Fsp)


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        ({"interrupted": False, "failures": 0}, 0, "everything is in"),
        ({"interrupted": False, "failures": 2}, 1, "everything is in"),
        ({"interrupted": True, "failures": 0}, 130, "results/big` goes on from there"),
    ],
)
def test_the_exit_code_says_how_it_ended(
    outcome: dict[str, Any], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dfkt.study.study.run_studies", lambda *a, **k: SimpleNamespace(**outcome))
    monkeypatch.setattr("dfkt.analysis.pages.folder_page", lambda folder: f"the page of {Path(folder).name}")
    assert run_script(WHOLE, "A study.", []) == code
    out = capsys.readouterr().out
    assert said in out
    assert ("the page of big" in out) == (code != 130)

    assert run_all([WHOLE, replace(WHOLE, name="b")], "both", parsed(study)) == code
    assert code == 130 or "the page of big\n\n\nthe page of b\n" in capsys.readouterr().out


def test_a_scripts_switches_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("dfkt.cli.study.run_all", lambda configs, results, a: seen.append((configs, results)) or 0)
    assert run_script(WHOLE, None, ["--trials", "2", "--results", "there"]) == 0
    assert main(["study", "--name", "mine", "--trials", "2"]) == 0
    ((script,), where), ((command,), default) = seen
    assert (script.name, where, command.name, default) == ("big", "there", "mine", "results")
    assert script.arms == command.arms
