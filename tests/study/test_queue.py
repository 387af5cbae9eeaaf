"""Arms share one queue: each searches, then makes its final runs, and no slot waits for an arm's last trial.

Tune is played by :class:`Toy`, which makes its calls in its order; stores, searchers and final runs are the real ones,
and only training is replaced by the reports that it would send.
"""

import copy
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from dfkt.study.queue import ArmDriver, ArmRecorder, Arms, RunningArm, Skipped
from dfkt.config import Method, RunConfig, StudyConfig, TrainConfig, to_dict
from dfkt.store.study_store import StudyStore, read_study
from dfkt.methods.space import SearchSpace
from dfkt.store.files import Storage
from dfkt.training.run import RESULT_FILE

RECORD = {"index": 0, "epoch": 1.0, "step": 4, "images": 256, "phase": "task", "loss": 1.0, "rung_epoch": 1.0}
TEACHER = {"key": "k", "network": "resnet26", "val_accuracy": 0.9, "test_accuracy": 0.9}


def open_arm(folder: Path, name: str, trials: int = 2, seeds: int = 2, method: Method = "scratch") -> RunningArm:
    """Open an arm as a comparison does, for the first time or again."""
    study = StudyConfig(
        name=name,
        base=RunConfig(method=method, train=TrainConfig(epochs=1)),
        trials=trials,
        seeds=seeds,
        baselines=(),
        early_stopping=False,
    )
    space, storage = SearchSpace(4, "span", method), Storage(folder / name)
    store = StudyStore.open(storage) if storage.exists("study.json") else StudyStore.create(storage, space.types(), {})
    store.update_meta(config=to_dict(study), data={}, teacher=TEACHER)
    return RunningArm(study, store, space, lambda line: None)


class Toy:
    """Tune with some slots: asks the searcher, starts what it hands out, tells how that ends."""

    def __init__(self, arms: Arms) -> None:
        self.arms = arms
        self.recorder = ArmRecorder(arms)
        self.handed: list[Any] = []
        self.finished = False

    def ask(self) -> Any:
        """Return the next trial, started; ``None`` when there is none to begin now."""
        trial_id = f"t{len(self.handed)}"
        params = self.arms.suggest(trial_id)
        self.finished = params == Searcher.FINISHED
        if not isinstance(params, dict):
            return None
        quiet = {"get_pickled_error": lambda: None, "get_error": lambda: None}
        trial = SimpleNamespace(trial_id=trial_id, config=copy.deepcopy(params), **quiet)
        self.handed.append(trial)
        self.recorder.on_trial_start(0, [], trial)
        return trial

    def report(self, trial: Any, payload: dict[str, Any]) -> None:
        """The trial's process reports."""
        self.arms.on_trial_result(trial.trial_id, payload)
        self.recorder.on_trial_result(0, [], trial, payload)

    def end(self, trial: Any, accuracy: float = 0.5) -> None:
        """The trial reports its end, and leaves a result where it is a final run."""
        record = RECORD | {"val_accuracy": accuracy}
        payload = {"records": [record], "val_accuracy": accuracy, "rung_epoch": 1.0, "complete": True}
        payload |= {"wall_seconds": 1.0, "workers": 1}
        if "job" in trial.config:
            kept = {"test_accuracy": accuracy, "attempts": 1, "started": datetime.now(UTC).isoformat()}
            Storage(trial.config["job"].storage).write(RESULT_FILE, json.dumps(payload | kept).encode())
        self.report(trial, payload)
        self.stop(trial, payload)

    def stop(self, trial: Any, payload: dict[str, Any] | None = None) -> None:
        """The trial's process ends."""
        self.arms.on_trial_complete(trial.trial_id, payload)
        self.recorder.on_trial_complete(0, [], trial)

    def die(self, trial: Any, error: str = "Worker died") -> None:
        """The trial's process raised, or died too often."""
        trial.get_error = lambda: f"Traceback\n{error}"
        self.arms.on_trial_complete(trial.trial_id, error=True)
        self.recorder.on_trial_error(0, [], trial)

    def run(
        self, slots: int = 1, limit: int | None = None, accuracy: Callable[[dict[str, Any]], float] = lambda params: 0.5
    ) -> None:
        """Run to the end with so many slots, the oldest trial ending first; or until ``limit`` trials have ended."""
        live: list[Any] = []
        while limit is None or limit > 0:
            while len(live) < slots and (trial := self.ask()) is not None:
                live.append(trial)
            if not live:
                assert self.finished, "Tune would wait for ever"
                return
            trial = live.pop(0)
            self.end(trial, accuracy(trial.config))
            limit = None if limit is None else limit - 1


def toy_of(*arms: Any) -> Toy:
    return Toy(Arms(arms))


def kinds(toy: Toy, number: int) -> list[str]:
    """Return what an arm handed out, in order."""
    found = [trial.config for trial in toy.handed if trial.config["arm"] == number]
    return ["final" if "job" in params else "trial" for params in found]


