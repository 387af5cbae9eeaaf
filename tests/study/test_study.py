"""Studies run to their end on a real Ray cluster, whatever stops them; what needs no training trains nothing.

One process of its own holds the cluster of all tests here.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import CPUS, RAY_MARKS
from study.played import arm, faulty, hopeless, idle, open_study, patient, payloads, tiny, toy
from study.raising import Raising

from dfkt.config import Placement
from dfkt.errors import ConfigError, RunError
from dfkt.methods.kd import Kd
from dfkt.methods.registry import METHODS
from dfkt.store.study_store import Study, read_study
from dfkt.students.package import PACKAGE_FILES
from dfkt.study.capacity import Capacity, Demand
from dfkt.study.cluster import cluster
from dfkt.study.config import ArmConfig, StudyConfig, ablations
from dfkt.study.driver import Workers
from dfkt.study.failures import DIED
from dfkt.study.queue import Queue
from dfkt.study.recorder import ALIKE
from dfkt.study.study import Outcome, run_queue, run_studies
from dfkt.training.optim import decided

pytestmark = RAY_MARKS
TABLES = ("trials", "epochs", "finals", "final_epochs")
ONE = Workers(gpus=0)
HERE = Path(__file__).parents[1]
Said = tuple[Outcome, list[str]]


@pytest.fixture(scope="module", autouse=True)
def _drivers_can_be_imported() -> Iterator[None]:
    """The cluster's processes, started after this, know the helpers of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        yield


def run(home: Path, address: str, *configs: StudyConfig, workers: Workers = ONE) -> Said:
    """Run studies, training included."""
    lines: list[str] = []
    placement = Placement(teacher_root=str(home / "teachers"), target_root=str(home / "targets"))
    given: dict[str, Any] = {"placement": placement, "workers": workers, "address": address, "log": lines.append}
    return run_studies(configs, str(home), **given), lines


def play(results: Path, address: str, *configs: StudyConfig, driver: Any = idle, log: Any = print) -> Queue:
    """Run studies on the cluster with a driver that trains nothing."""
    with cluster(address):
        queue = Queue([open_study(config, results) for config in configs], log)
        run_queue(queue, driver, Capacity(ONE, Demand()), max_failures=1, log=log)
    return queue


def same(one: Study, other: Study) -> bool:
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))
    return True


