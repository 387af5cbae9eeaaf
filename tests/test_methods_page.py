"""The page on methods: its table is the code's, its code runs, its commands are understood."""

import importlib
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import RAY_MARKS

from dfkt import METHODS, ArmConfig, Features, RunConfig, Space, StudentTaps, StudyConfig, read_study
from dfkt.cli import distill as distill_command
from dfkt.cli import study as study_command
from dfkt.config import Placement
from dfkt.methods.base import Method
from dfkt.store.files import Storage
from dfkt.study.search import random_draws
from dfkt.training.cached import images_for
from dfkt.training.run import Job, run_job
from dfkt.training.teacher import find_teacher

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
TAPS = StudentTaps(4, (0, 1, 2, 3))


def with_ray(test: Callable[..., None]) -> Callable[..., None]:
    """Mark one test of this file as the Ray tests of others are."""
    return reduce(lambda marked, mark: mark(marked), RAY_MARKS, test)


def blocks(language: str) -> list[str]:
    """Return the page's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    """Return the arguments of every command on the page."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert all(line.startswith("python -m dfkt ") for line in lines)
    return [shlex.split(line)[3:] for line in lines]


def shown(value: Any) -> str:
    """Return a setting as the table shows it."""
    if isinstance(value, float):
        return {1 / 3: "1/3", 1 / 12: "1/12"}.get(value, f"{value:g}")
    return "none" if value is None else f"`{value}`" if isinstance(value, str) else str(value)