def without_arm(trial: Any) -> dict[str, Any]:
    return {name: value for name, value in trial.config.items() if name != "arm"}


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
def test_every_arm_gets_its_trials_and_then_its_seeds_and_no_more(slots: int, tmp_path: Path) -> None:
    toy = toy_of(open_arm(tmp_path, "scratch"), open_arm(tmp_path, "kd", 3, 1, "kd"), open_arm(tmp_path, "plain", 0, 2))
    toy.run(slots)

    assert [kinds(toy, k) for k in range(3)] == [
        ["trial", "trial", "final", "final"],
        ["trial", "trial", "trial", "final"],
        ["final", "final"],
    ]
    for name, trials, seeds in (("scratch", 2, 2), ("kd", 3, 1), ("plain", 0, 2)):
        study = read_study(tmp_path / name)
        assert list(study.trials.number) == list(range(trials))
        assert list(study.finals.seed) == list(range(1, seeds + 1))
        assert set(study.trials.state) | set(study.finals.state) == {"COMPLETE"}
        assert study.finals.test_accuracy.notna().all()
        assert len(study.epochs) == trials
        assert len(study.final_epochs) == seeds
        assert sorted(study.meta["present_finals"]) == list(study.finals.number)
    assert (toy.arms.over, toy.arms.failures) == (True, 0)


def test_while_an_arms_last_trial_runs_the_next_arm_begins_and_its_own_final_runs_come_first_after_that(
    tmp_path: Path,
) -> None:
    toy = toy_of(open_arm(tmp_path, "one"), open_arm(tmp_path, "two"))
    first, last, other = (toy.ask() for _ in range(3))
    assert [trial.config["arm"] for trial in (first, last, other)] == [0, 0, 1]
    toy.end(first, 0.4)
    assert toy.ask().config["arm"] == 1

    toy.end(last, 0.8)
    final = toy.ask()
    assert (final.config["arm"], final.config["job"].config.train.seed) == (0, 1)
    assert final.config["job"].config.task.optimizer.lr == last.config["task_lr"]  # that of the better trial
    assert final.config["job"].test


def test_with_all_handed_out_it_is_finished_only_when_nothing_runs_any_more(tmp_path: Path) -> None:
    toy = toy_of(open_arm(tmp_path, "one", 1, 1))
    trial = toy.ask()
    assert (toy.ask(), toy.finished) == (None, False)
    toy.end(trial)
    final = toy.ask()
    assert (toy.ask(), toy.finished, toy.arms.over) == (None, False, False)
    toy.end(final)
    assert (toy.ask(), toy.finished, toy.arms.over) == (None, True, True)


def test_an_arm_that_waits_is_opened_once_and_as_soon_as_its_parent_is_searched(tmp_path: Path) -> None:
    parent, opened = open_arm(tmp_path, "parent", 1, 1), []

    def opener() -> RunningArm | None:
        if not parent.searched:
            return None
        opened.append(open_arm(tmp_path, "part", 0, 1))
        return opened[-1]

    toy = toy_of(parent, opener, open_arm(tmp_path, "other", 1, 1))
    trial, other = toy.ask(), toy.ask()
    assert other.config["arm"] == 2
    assert (toy.ask(), toy.finished, opened) == (None, False, [])

    toy.end(trial)
    own, part = toy.ask(), toy.ask()
    assert [own.config["arm"], part.config["arm"]] == [0, 1]
    for running in (other, own, part):
        toy.end(running)
    toy.run()
    assert len(opened) == 1
    assert toy.arms.over
    assert list(read_study(tmp_path / "part").finals.state) == ["COMPLETE"]


def test_a_waiting_arm_keeps_the_run_from_being_finished(tmp_path: Path) -> None:
    toy = toy_of(lambda: None)
    assert (toy.ask(), toy.finished, toy.arms.over) == (None, False, False)


def test_an_arm_that_is_skipped_counts_as_done(tmp_path: Path) -> None:
    toy = toy_of(open_arm(tmp_path, "one", 1, 1), Skipped)
    toy.run()
    assert (toy.arms.over, toy.arms.failures, kinds(toy, 1)) == (True, 0, [])


def test_a_final_run_without_a_result_is_a_failure_and_is_done_by_the_next_run(
    tmp_path: Path,
) -> None:
    toy = toy_of(open_arm(tmp_path, "one", 1, 2))
    toy.end(toy.ask())
    toy.die(toy.ask())
    toy.run()
    assert (toy.arms.over, toy.arms.failures, toy.finished) == (True, 1, True)
    assert list(read_study(tmp_path / "one").finals.seed) == [2]

    again = toy_of(open_arm(tmp_path, "one", 1, 2))
    again.run()
    assert (again.arms.over, again.arms.failures) == (True, 0)
    assert [trial.config["job"].config.train.seed for trial in again.handed] == [1]


def test_a_final_run_that_tune_lost_after_it_had_left_its_result_is_taken_in(tmp_path: Path) -> None:
    toy = toy_of(open_arm(tmp_path, "one", 0, 1))
    final = toy.ask()
    kept = {"records": [], "attempts": 1, "started": datetime.now(UTC).isoformat(), "wall_seconds": 1.0}
    Storage(final.config["job"].storage).write(RESULT_FILE, json.dumps(kept | {"test_accuracy": 0.5}).encode())
    toy.die(final)
    assert (toy.ask(), toy.arms.over, toy.arms.failures) == (None, True, 0)