def test_a_queue_of_studies_runs_to_its_end_several_at_a_time(tmp_path: Path, address: str) -> None:
    searched = arm("dfkt", 4)
    arms = (searched, *ablations(searched, ["adjacent", "dense"]), arm("scratch", 3))
    methods = [ArmConfig(name=name, method=kind()) for name, kind in METHODS.items()]
    configs = [toy("one", *arms, early_stopping=True), toy("two", *methods, seeds=1)]
    lines: list[str] = []
    interrupt = signal.getsignal(signal.SIGINT)
    queue = play(tmp_path, address, *configs, log=lines.append)

    assert (queue.over, queue.failures) == (True, 0)
    assert signal.getsignal(signal.SIGINT) is interrupt
    assert f"24 runs to do, {CPUS} at a time" in lines
    one, two = (read_study(tmp_path / name) for name in ("one", "two"))
    assert list(one.trials.number) == [0, 1, 2, 3, 0, 1, 2]
    assert set(one.trials.state) <= {"COMPLETE", "PRUNED"}
    assert set(one.finals.state) | set(two.finals.state) == {"COMPLETE"}
    assert list(one.finals.seed) == [1, 2] * (len(one.finals) // 2)
    assert {"dfkt", "dfkt-adjacent", "scratch"} <= set(one.finals.arm)
    assert list(two.finals.arm) == list(METHODS)
    assert two.finals.test_accuracy.notna().all()
    assert one.epochs.groupby(["arm", "number"])["index"].apply(lambda found: list(found) == [*range(len(found))]).all()
    assert sum(line.startswith("[") and "] two " in line for line in lines) == len(METHODS)
    for name in ("ray", "runs"):
        assert not list(tmp_path.glob(f"*/{name}"))


def test_a_process_that_dies_is_restarted_and_one_that_raises_says_why_without_a_word_of_rays(
    tmp_path: Path, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = toy("s", arm("scratch", 3), seeds=1)
    lines: list[str] = []
    queue = play(tmp_path, address, config, driver=faulty, log=lines.append)

    study = read_study(tmp_path / "s")
    assert list(study.trials.state) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert list(study.trials.attempts) == [2, 2, 1]
    assert list(study.epochs[study.epochs.number == 0]["index"]) == [0, 1, 2]
    assert study.trials.error[1] == "OSError: no way to the storage"
    again = "it starts again from its last checkpoint"
    assert {line for line in lines if again in line} == {
        f"scratch trial 0: {DIED}; {again}",
        f"scratch trial 1: OSError: no way to the storage; {again}",
    }
    (failed,) = (line for line in lines if "failed" in line)
    assert failed.endswith(
        f"] scratch trial 1: failed: OSError: no way to the storage; more in {tmp_path}/s/errors.txt"
    )
    assert (tmp_path / "s" / "errors.txt").read_text().count("OSError: no way\n") == 2  # once for each attempt
    assert capfd.readouterr() == ("", "")
    assert list(study.finals.state) == ["COMPLETE"]
    assert (queue.over, queue.failures) == (True, 1)


def test_a_study_whose_first_runs_fail_alike_ends_without_a_word_of_rays(
    tmp_path: Path, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    with pytest.raises(RunError, match=r"^the first 5 runs failed alike \(KeyError: 'x' \(mine.py:3\)\); mend that"):
        play(tmp_path, address, toy("s", arm("scratch", 50)), driver=hopeless, log=lines.append)
    assert capfd.readouterr() == ("", "")
    assert sum("failed" in line for line in lines) == ALIKE
    states = list(read_study(tmp_path / "s").trials.state)
    assert states.count("FAIL") == ALIKE
    assert len(states) <= ALIKE + CPUS  # those that ran on meanwhile have not failed
    assert set(states) <= {"FAIL", "RUNNING"}
    assert not (tmp_path / "s" / "ray").exists()


def test_ctrl_c_keeps_what_was_finished_and_leaves_the_rest_to_be_done(
    tmp_path: Path, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = toy("s", arm("scratch", 4), seeds=1)

    def interrupt(line: str) -> None:
        if line.startswith("[1/"):
            os.kill(os.getpid(), signal.SIGINT)

    queue = play(tmp_path, address, config, driver=patient, log=interrupt)
    assert capfd.readouterr() == ("", "")  # the command says that it was interrupted, and nobody else anything
    before = read_study(tmp_path / "s")
    assert not queue.over
    assert list(before.trials.state[:2]) == ["COMPLETE", "RUNNING"]
    assert "COMPLETE" not in list(before.trials.state[1:])
    assert not (tmp_path / "s" / "ray").exists()
    later = Queue([open_study(config, tmp_path)], print)
    handed = [later.next(), later.next()]
    assert [one and (one.number, one.final) for one in handed] == [(1, False), (2, False)]


MAIN = """
import sys
from pathlib import Path
from study.played import patient
from study.test_study import killed, play
play(Path(sys.argv[1]), sys.argv[2], killed(), driver=patient, log=lambda line: print(line, flush=True))
"""


def killed() -> StudyConfig:
    """The study whose main process is killed."""
    return toy("killed", arm("dfkt", 4), seeds=2)


def test_a_killed_study_goes_on_with_no_run_lost_or_doubled(tmp_path: Path, address: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tmp_path), address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not any(line.startswith("[1/6]") for line in process.stdout):
            raise AssertionError(process.stderr.read())
        process.kill()
    before = read_study(tmp_path / "killed")
    assert list(before.trials.state)[:2] == ["COMPLETE", "RUNNING"]
    running = before.trials.number[before.trials.state == "RUNNING"]

    queue = play(tmp_path, address, killed())
    after = read_study(tmp_path / "killed")
    assert (queue.over, queue.failures) == (True, 0)
    assert list(after.trials.number) == [0, 1, 2, 3]
    assert set(after.trials.state) | set(after.finals.state) == {"COMPLETE"}
    assert list(after.finals.seed) == [1, 2]
    pd.testing.assert_frame_equal(after.trials.head(1), before.trials.head(1))
    taken_up = after.trials[after.trials.number.isin(running)]
    assert (taken_up.attempts == 2).all()
    params = [name for name in before.trials if name.startswith("param_")]
    pd.testing.assert_frame_equal(taken_up[params], before.trials[before.trials.number.isin(running)][params])


TWO_ARMS = tiny("real", arm("scratch"), arm("dfkt", 2))


@pytest.fixture(scope="module")
def real(home: Path, address: str) -> Said:
    """A study that really trains: two trials of DFKT, a final run of it and one from scratch."""
    return run(home, address, TWO_ARMS)


def test_a_study_trains_searches_and_tests(real: Said, home: Path) -> None:
    study, (outcome, lines) = read_study(home / "real"), real
    assert outcome == Outcome((str(home / "real"),), False, 0)
    chosen = decided("auto", "cpu")
    assert study.meta["config"]["train"]["precision"] == study.meta["config"]["teacher"]["train"]["precision"] == chosen
    assert sum(line.startswith("networks in bfloat16") for line in lines) == (chosen == "bfloat16")
    assert list(study.trials.state) == ["COMPLETE", "COMPLETE"]
    assert study.trials.last_val_accuracy.between(0, 1).all()
    assert study.trials.param_pattern.notna().all()
    assert list(study.finals.arm) == ["scratch", "dfkt"]
    assert list(study.finals.state) == ["COMPLETE", "COMPLETE"]
    assert study.finals.test_accuracy.between(0, 1).all()
    assert set(study.trials.steps) | set(study.finals.steps) == {12}  # the same for all
    assert study.epochs[study.epochs.phase == "flow"].val_accuracy.isna().all()
    assert study.epochs.groupby("number")["index"].apply(lambda found: list(found) == [*range(len(found))]).all()
    assert 0 <= study.meta["teacher"]["test_accuracy"] <= 1
    assert len(study.meta["sessions"]) == 1
    assert sum(line.startswith("[") for line in lines) == 4


def test_a_winner_trained_with_the_trials_seed_would_be_the_trial_again(real: Said, home: Path) -> None:
    study = read_study(home / "real")
    best = study.meta["arms"]["dfkt"]["best"]
    won = study.trials[study.trials.number == best["trial"]].iloc[0]
    (final,) = study.finals[study.finals.arm == "dfkt"].to_dict("records")
    assert (best["key"], final["settings"]) == (won.key, won.settings)
    assert final["key"] != won.key
    assert (final["seed"], won.seed, final["images"], final["workers"]) == (1, 0, won["images"], won.workers)


def test_nothing_is_left_behind_but_the_study(real: Said, home: Path) -> None:
    names = {path.name for path in (home / "real").iterdir()}
    assert names == {".lock", "study.json", "teacher.pt", "optuna.journal", "students", *TABLES}
    files = sorted(
        str(path.relative_to(home / "real" / "students")) for path in (home / "real" / "students").rglob("*.*")
    )
    assert files == [f"{run}/{name}" for run in ("dfkt-seed1", "scratch-seed1") for name in sorted(PACKAGE_FILES)]
    assert not list((home / "real").rglob("state.pt"))


def test_moved_and_run_again_it_does_nothing_new(real: Said, home: Path, address: str, tmp_path: Path) -> None:
    shutil.copytree(home / "real", tmp_path / "real")
    (outcome, lines) = run(tmp_path, address, replace(TWO_ARMS, max_failures=0))
    assert (outcome.interrupted, outcome.failures) == (False, 0)
    assert same(read_study(tmp_path / "real"), read_study(home / "real"))
    assert lines == [line for line in lines if line.startswith(("digits: ", "teacher ", "the teacher's FSP matrices"))]
    assert not (tmp_path / "teachers").exists()


def test_later_trials_read_what_the_teacher_said_to_the_first_and_nothing_of_it_stays(home: Path, address: str) -> None:
    config = tiny(
        "kept", ArmConfig(name="kd", method=Kd(), trials=3), train=replace(TWO_ARMS.train, epochs=2), confirm=0
    )
    outcome, _ = run(home, address, config, workers=Workers(cpus=CPUS, gpus=0))  # one at a time
    study = read_study(home / "kept")
    assert not outcome.failures
    assert list(study.trials.kept_share) == [0, 1, 1]
    assert list(study.finals.kept_share) == [0]
    assert not list((home / "targets").iterdir())


def test_a_run_may_span_several_workers(real: Said, home: Path, address: str) -> None:
    config = tiny("spread", ArmConfig(name="kd", method=Kd()), train=replace(TWO_ARMS.train, epochs=2))
    outcome, _ = run(home, address, config, workers=Workers(count=2, gpus=0))
    study = read_study(home / "spread")
    (row,) = study.finals.to_dict("records")
    assert (outcome.failures, row["state"], row["workers"], row["attempts"]) == (0, "COMPLETE", 2, 1)
    assert (row["steps"], row["images"]) == (8, 8 * 64)
    assert list(study.final_epochs["index"]) == [0, 1]
    assert study.final_epochs.soft_loss.notna().all()
    assert (home / "spread" / "students" / "kd-seed1" / "config.json").exists()
    assert read_study(home / "real").meta["teacher"]["key"] == study.meta["teacher"]["key"]


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_users_code_raises_ends_its_run_at_once_and_says_where(count: int, tmp_path: Path, address: str) -> None:
    others = [arm("scratch")] if count == 1 else []  # a group takes half a minute to start
    config = tiny("raising", ArmConfig(name="raising", method=Raising()), *others, max_failures=2)
    outcome, lines = run(tmp_path, address, config, workers=Workers(count=count, gpus=0))
    failed, *good = read_study(tmp_path / "raising").finals.itertuples()
    assert (outcome.interrupted, outcome.failures) == (False, 1)
    assert [run.state for run in good] == ["COMPLETE" for _ in others]
    text = f"ValueError: a bug in the loss ({HERE}/study/raising.py:17)"
    assert (failed.attempts, failed.error) == (1, text)
    file = tmp_path / "raising" / "errors.txt"
    assert any(line.endswith(f"raising seed 1: failed: {text}; more in {file}") for line in lines)
    assert "ValueError: a bug\nin the loss\n" in file.read_text()


def test_more_than_the_cluster_has_is_refused_before_anything_is_written(home: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=f"3 workers of 1 CPU, each on one machine, but the cluster has {CPUS} CPU"):
        run(home, address, tiny("wide"), workers=Workers(count=3, gpus=0))
    assert not (home / "wide").exists()


def test_made_up_epochs_end_as_real_ones_do(tmp_path: Path) -> None:
    handed: Any = Queue([open_study(toy(), tmp_path)], print).next()
    *before, last = payloads(handed)
    assert [payload["complete"] for payload in (*before, last)] == [False, False, True]