def methods_table() -> str:
    """Return the table of built-in methods, as the page must have it."""
    rows = ["| method | what it does | searched: reference (range) | other settings |", "|---|---|---|---|"]
    for kind in METHODS.values():
        assert kind.__doc__ is not None
        ranges = kind.ranges()
        searched = [
            f"`{name}` {shown(getattr(kind(), name))} ({r.low:g} to {r.high:g}{', log' if r.log else ''})"
            for name, r in ranges.items()
        ]
        others = [f for f in fields(kind) if f.name not in ranges and f.default is not MISSING]
        only = [f"`{f.name}` {shown(f.default)}" for f in others if f.default != ()]
        first = kind.__doc__.splitlines()[0].rstrip(".")
        rows.append(f"| `{kind.name}` | {first} | {', '.join(searched)} | {', '.join(only)} |")
    return "\n".join(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's modules in it: mymethods, the script and the arm."""
    made = tmp_path_factory.mktemp("page")
    for name, code in zip(("mymethods", "compare_rkd", "narrowed"), blocks("python"), strict=True):
        (made / f"{name}.py").write_text(code)
    return made


@pytest.fixture
def mymethods(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's method, importable as by a command that is given in its folder."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("mymethods")
    for name in ("mymethods", "compare_rkd", "narrowed"):
        sys.modules.pop(name, None)


def test_the_table_has_the_settings_and_ranges_of_the_code():
    """To renew it, put what this test wants between the two marks."""
    found = re.search(r"<!-- begin methods -->\n(.*?)\n<!-- end methods -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == methods_table()


def test_the_pages_method_is_short_and_needs_the_front_door_only():
    code = blocks("python")[0]

    assert len(code.splitlines()) < 60
    assert set(re.findall(r"^(?:from|import) (\S+)", code, re.MULTILINE)) == {
        "dataclasses", "torch", "torch.nn.functional", "dfkt",
    }  # fmt: skip


def test_the_pages_method_makes_a_schedule_and_is_searched_in_its_ranges(mymethods: ModuleType) -> None:
    (stage,) = mymethods.Rkd().schedule(30, StudentTaps.of(()))
    drawn = random_draws(ArmConfig(name="rkd", method=mymethods.Rkd(), trials=1), TAPS, 20)

    assert stage.describe() == "task stage: 30 epochs at 0.1: 1 task + 25 relation"
    assert all(0.02 <= method.rate <= 0.5 and 1 <= method.weight <= 100 for method in drawn)
    assert len({method.weight for method in drawn}) == 20


def test_the_pages_loss_agrees_with_the_paper_entry_by_entry(mymethods: ModuleType) -> None:
    draws = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(5, 3, generator=draws).double() for _ in range(2))
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    both = [torch.stack([(m[i] - m[j]).norm() for i, j in pairs]) for m in (ours, theirs)]
    expected = F.smooth_l1_loss(*(d / d.mean() for d in both))

    found = mymethods.RelationTerm()(Features({}, theirs), Features({}, ours), torch.zeros(5))

    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_pages_method_trains_an_epoch_and_its_loss_is_recorded(
    mymethods: ModuleType, run_config: RunConfig, placement: Placement, tmp_path: Path
) -> None:
    config = RunConfig(
        method=mymethods.Rkd(weight=2.0),
        data=run_config.data,
        teacher=run_config.teacher,
        student=run_config.student,
        train=run_config.teacher.train,
    )
    data = images_for(config.data, placement)
    find_teacher(config.teacher, data, placement, lambda line: None, Storage(tmp_path / "run"))
    reports: list[dict[str, Any]] = []

    run_job(Job(config, placement, str(tmp_path / "run"), str(tmp_path / "run")), reports.append)

    (record,) = reports[-1]["records"]
    assert reports[-1]["complete"], reports
    assert 0 < record["relation_loss"] < 1
    assert record["loss"] == pytest.approx(record["task_loss"] + 2.0 * record["relation_loss"], rel=1e-4)


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_the_commands_are_understood(arguments: list[str], mymethods: ModuleType) -> None:
    command = {"distill": distill_command, "study": study_command}[arguments[0]]
    parser = ArgumentParser()
    command.add_switches(parser)
    parsed = parser.parse_args(arguments[1:])
    if command is distill_command:
        config = distill_command.distill_config(parsed)
        assert (config.method, config.data.name) == (mymethods.Rkd(), "digits")
        return
    study = study_command.study_config(StudyConfig(name="study"), parsed)
    (arm,) = study.searched
    arm.space.check(arm.method.columns(TAPS))
    assert arm.method.name == ("rkd" if "--method" in arguments else "dfkt")
    assert [other.name for other in study.arms[:-1]] == ["scratch", "kd", "fsp"]
    assert study.data.name == "digits"


def drawn_of(arm: ArmConfig) -> list[Any]:
    """Return random methods of an arm."""
    return random_draws(arm, TAPS, 60)


def test_the_narrowed_arms_of_script_and_command_line_draw_what_they_say(mymethods: ModuleType) -> None:
    parser = ArgumentParser()
    study_command.add_switches(parser)
    parsed = parser.parse_args(next(line for line in commands() if "--search" in line)[1:])
    by_command = study_command.study_config(StudyConfig(name="study"), parsed).searched[0]
    by_script = importlib.import_module("narrowed").ARM

    for arm, patterns in ((by_command, {"dense-2", "dense-3"}), (by_script, {"dense-2", "dense-3", "dense"})):
        methods = drawn_of(arm)
        assert {method.pattern for method in methods} == patterns
        assert {(method.rounds, method.norm, method.weight) for method in methods} == {(1, "unit", 0.0)}
        assert all(0.05 <= method.flow_rate <= 0.2 for method in methods)


def test_the_script_compares_the_method_itself(mymethods: ModuleType) -> None:
    config = importlib.import_module("compare_rkd").CONFIG

    assert {arm.name: type(arm.method) for arm in config.arms}["rkd"] is mymethods.Rkd
    assert [arm.name for arm in config.searched] == ["kd", "rkd"]


def test_weights_that_are_set_are_not_searched():
    setting = re.search(r"--set '(span_weights=\S+)'", PAGE.read_text())
    assert setting is not None
    arm = study_command.narrowed(ArmConfig(name="dfkt", method=METHODS["dfkt"](), trials=1), [setting[1]], [])

    assert arm.space == Space({})
    assert {method.span_weights for method in drawn_of(arm)} == {(1.0, 0.5)}


@with_ray
def test_the_pages_method_is_searched_by_workers_that_import_it_and_its_columns_are_stored(
    mymethods: ModuleType, run_config: RunConfig, home: Path, address: str, folder: Path
) -> None:
    from dfkt.study.study import run_studies

    method: Method = mymethods.Rkd()
    config = StudyConfig(
        name="own",
        data=run_config.data,
        teacher=run_config.teacher,
        student=run_config.student,
        train=run_config.teacher.train,
        arms=(ArmConfig(name="rkd", method=method, trials=2),),
        seeds=1,
        early_stopping=False,
    )
    lines: list[str] = []
    placement = Placement(teacher_root=str(home / "teachers"))

    outcome = run_studies([config], str(home), placement=placement, address=address, log=lines.append)

    study = read_study(home / "own")
    assert (outcome.interrupted, outcome.failures) == (False, 0), lines
    assert list(study.trials.state) == ["COMPLETE"] * 2
    assert study.trials.param_weight[0] == 25.0  # the search begins with the reference settings
    assert study.trials.param_rate.between(0.02, 0.5).all()
    assert study.epochs.relation_loss.between(1e-6, 1).all()
    assert study.final_epochs.relation_loss.notna().all()
    assert '"mymethods:Rkd"' in study.trials.settings[0]