def test_a_failed_trial_is_a_row_and_its_arm_goes_on(tmp_path: Path) -> None:
    toy = toy_of(open_arm(tmp_path, "one", 3, 1))
    toy.die(toy.ask(), "ValueError: deep inside")
    explosive = toy.ask()
    failure = {"records": [], "failure": "The loss became nan", "wall_seconds": 1.0}
    toy.report(explosive, failure)
    toy.stop(explosive, failure)
    toy.run()

    study = read_study(tmp_path / "one")
    assert list(study.trials.state) == ["FAIL", "FAIL", "COMPLETE"]
    assert list(study.trials.error[:2]) == ["ValueError: deep inside", "The loss became nan"]
    assert list(study.finals.state) == ["COMPLETE"]
    assert (toy.arms.over, toy.arms.failures) == (True, 2)


def test_an_arm_without_a_complete_trial_has_no_final_runs_and_is_done(tmp_path: Path) -> None:
    toy = toy_of(open_arm(tmp_path, "one", 1, 2), open_arm(tmp_path, "two", 1, 1))
    toy.die(toy.ask())
    toy.run()
    assert (kinds(toy, 0), kinds(toy, 1)) == (["trial"], ["trial", "final"])
    assert (toy.arms.over, toy.arms.failures) == (True, 1)


@pytest.mark.parametrize("limit", range(8))
def test_a_later_run_does_what_is_missing_and_nothing_twice(limit: int, tmp_path: Path) -> None:
    def both() -> Toy:
        return toy_of(open_arm(tmp_path, "one", 2, 2), open_arm(tmp_path, "two", 2, 2, "kd"))

    first = both()
    first.run(slots=2, limit=limit)  # then the main process is killed
    before = [read_study(tmp_path / name) for name in ("one", "two")]
    later = both()
    later.run(slots=2)

    assert later.arms.over
    assert len(later.handed) == 8 - limit
    for name, old in zip(("one", "two"), before, strict=True):
        study = read_study(tmp_path / name)
        assert list(study.trials.number) == [0, 1]
        assert set(study.trials.state) == {"COMPLETE"}
        assert list(study.finals.seed) == [1, 2]
        ended = old.trials[old.trials.state == "COMPLETE"]
        assert ended.equals(study.trials[study.trials.number.isin(ended.number)])
        assert old.finals.equals(study.finals[study.finals.number.isin(old.finals.number)])


def test_an_interrupted_trial_comes_first_again_with_its_number_and_its_parameters(tmp_path: Path) -> None:
    first = toy_of(open_arm(tmp_path, "one", 3, 1, "dfkt"))
    ended, *interrupted = (first.ask() for _ in range(3))
    first.end(ended)

    later = toy_of(open_arm(tmp_path, "one", 3, 1, "dfkt"))
    again = [later.ask(), later.ask()]
    assert [without_arm(trial) for trial in again] == [without_arm(trial) for trial in interrupted]
    assert [trial.config["number"] for trial in again] == [1, 2]
    assert (later.ask(), later.finished) == (None, False)
    for trial in again:
        later.end(trial)
    assert list(read_study(tmp_path / "one").trials.attempts) == [1, 2, 2]


def test_more_trials_and_seeds_are_added_to_those_there_are(tmp_path: Path) -> None:
    toy_of(open_arm(tmp_path, "one", 1, 1)).run()
    before = read_study(tmp_path / "one")
    toy = toy_of(open_arm(tmp_path, "one", 2, 2))
    toy.end(toy.ask(), 0.1)  # worse than the first, which stays the winner
    toy.run()

    study = read_study(tmp_path / "one")
    assert kinds(toy, 0) == ["trial", "final"]
    assert before.trials.equals(study.trials.head(1))
    assert before.finals.equals(study.finals.head(1))
    assert list(study.finals.seed) == [1, 2]


def test_a_finished_arm_hands_out_nothing(tmp_path: Path) -> None:
    toy_of(open_arm(tmp_path, "one")).run(2)
    again = toy_of(open_arm(tmp_path, "one"))
    again.run(2)
    assert (again.handed, again.arms.over) == ([], True)


def test_a_process_does_what_was_handed_to_it_with_its_arms_driver(tmp_path: Path) -> None:
    done: list[tuple[int, Any]] = []

    class Noting:
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self, params: dict[str, Any]) -> None:
            done.append((self.number, params))

        def run(self, job: Any) -> None:
            done.append((self.number, job))

    drive = ArmDriver((Noting(0), Noting(1)))  # type: ignore[arg-type]
    toy = toy_of(open_arm(tmp_path, "one", 1, 1), open_arm(tmp_path, "two", 0, 1))
    trial, final = toy.ask(), toy.ask()
    drive(trial.config)
    drive(final.config)
    assert done == [(0, without_arm(trial)), (1, final.config["job"])]
    assert set(without_arm(trial)) == {"number", "task_lr"}
