"""Who is ahead is said as far as it is shown, with what it costs."""

from pathlib import Path

import pytest
from made import Arm, write_study

from dfkt.analysis.figures import study_figures
from dfkt.analysis.verdict import device_seconds, judge, sentence
from dfkt.store.study_store import read_study
from dfkt.students.cost import Cost, Latency

HIGH = (("task", 0.5), ("task", 0.9))
LOW = (("task", 0.5), ("task", 0.8))
LEAST = (("task", 0.5), ("task", 0.7))
BEST = Arm("dfkt", {1: 0.90, 2: 0.91, 3: 0.92}, HIGH, [("COMPLETE", 0.5)], planned=1)


def said(folder: Path, *arms: Arm, costs: tuple[Cost, ...] = (), spent: bool = False) -> str:
    write_study(folder / "made", arms)
    study = read_study(folder / "made")
    return sentence(study_figures({"blobs": study}), "blobs", costs, device_seconds(study) if spent else None)


def test_a_difference_that_is_shown_names_who_is_ahead_and_how_sure_that_is(tmp_path: Path) -> None:
    text = said(tmp_path, Arm("kd", {1: 0.85, 2: 0.859, 3: 0.87}, LOW), BEST)
    assert text.startswith("dfkt is ahead: the best by val, it has 91.00 % on test over 3 seeds, +5.03 points [")
    assert "] to kd, the next by val, p < 0.001" in text


def test_a_difference_within_chance_is_not_called_one(tmp_path: Path) -> None:
    text = said(tmp_path, Arm("kd", {1: 0.92, 2: 0.90, 3: 0.89}, LOW), BEST)
    assert text.startswith(
        "No difference shown: dfkt, the best by val, has 91.00 % on test over 3 seeds, +0.67 points ["
    )


def test_an_arm_that_val_did_not_choose_is_said_to_be_ahead_where_it_is(tmp_path: Path) -> None:
    text = said(tmp_path, Arm("kd", {1: 0.95, 2: 0.961, 3: 0.97}, LOW), BEST)
    assert text.startswith("kd is ahead: dfkt, the best by val, has 91.00 % on test over 3 seeds, -5.03 points [")


def test_the_other_arms_are_told_by_what_is_shown_of_them(tmp_path: Path) -> None:
    arms = (
        Arm("kd", {1: 0.92, 2: 0.90, 3: 0.89}, LOW),
        Arm("fsp", {1: 0.80, 2: 0.809, 3: 0.82}, LEAST),
        Arm("dkd", {1: 0.98, 2: 0.989, 3: 1.0}, LEAST),
        Arm("scratch", {1: 0.95, 2: 0.91, 3: 0.88}, LEAST),
    )
    text = said(tmp_path, *arms, BEST)
    assert "it is ahead of fsp; it is behind dkd; no difference is shown to scratch." in text


@pytest.mark.parametrize("tests", [{1: 0.9}, {1: 0.8, 2: 0.8}])
def test_what_seeds_cannot_show_is_said_so(tmp_path: Path, tests: dict[int, float]) -> None:
    ours = Arm("dfkt", dict.fromkeys(tests, 0.95), HIGH)
    text = said(tmp_path, Arm("kd", tests, LOW), ours)
    assert text.startswith("Such runs can show no difference: dfkt, the best by val, has 95.00 %")
    assert "p " not in text
    assert "nan" not in text


def test_a_single_arm_has_nothing_beside_it(tmp_path: Path) -> None:
    assert said(tmp_path, BEST) == "Nothing stands beside dfkt, which has 91.00 % on test over 3 seeds."


def test_without_final_runs_there_is_no_verdict(tmp_path: Path) -> None:
    assert said(tmp_path, Arm("dfkt"), Arm("kd", {1: None})) == "No verdict yet: no final run is complete."


def test_the_cost_is_the_students_beside_the_teachers_and_what_was_spent_on_the_arm(tmp_path: Path) -> None:
    costs = (
        Cost("teacher resnet26", 366_000, latencies={1: Latency(2, 1, 3), 64: Latency(0.25, 0.1, 0.3)}),
        Cost("student resnet8", 75_000, latencies={1: Latency(1, 0.5, 2), 64: Latency(0.125, 0.1, 0.2)}),
    )
    text = said(tmp_path, Arm("kd", {1: 0.92, 2: 0.90, 3: 0.89}, LOW), BEST, costs=costs, spent=True)
    cost = "it costs 75 k parameters (teacher: 0.366 M), 0.125 ms an image in batches of 64 (teacher: 0.25), "
    assert text.endswith(f"; {cost}150 device seconds, 60 of them for a search.")


def test_the_time_of_the_teachers_training_stands_beside_the_arms(tmp_path: Path) -> None:
    known = {"key": "k", "network": "resnet26", "val_accuracy": 0.91, "test_accuracy": 0.9, "seconds": 300.0}
    write_study(tmp_path / "timed", (BEST,), teacher=known)
    study = read_study(tmp_path / "timed")
    text = sentence(study_figures({"blobs": study}), "blobs", (), device_seconds(study))
    assert text.endswith("150 device seconds, 60 of them for a search; the teacher's training took 300 s.")


def test_device_seconds_are_those_of_search_and_final_runs(tmp_path: Path) -> None:
    write_study(tmp_path / "made", [Arm("kd", {1: 0.9}), BEST])
    spent = device_seconds(read_study(tmp_path / "made"))
    assert spent["kd"].to_dict() == {"search": 0, "finals": 30}
    assert spent["dfkt"].to_dict() == {"search": pytest.approx(60.4), "finals": 90}


def test_ablations_are_not_judged(tmp_path: Path) -> None:
    write_study(tmp_path / "made", [Arm("dfkt", {1: 0.9}, LOW), Arm("dfkt-dense", {1: 0.95}, HIGH, parent="dfkt")])
    found = judge(study_figures({"blobs": read_study(tmp_path / "made")}), "blobs")
    assert found is not None
    assert (found.best, found.rival) == ("dfkt", None)


def test_an_arm_that_shares_no_seed_with_the_best_is_not_compared(tmp_path: Path) -> None:
    apart, scratch = Arm("kd", {4: 0.92}, LOW), Arm("scratch", {1: 0.80, 2: 0.809, 3: 0.82}, LEAST)
    text = said(tmp_path, apart, scratch, BEST)
    assert text.startswith("dfkt is ahead: the best by val")
    assert "to scratch, the next by val" in text
    assert text.endswith("; it has no seed in common with kd.")
    alone = said(tmp_path / "alone", apart, BEST)
    assert alone.startswith(
        "Nothing stands beside dfkt, which has 91.00 % on test over 3 seeds; it has no seed in common"
    )
