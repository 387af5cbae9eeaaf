"""Runs that diverge or fail: they count as failed, say why, end a study where all would, and can be tried again."""

import contextlib
import itertools
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import load_script
from small_runs import start
from study.played import ABOUT, TAPS, Played, arm, open_study, told, toy
from terminals import terminal
from torch import Tensor, nn

from dfkt.cli.main import main
from dfkt.config import TrainConfig, to_dict
from dfkt.data.image_set import ImageSet
from dfkt.errors import NonFiniteLossError, RunError
from dfkt.methods.base import Features, Term
from dfkt.methods.scratch import Scratch
from dfkt.store.files import Storage
from dfkt.store.origin import environment
from dfkt.store.study_store import StudyStore, read_study
from dfkt.study.config import StudyConfig, ablations
from dfkt.study.driver import Workers
from dfkt.study.opening import Checked
from dfkt.study.queue import Queue
from dfkt.study.recorder import ALIKE
from dfkt.study.retry import failed_runs, retry_failed
from dfkt.study.search import JOURNAL
from dfkt.study.study import Outcome, run_studies
from dfkt.training import evaluate as evaluation
from dfkt.training import run as running

KNOWN = environment()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are looked up once, and nothing need survive a power cut."""
    monkeypatch.setattr("dfkt.study.opening.environment", lambda: KNOWN)
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Poisoned(Term):
    """A loss that is finite, and whose gradient is not in one step."""

    name = "task"
    student_logits = True

    def __init__(self, at: int, value: float) -> None:
        self.at, self.value, self.calls = at, value, 0

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:  # noqa: D102
        self.calls += 1
        assert student.logits is not None
        logits = student.logits
        if self.calls == self.at:
            logits.register_hook(lambda gradient: gradient * self.value)
        return nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_student_that_broke_in_the_very_last_step_has_no_val_accuracy_but_failed(
    value: float, images: ImageSet
) -> None:
    training = start(images, Scratch(), TrainConfig(epochs=2, batch_size=32, clip_norm=None))
    last = training.ends[-1]
    (stage,) = training.schedule
    training.schedule = (type(stage)(**{**vars(stage), "terms": (Poisoned(last, value),)}),)
    with pytest.raises(NonFiniteLossError, match=r"nan or inf in task stage, at the end of epoch 2 \(val (nan|inf)\)"):
        list(training.run())
    assert training.step == last


def figures(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Let the losses of one look after another be these."""
    left = list(losses)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: (0.1, left.pop(0)))
    monkeypatch.setattr("dfkt.training.loop.evaluate", evaluation.evaluate)
    monkeypatch.setattr(running, "evaluate", evaluation.evaluate)


