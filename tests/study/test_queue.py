"""Runs come in an order in which no machine waits; run again, a study does what is missing, and nothing twice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from study.played import ABOUT, TAPS, Played, arm, told, toy, with_seeds

from dfkt.config import DataConfig, Placement, TeacherConfig
from dfkt.errors import StudyError
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.kd import Kd
from dfkt.methods.registry import METHODS
from dfkt.study.config import ABLATIONS, ArmConfig, StudyConfig, ablations
from dfkt.study.driver import Run
from dfkt.study.opened import OpenStudy
from dfkt.study.opening import check_store, open_store
from dfkt.study.queue import Queue

TABLES = ("trials", "epochs", "confirmations", "finals", "final_epochs")
SEARCHED = arm("dfkt", 2)


def same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True))
    return True


def about(run: Played, name: str, study: int = 0) -> dict[str, Any]:
    """Return what ``study.json`` says of an arm."""
    found: dict[str, Any] = run.store(study).meta["arms"][name]
    return found


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
def test_every_arm_gets_its_trials_and_then_its_seeds_and_no_more(slots: int, tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch", 2), arm("kd", 3, method=Kd()), arm("plain")))
    assert run.queue.total == 2 + 3 + 3 * 2
    run.run(slots)

    study = run.study()
    assert list(zip(study.trials.arm, study.trials.number, strict=True)) == [
        ("scratch", 0), ("scratch", 1), ("kd", 0), ("kd", 1), ("kd", 2),
    ]  # fmt: skip
    assert list(zip(study.finals.arm, study.finals.seed, strict=True)) == [
        (name, seed) for name in ("scratch", "kd", "plain") for seed in (1, 2)
    ]
    assert set(study.trials.state) | set(study.finals.state) == {"COMPLETE"}
    assert study.finals.test_accuracy.notna().all()
    assert (len(study.epochs), len(study.final_epochs)) == (3 * 5, 3 * 6)
    assert (run.queue.over, run.queue.failures, len(run.lines)) == (True, 0, 11)


def test_trials_of_any_study_and_arm_come_before_final_runs_of_any(tmp_path: Path) -> None:
    configs = [toy(name, arm("plain"), arm("dfkt", 2), arm("scratch", 1)) for name in ("one", "two")]
    handed = Played(tmp_path, *configs).run().handed
    assert [run.final for run in handed] == [False] * 6 + [True] * 12
    assert len({run.id for run in handed}) == len(handed)


def test_studies_in_one_queue_are_kept_apart_and_lines_name_theirs(tmp_path: Path) -> None:
    configs = [toy("one", arm("dfkt", 1)), toy("two", arm("dfkt", 1), train=replace(toy().train, epochs=2))]
    run = Played(tmp_path, *configs).run(slots=4)
    assert list(run.study(0).finals.epochs) == [3, 3]
    assert list(run.study(1).finals.epochs) == [2, 2]
    assert [line.split("] ")[1].partition(":")[0] for line in run.lines] == [
        "one dfkt trial 0", "two dfkt trial 0", "one dfkt seed 1", "one dfkt seed 2", "two dfkt seed 1", "two dfkt seed 2",
    ]  # fmt: skip
    alone = Played(tmp_path / "alone", configs[0]).run()
    assert alone.lines[0].startswith("[1/3] dfkt trial 0: ")


def test_while_an_arms_last_trial_runs_the_next_arm_begins(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("one", 2), arm("two", 1)))
    first, last, other = (run.ask() for _ in range(3))
    assert run.told() == ["one trial 0", "one trial 1", "two trial 0"]
    run.end(first)
    assert (run.ask(), run.finished) == (None, False)
    run.end(other)
    assert run.ask() is not None
    assert run.told()[-1] == "two seed 1"
    run.end(last)
    assert run.ask() is not None
    assert run.told()[-1] == "one seed 1"


def test_with_all_handed_out_it_is_finished_only_when_nothing_runs_any_more(tmp_path: Path) -> None:
    run = Played(tmp_path, with_seeds(toy("s", arm("one", 1)), 1))
    trial = run.ask()
    assert (run.ask(), run.finished) == (None, False)
    run.end(trial)
    final = run.ask()
    assert (run.ask(), run.finished, run.queue.over) == (None, False, False)
    run.end(final)
    assert (run.ask(), run.finished, run.queue.over) == (None, True, True)


def test_the_winner_is_the_best_complete_trial_and_its_final_runs_differ_by_their_seed_alone(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("dfkt", 4)), judge=lambda run: (0.1, 0.7, 0.9, 0.5)[run.number % 4])
    trials = [run.ask() for _ in range(4)]
    run.fail(trials[2])
    for trial in (trials[3], trials[0], trials[1]):
        run.end(trial)
    run.run()
    best = about(run, "dfkt")["best"]
    assert best["trial"] == 1
    won = trials[1].config["run"]
    finals = [handed for handed in run.handed if handed.final]
    assert [final.job.config.train.seed for final in finals] == [1, 2]
    assert all(final.job.config.method == won.job.config.method for final in finals)
    assert all(final.params == won.params for final in finals)
    assert [final.job.test for final in finals] == [True, True]
    assert not won.job.test
    assert list(run.study().finals.key) == about(run, "dfkt")["finals"] == [final.job.config.key for final in finals]


def test_only_runs_of_a_taught_method_are_given_a_teacher(tmp_path: Path) -> None:
    handed = Played(tmp_path, toy("s", arm("scratch", 1), arm("dfkt", 1))).run().handed
    assert {(run.arm, run.job.teacher) for run in handed} == {("scratch", None), ("dfkt", str(tmp_path / "s"))}


def test_all_methods_without_a_search_fill_the_table(tmp_path: Path) -> None:
    arms = [ArmConfig(name=name, method=kind()) for name, kind in METHODS.items()]
    run = Played(tmp_path, toy("s", *arms)).run(slots=3)
    study = run.study()
    assert list(study.finals.arm) == [name for name in METHODS for _ in (1, 2)]
    assert list(study.finals.method) == list(study.finals.arm)
    assert study.finals.test_accuracy.notna().all()
    assert len(study.trials) == 0
    assert not (tmp_path / "s" / "optuna.journal").exists()


@pytest.mark.parametrize(("limit", "slots"), [(0, 1), (1, 3), (3, 2), (5, 3), (9, 1), (12, 2)])
def test_a_killed_study_run_again_does_what_is_missing_and_nothing_twice(
    limit: int, slots: int, tmp_path: Path
) -> None:
    config = toy("s", arm("scratch", 2), arm("dfkt", 2), *ablations(SEARCHED, ["adjacent", "no-flow"]), arm("plain"))
    first = Played(tmp_path, config).run(slots, limit)  # then the main process is killed
    before = first.study()
    later = Played(tmp_path, config).run(slots)

    assert later.queue.over
    assert len(later.handed) == 14 - limit
    study = later.study()
    assert [list(study.trials.number), list(study.finals.number)] == [[0, 1, 0, 1], [0, 1] * 5]
    assert set(study.trials.state) | set(study.finals.state) == {"COMPLETE"}
    assert study.epochs.groupby(["arm", "number"]).size().eq(3).all()
    for name in ("trials", "finals"):
        old, new = getattr(before, name), getattr(study, name)
        done = old[old.state == "COMPLETE"]
        keys = set(zip(done.arm, done.number, strict=True))
        kept = new[[key in keys for key in zip(new.arm, new.number, strict=True)]]
        assert same(done, kept)
        begun = set(zip(old.arm[old.state == "RUNNING"], old.number[old.state == "RUNNING"], strict=True))
        again = new[[key in begun for key in zip(new.arm, new.number, strict=True)]]
        assert list(again.attempts) == [2] * len(begun)


def test_interrupted_runs_come_again_with_number_parameters_and_key(tmp_path: Path) -> None:
    config = toy("s", arm("dfkt", 4))
    first = Played(tmp_path, config)
    ended, *interrupted = (first.ask() for _ in range(3))
    first.end(ended)

    later = Played(tmp_path, config)
    again = [later.ask() for _ in range(2)]
    assert [trial.config for trial in again] == [trial.config for trial in interrupted]
    new = later.ask()
    assert new.config["run"].number == 3
    for trial in (*again, new):
        later.end(trial)
    assert list(later.study().trials.attempts) == [1, 2, 2, 1]


def test_a_finished_study_run_again_hands_out_nothing_and_changes_nothing(tmp_path: Path) -> None:
    config = toy("s", arm("scratch"), arm("dfkt", 2), *ablations(SEARCHED, ["adjacent", "dense"]))
    before = Played(tmp_path, config).run().study()
    again = Played(tmp_path, config)
    assert (again.queue.over, again.queue.total) == (True, 0)  # so no cluster is asked for anything
    again.run()
    assert again.handed == []
    after = again.study()
    assert all(same(getattr(before, name), getattr(after, name)) for name in TABLES)
    assert after.meta["arms"] == before.meta["arms"]
    assert len(after.meta["sessions"]) == 2


def test_more_trials_seeds_and_arms_are_added_to_those_there_are(tmp_path: Path) -> None:
    before = Played(tmp_path, toy("s", arm("scratch", 1), seeds=1)).run().study()
    config = toy("s", arm("scratch", 3), arm("dfkt", 2), arm("kd", method=Kd()), seeds=2)
    run = Played(tmp_path, config, judge=lambda run: 0.9 if run.number == 0 and run.arm == "scratch" else 0.1).run()
    after = run.study()
    assert sorted(run.told()) == sorted(
        ["scratch trial 1", "scratch trial 2", "dfkt trial 0", "dfkt trial 1", "scratch seed 2"]
        + [f"{name} seed {seed}" for name in ("dfkt", "kd") for seed in (1, 2)]
    )
    for name in TABLES:
        old, new = getattr(before, name), getattr(after, name)
        kept = new[(new.arm == "scratch") & (new.number == 0)]
        assert same(old, kept[old.columns])
        assert kept[[column for column in new.columns if column not in old.columns]].isna().all(axis=None)
    assert len(set(after.trials.columns) - set(before.trials.columns)) > 10
    assert [entry["name"] for entry in after.meta["config"]["arms"]] == ["scratch", "dfkt", "kd"]


def test_what_was_added_is_seen_by_tools_that_know_nothing_of_studies(tmp_path: Path) -> None:
    Played(tmp_path, toy("s", arm("scratch", 1))).run()
    run = Played(tmp_path, toy("s", arm("scratch", 1), arm("dfkt", 1), arm("kd", 1, method=Kd()))).run()
    plain = pd.read_parquet(tmp_path / "s" / "trials")
    assert set(plain.columns) == set(run.study().trials.columns)
    assert plain.set_index("arm").param_family.dropna().to_dict() == {"dfkt": "dense"}
    assert plain.set_index("arm").param_weight.notna().to_dict() == {"scratch": False, "dfkt": False, "kd": True}
    epochs = pd.read_parquet(tmp_path / "s" / "epochs")
    assert {"task_loss", "flow_loss", "soft_loss"} <= set(epochs.columns)


def test_an_arm_left_out_of_a_later_run_stays(tmp_path: Path) -> None:
    before = Played(tmp_path, toy("s", arm("scratch", 1), arm("dfkt", 1))).run().study()
    run = Played(tmp_path, toy("s", arm("kd", method=Kd()))).run()
    after = run.study()
    assert run.told() == ["kd seed 1", "kd seed 2"]
    assert [entry["name"] for entry in after.meta["config"]["arms"]] == ["scratch", "dfkt", "kd"]
    assert same(before.finals, after.finals[after.finals.arm != "kd"])


def moved(config: StudyConfig, data: str) -> StudyConfig:
    return replace(config, data=DataConfig(name=data), teacher=TeacherConfig(checkpoint=f"{data}/teacher.pt"))


def test_moved_images_teachers_and_checkpoints_redo_nothing(tmp_path: Path) -> None:
    config = toy("s", arm("scratch"), arm("dfkt", 2))
    before = Played(tmp_path, moved(config, "/old/place/flowers")).run().study()
    there = moved(config, "/new/flowers")

    storage = Played(tmp_path, there).store().storage
    check_store(there, storage, ABOUT)
    elsewhere = Placement(data_root="/new", teacher_root="/new/teachers", checkpoint_every=7)
    store = open_store(there, storage, ABOUT, TAPS)
    queue = Queue([OpenStudy(there, store, elsewhere, TAPS)], print)
    assert queue.over
    more = Played(tmp_path, with_seeds(there, 3)).run()
    assert more.told() == ["scratch seed 3", "dfkt seed 3"]
    finals = more.study().finals
    assert same(before.finals, finals[finals.seed < 3])
    with pytest.raises(StudyError, match=r"data\.name was 'folder flowers', is 'folder trees'"):
        Played(tmp_path, moved(config, "/new/trees"))


def judge_by_rounds(run: Run) -> float:
    """Runs of two rounds are the best."""
    method = run.job.config.method
    return 0.9 if isinstance(method, Dfkt) and method.rounds == 2 else 0.5 - run.number / 1e3


ONES = ("adjacent", "one-round", "two-rounds", "dense")


def test_another_winner_has_final_runs_of_its_own_and_the_old_ones_stay(tmp_path: Path) -> None:
    def config(trials: int) -> StudyConfig:
        searched = arm("dfkt", trials)
        return toy("s", searched, *ablations(searched, ONES))

    first = Played(tmp_path, config(2), judge=judge_by_rounds).run()
    before = first.study()
    assert about(first, "dfkt-one-round")["skipped"] == "dfkt is that already"
    run = Played(tmp_path, config(8), judge=judge_by_rounds).run(slots=2)
    after = run.study()

    assert about(run, "dfkt")["best"]["method"]["rounds"] == 2  # among so many trials there is one
    for name in ("dfkt", "dfkt-adjacent"):
        old, new = (study.finals[study.finals.arm == name] for study in (before, after))
        assert same(old, new[new.number < 2])
        assert list(new.seed) == [1, 2, 1, 2]
        assert about(run, name)["present"] == [2, 3]
        assert about(run, name)["finals"] == list(new.key)
    assert about(run, "dfkt-one-round")["skipped"] is None  # taken up, since it differs now
    assert list(after.finals.seed[after.finals.arm == "dfkt-one-round"]) == [1, 2]
    assert about(run, "dfkt-two-rounds")["skipped"] == "dfkt is that already"
    assert about(run, "dfkt-two-rounds")["present"] == []  # what ran before was another winner's
    assert len(after.finals[after.finals.arm == "dfkt-two-rounds"]) == 2
    again = Played(tmp_path, config(8), judge=judge_by_rounds)
    assert again.queue.over


def test_an_ablation_waits_for_its_parents_winner_and_is_that_with_one_change(tmp_path: Path) -> None:
    run = Played(tmp_path, with_seeds(toy("s", SEARCHED, *ablations(SEARCHED)), 1), judge=judge_by_rounds)
    trials = [run.ask(), run.ask()]
    assert (run.ask(), run.finished) == (None, False)
    run.end(trials[0])
    assert (run.ask(), run.finished) == (None, False)
    run.end(trials[1])
    run.run()
    won = trials[0].config["run"].job.config.method
    assert told(run.handed[2]) == "dfkt seed 1"
    skipped = {name for name in ABLATIONS if about(run, f"dfkt-{name}")["skipped"]}
    assert skipped == {"dense", "sequential", "one-round", "equal-weights", "labels-only"}
    for config in run.queue.studies[0].config.arms[1:]:
        handed = [handed.job.config.method for handed in run.handed if handed.arm == config.name]
        short = config.name.removeprefix("dfkt-")
        assert handed == ([] if short in skipped else [config.of(won)])
    assert f"dfkt-dense: {about(run, 'dfkt-dense')['skipped']}" in run.lines


def test_an_ablation_of_an_ablation_has_both_changes(tmp_path: Path) -> None:
    grand = ArmConfig(name="both", method=Dfkt(), parent="dfkt-adjacent", change={"rounds": 2})
    run = Played(tmp_path, toy("s", SEARCHED, *ablations(SEARCHED, ["adjacent"]), grand)).run()
    method = next(handed.job.config.method for handed in run.handed if handed.arm == "both")
    assert isinstance(method, Dfkt)
    assert (method.pattern, method.rounds) == ("adjacent", 2)


def test_an_ablation_of_length_alone_is_one(tmp_path: Path) -> None:
    longer = ArmConfig(name="longer", method=Dfkt(), parent="dfkt", epochs=6)
    run = Played(tmp_path, toy("s", SEARCHED, longer)).run()
    assert about(run, "longer")["skipped"] is None
    assert [handed.job.config.train.epochs for handed in run.handed if handed.arm == "longer"] == [6, 6]


def test_without_a_complete_trial_an_arm_and_its_ablations_are_skipped_with_the_reason(tmp_path: Path) -> None:
    config = toy("s", arm("dfkt", 1), *ablations(SEARCHED, ["adjacent"]), arm("plain"))
    run = Played(tmp_path, config)
    run.fail(run.ask())
    run.run()
    assert run.told() == ["dfkt trial 0", "plain seed 1", "plain seed 2"]
    assert "no trial was completed" in about(run, "dfkt")["skipped"]
    assert about(run, "dfkt-adjacent")["skipped"] == "dfkt has no complete trial"
    assert any(line.startswith("dfkt: no trial was completed") for line in run.lines)
    assert (run.queue.over, run.queue.failures) == (True, 1)

    later = Played(tmp_path, replace(config, arms=(arm("dfkt", 2), *config.arms[1:]))).run()
    assert "dfkt-adjacent seed 2" in later.told()
    assert about(later, "dfkt-adjacent")["skipped"] is None


def test_a_change_that_does_not_fit_the_winner_is_skipped_and_the_others_go_on(tmp_path: Path) -> None:
    odd = ArmConfig(name="odd", method=Dfkt(), parent="dfkt", change={"pattern": "dense-9"})
    run = Played(tmp_path, toy("s", SEARCHED, odd, arm("plain"))).run()
    assert "dense-9" in about(run, "odd")["skipped"]
    assert run.told()[-1] == "plain seed 2"


def test_a_lost_final_run_is_a_failure_and_is_done_by_the_next_run(tmp_path: Path) -> None:
    config = toy("s", arm("plain"))
    run = Played(tmp_path, config)
    run.die(run.ask())
    run.run()
    assert (run.queue.over, run.queue.failures, run.finished) == (True, 1, True)
    assert list(run.study().finals.state) == ["RUNNING", "COMPLETE"]

    again = Played(tmp_path, config)
    assert (again.queue.over, again.queue.total) == (False, 1)
    again.run()
    assert (again.told(), again.queue.failures) == (["plain seed 1"], 0)
    assert list(again.study().finals.state) == ["COMPLETE", "COMPLETE"]
    assert list(again.study().finals.attempts) == [2, 1]


def test_failures_of_earlier_runs_count_and_are_not_repeated(tmp_path: Path) -> None:
    config = toy("s", arm("scratch", 2))
    run = Played(tmp_path, config)
    run.fail(run.ask())
    run.run(limit=1)
    run.fail(run.ask())
    run.run()
    again = Played(tmp_path, config)
    assert (again.queue.over, again.queue.failures) == (True, 2)


def test_with_fewer_trials_than_there_are_nothing_is_undone(tmp_path: Path) -> None:
    before = Played(tmp_path, toy("s", arm("scratch", 3))).run().study()
    again = Played(tmp_path, toy("s", arm("scratch", 1), seeds=1))
    assert again.queue.over
    assert same(before.trials, again.study().trials)
    assert same(before.finals, again.study().finals)
    assert about(again, "scratch")["present"] == [0]


def rated(run: Run) -> float:
    """Later trials look better in the search; by another seed trial 2 is best."""
    if run.kind == "confirmation":
        return {2: 0.9, 3: 0.3, 4: 0.4}[run.number]
    return 0.5 + run.number / 100


def test_the_best_trials_are_trained_again_with_another_seed_and_the_winner_is_chosen_by_both(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch", 5), seeds=1, confirm=3), judge=rated)
    assert run.queue.total == 5 + 3 + 1
    run.run(slots=3)

    assert run.told()[5:] == [
        "scratch trial 4 again",
        "scratch trial 3 again",
        "scratch trial 2 again",
        "scratch seed 1",
    ]
    again = run.study().confirmations
    assert list(again.number) == [2, 3, 4]
    assert set(again.seed) == {1_000_000}
    assert list(again.last_val_accuracy) == pytest.approx([0.9, 0.3, 0.4])
    assert again.param_rate.tolist() == run.study().trials.param_rate[2:].tolist()
    assert not set(again.key) & set(run.study().trials.key)
    assert run.store().meta["arms"]["scratch"]["best"]["trial"] == 2
    assert run.study().finals.settings.tolist() == [run.study().trials.settings[2]]
    assert any(line.startswith("[6/9] scratch trial 4 again: val 40.00 %") for line in run.lines)


def test_confirmations_are_not_done_twice_and_only_for_those_that_a_longer_search_brings(tmp_path: Path) -> None:
    def by_number(run: Run) -> float:
        return 0.5 + run.number / 100

    config = toy("s", arm("scratch", 4), seeds=1, confirm=2)
    Played(tmp_path, config, judge=by_number).run(limit=5)  # one confirmation of two
    second = Played(tmp_path, config, judge=by_number).run()
    assert second.told() == ["scratch trial 2 again", "scratch seed 1"]
    longer = Played(tmp_path, toy("s", arm("scratch", 5), seeds=1, confirm=2), judge=by_number).run()
    assert longer.told() == ["scratch trial 4", "scratch trial 4 again", "scratch seed 1"]
    assert Played(tmp_path, toy("s", arm("scratch", 5), seeds=1, confirm=2), judge=by_number).run().told() == []


def test_a_confirmation_has_its_trials_parameters_whole_numbers_and_truth_values_too(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("dfkt", 6), seeds=1, confirm=6)).run()
    trials, again = run.store().rows("trial", "dfkt"), run.store().rows("confirmation", "dfkt")
    names = [name for name in trials[0] if name.startswith("param_")]

    assert {type(row["param_rounds"]) for row in trials} == {int, type(None)}  # so pandas holds them as floats
    assert [[row[name] for name in names] for row in again] == [[row[name] for name in names] for row in trials]


def test_a_single_complete_trial_is_not_confirmed(tmp_path: Path) -> None:
    assert Played(tmp_path, toy("s", arm("scratch", 1), seeds=1, confirm=3)).run().told() == [
        "scratch trial 0",
        "scratch seed 1",
    ]


def test_a_confirmation_that_failed_leaves_its_trial_behind_those_that_held(tmp_path: Path) -> None:
    run = Played(tmp_path, toy("s", arm("scratch", 2), seeds=1, confirm=2), judge=lambda run: 0.5 + run.number / 10)
    for _ in range(2):
        run.end(run.ask())
    run.fail(run.ask())  # trial 1, the better one
    run.run()
    assert run.store().meta["arms"]["scratch"]["best"]["trial"] == 0
    assert run.queue.failures == 1


def test_what_a_confirmation_reports_is_not_told_to_optuna_and_never_stops_it(tmp_path: Path) -> None:
    config = toy(
        "s", arm("scratch", 3), seeds=1, confirm=2, early_stopping=True, rungs=(1 / 3,), least_epochs=0.0, spared=1.0
    )
    run = Played(tmp_path, config, judge=lambda run: 0.1 if run.kind == "confirmation" else 0.9 - run.number / 10).run()
    assert list(run.study().confirmations.state) == ["COMPLETE"] * 2
    values = [trial.value for trial in run.queue.arms[run.store().storage.path, "scratch"].search.optuna.trials]
    assert values == pytest.approx([0.9, 0.8, 0.7])