DISTILL = ["distill", "--method", "scratch", "--data", "digits", "--limit-train", "64", "--limit-test", "32"]
DISTILL += ["--student", "resnet8", "--student-width", "0.25", "--epochs", "1", "--out", "out"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("split", ["val", "test"])
def test_distill_fails_where_the_loss_of_val_or_test_is_not_finite_and_keeps_no_student(
    split: str, bad: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    figures(monkeypatch, *({"val": [bad], "test": [1.0, bad]}[split]))
    for _ in range(2):  # told again, it has failed still
        assert main(DISTILL) == 1
        *_, line = capsys.readouterr().out.splitlines()
        assert line.startswith("failed: The loss became nan or inf in task stage, ")
        assert f"({split} {bad:g}). Lower the learning rate" in line
    assert not (tmp_path / "out" / "config.json").exists()


def failing(played: Played, *errors: str) -> None:
    """Let one run after another fail; an empty error is none."""
    for error in errors:
        trial = played.ask()
        played.fail(trial, error) if error else played.end(trial)


def test_a_study_whose_first_runs_fail_alike_ends_before_all_are_burnt(tmp_path: Path) -> None:
    config = toy("s", arm("scratch", ALIKE + 5))
    played = Played(tmp_path, config)
    failing(played, *["KeyError: 'x'"] * ALIKE)
    assert str(played.queue.broken) == (
        "the first 5 runs failed alike (KeyError: 'x'); mend that, then the same command with --retry-failed goes on"
    )
    assert isinstance(played.queue.broken, RunError)
    assert (played.ask(), played.finished) == (None, True)
    assert list(played.study().trials.state) == ["FAIL"] * ALIKE
    assert len(played.lines) == ALIKE


@pytest.mark.parametrize(
    "errors",
    [
        ["a"] * (ALIKE - 1) + ["b", "a"],
        ["", *["a"] * ALIKE],
        [*["a"] * (ALIKE - 1), "", *["a"] * ALIKE],
        ["a"] * (ALIKE - 1),
    ],
)
def test_runs_that_fail_otherwise_or_beside_good_ones_end_nothing(errors: list[str], tmp_path: Path) -> None:
    played = Played(tmp_path, toy("s", arm("scratch", 20)))
    failing(played, *errors)
    assert played.queue.broken is None
    assert played.ask() is not None


def test_when_nothing_is_left_to_do_there_is_nothing_to_end(tmp_path: Path) -> None:
    played = Played(tmp_path, toy("s", arm("scratch"), seeds=ALIKE))
    failing(played, *["a"] * ALIKE)
    assert (played.ask(), played.queue.over, played.queue.broken) == (None, True, None)
    assert played.queue.failures == ALIKE


def test_a_fault_of_the_recorder_ends_the_study_and_marks_no_run_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played(tmp_path, toy("s", arm("scratch", 3)))
    fault = ValueError("no such column")
    monkeypatch.setattr(StudyStore, "save", lambda *given: (_ for _ in ()).throw(fault))
    assert played.ask() is not None  # its start was to be written
    assert played.queue.broken is fault
    assert (played.ask(), played.finished) == (None, True)
    assert len(played.study().trials) == 0


@pytest.mark.parametrize("final", [False, True], ids=["trial", "final run"])
def test_a_run_whose_process_did_not_get_as_far_as_to_start_has_a_row_that_says_so(final: bool, tmp_path: Path) -> None:
    played = Played(tmp_path, toy("s", arm("scratch", 0 if final else 1), seeds=1))
    asked = played.searcher.suggest("t0")
    assert isinstance(asked, dict)
    played.die(SimpleNamespace(config=asked, error_file=None, pickled_error_file=None))
    (row,) = played.store().rows("final" if final else "trial", "scratch")
    assert (row["state"], row["attempts"]) == ("RUNNING" if final else "FAIL", 1)
    assert row["error"] == "its process ended without a word"
    assert (played.queue.broken, played.queue.failures, len(played.lines)) == (None, 1, 1)


def again(results: Path, config: StudyConfig, **given: Any) -> Played:
    """Open a study with its failed runs to be tried again."""
    study = open_study(config, results)
    assert retry_failed(study.store, config) == len(failed_before(results, config))
    return Played(results, config, **given)


def failed_before(results: Path, config: StudyConfig) -> list[Any]:
    rows = [read_study(results / config.name).trials, read_study(results / config.name).finals]
    return [row for table in rows for row in table.to_dict("records") if row["error"] in ("a", "b", "c")]


def test_failed_runs_are_tried_again_with_number_and_parameters_and_their_attempts_count_on(tmp_path: Path) -> None:
    config = toy("s", arm("dfkt", 4), seeds=2)
    played = Played(tmp_path, config)
    failing(played, "", "a", "b", "", "c")  # the third try to end well is a final run, of seed 1
    played.run()
    before = played.study()
    assert list(before.trials.state) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert sorted(before.finals.state) == ["COMPLETE", "FAIL"]
    params = [name for name in before.trials if name.startswith("param_")]

    assert Played(tmp_path, config).queue.over  # without being told so, nothing is
    later = again(tmp_path, config, judge=lambda run: 0.1)
    assert later.queue.total == 2 + 2  # the winner's final runs may become another's
    later.run()
    after = later.study()
    assert later.told() == ["dfkt trial 1", "dfkt trial 2", "dfkt seed 1"]
    assert set(after.trials.state) | set(after.finals.state) == {"COMPLETE"}
    assert list(after.trials.attempts) == [1, 2, 2, 1]
    assert list(after.finals.attempts) == [2, 1]
    assert after.trials[params].equals(before.trials[params])
    assert after.trials.settings.equals(before.trials.settings)
    assert (later.queue.over, later.queue.failures) == (True, 0)
    optuna = Played(tmp_path, toy("s", arm("dfkt", 5), seeds=2)).queue.arms[str(tmp_path / "s"), "dfkt"].search
    assert optuna is not None
    assert [trial.state.name for trial in optuna.optuna.trials] == ["COMPLETE"] * 4
    assert [trial.value for trial in optuna.optuna.trials][1:3] == pytest.approx([0.1, 0.1])  # it learns from them


def test_what_a_retried_trial_finds_may_win_and_have_final_runs_of_its_own(tmp_path: Path) -> None:
    config = toy("s", arm("scratch", 2), seeds=1)
    played = Played(tmp_path, config)
    failing(played, "", "a")
    played.run()
    later = again(tmp_path, config, judge=lambda run: 0.99).run()
    assert later.told() == ["scratch trial 1", "scratch seed 1"]
    assert later.store().meta["arms"]["scratch"]["best"]["trial"] == 1


def test_a_kill_before_a_retried_run_has_begun_leaves_it_to_be_done(tmp_path: Path) -> None:
    config = toy("s", arm("scratch", 2), seeds=1)
    played = Played(tmp_path, config)
    failing(played, "a", "")
    played.run()
    again(tmp_path, config)
    assert Played(tmp_path, config).run().told()[0] == "scratch trial 0"


def test_where_no_trial_failed_optunas_journal_stays(tmp_path: Path) -> None:
    config = toy("s", arm("scratch", 1), seeds=1)
    played = Played(tmp_path, config)
    failing(played, "", "a")
    journal = (tmp_path / "s" / JOURNAL).read_bytes()
    store = played.store()
    assert [(kind, name, row["number"]) for kind, name, row in failed_runs(store, config)] == [("final", "scratch", 0)]
    assert retry_failed(store, config) == 1
    assert (tmp_path / "s" / JOURNAL).read_bytes() == journal
    assert Played(tmp_path, config).run().told() == ["scratch seed 1"]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a study hands out first, with no cluster and nothing trained."""
    first: list[str] = []

    def take(queue: Queue, *_: Any, **__: Any) -> None:
        run = queue.next()
        first.append("nothing" if run is None else told(run))

    fakes = {
        "cluster": lambda *_: contextlib.nullcontext(),
        "fit_workers": lambda wanted, *_: wanted,
        "run_queue": take,
    }
    fakes |= {"check_study": lambda *_: Checked(ABOUT, TAPS, {}), "keep_teacher": lambda *_: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(f"dfkt.study.study.{name}", fake)
    return first


def test_a_study_that_is_over_starts_again_for_failed_runs_alone_when_told_to(
    tmp_path: Path, handed: list[str]
) -> None:
    config = toy("s", arm("scratch", 2), seeds=1)
    played = Played(tmp_path, config)
    failing(played, "a", "")
    played.run()
    assert run_studies([config], str(tmp_path), workers=Workers(gpus=0), log=print).failures == 1
    assert handed == []
    run_studies([config], str(tmp_path), workers=Workers(gpus=0), retry=True, log=print)
    assert handed == ["scratch trial 0"]


def test_what_a_kill_at_the_very_end_left_is_deleted_by_the_same_command(tmp_path: Path, handed: list[str]) -> None:
    config = toy("s", arm("scratch"), seeds=1)
    Played(tmp_path, config).run()
    for folder in (("ray", "tune"), ("runs", "scratch-00000")):
        Storage(tmp_path / "s").sub(*folder).write("state", b"left")
    run_studies([config], str(tmp_path), workers=Workers(gpus=0), log=print)
    assert handed == []
    assert {"ray", "runs"}.isdisjoint(path.name for path in (tmp_path / "s").iterdir())


def test_a_study_without_failed_runs_and_one_that_is_new_have_nothing_to_try_again(
    tmp_path: Path, handed: list[str]
) -> None:
    config = toy("s", arm("scratch", 2), seeds=1)
    run_studies([config], str(tmp_path), workers=Workers(gpus=0), retry=True, log=print)
    assert handed == ["scratch trial 0"]
    Played(tmp_path, config).run()
    run_studies([config], str(tmp_path), workers=Workers(gpus=0), retry=True, log=print)
    assert len(handed) == 1


COMPARE = load_script(Path(__file__).parents[2] / "studies" / "compare.py")


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("command", ["study", "resume", "compare"])
def test_every_command_for_studies_can_try_failed_runs_again_and_ends_with_how_many_there_are(
    command: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Played(tmp_path, toy("s", arm("scratch", 1), seeds=1))
    given: list[bool] = []
    monkeypatch.setattr("dfkt.analysis.pages.folder_page", lambda folder: "the page")

    def run(configs: Any, results: str, *, retry: bool, **_: Any) -> Outcome:
        given.append(retry)
        return Outcome((str(tmp_path / "s"),), False, 3)

    monkeypatch.setattr("dfkt.study.study.run_studies", run)
    switch = ["--retry-failed"] if again else []
    switches = {"study": ["--data", "digits", "--results", str(tmp_path)], "resume": [str(tmp_path / "s")]}
    if command == "compare":
        code = COMPARE.main(["--data", "digits", "--results", str(tmp_path), *switch])
    else:
        code = main([command, *switches[command], *switch])
    assert (code, given) == (1, [again])
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "3 runs failed; the same command with --retry-failed tries them again"


def test_a_searched_arm_run_again_with_no_trials_keeps_its_winner_and_says_so(tmp_path: Path) -> None:
    before = Played(tmp_path, toy("s", arm("dfkt", 3), seeds=1, confirm=2)).run()
    later = Played(tmp_path, toy("s", arm("dfkt", 0), seeds=2, confirm=2))
    assert later.lines == ["dfkt: the 3 trials of its search count on, so 0 trials change nothing"]
    later.run()
    assert later.told() == ["dfkt seed 2"]
    old, new = (played.store().meta["arms"]["dfkt"] for played in (before, later))
    assert (new["best"], new["present"]) == (old["best"], [0, 1])
    assert new["best"]["method"] == to_dict(later.handed[0].job.config.method)


def test_an_interrupted_search_without_an_end_stands_at_its_reference_settings_with_no_trials(tmp_path: Path) -> None:
    Played(tmp_path, toy("s", arm("scratch", 3), seeds=1)).ask()
    later = Played(tmp_path, toy("s", arm("scratch", 0), seeds=1)).run()
    assert (later.told(), later.lines) == (["scratch seed 1"], ["[1/1] scratch seed 1: test 30.00 %, 3 s"])


def test_a_line_of_the_queue_is_printed_in_place_of_the_live_one(tmp_path: Path) -> None:
    searched = arm("dfkt", 1)
    with terminal(columns=100) as written:
        seconds = itertools.count(0.0)  # so that every look at the line is due
        played = Played(
            tmp_path, toy("s", searched, *ablations(searched, ["dense"]), seeds=1), clock=lambda: next(seconds)
        )
        trial = played.ask()
        played.recorder.on_step_end(0, [])
        assert "1 running" in written()
        played.end(trial)
        played.recorder.on_step_end(0, [])
        assert "0 running" in written()
        played.ask()
        assert "%" not in (wiped := written())
        assert not wiped.strip()
    assert played.lines[-1] == "dfkt-dense: dfkt is that already"
