"""The page that a study prints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import Arm, trial, write_study

from dfkt.analysis.figures import read_figures, save_figures
from dfkt.analysis.pages import describe_settings, folder_page, study_page
from dfkt.store.study_store import Study, read_study

SEEDS = (1, 2)
FAST = (("flow", None), ("task", 0.7), ("task", 0.9), ("task", 0.9))
SCRATCH = Arm("scratch", {1: 0.80, 2: 0.82})
KD = Arm("kd", {1: 0.79, 2: 0.79})
OURS = Arm("dfkt", {1: 0.84, 2: 0.88}, FAST, [("COMPLETE", 0.5), ("COMPLETE", 0.7)], planned=2)


def study(folder: Path, *arms: Arm, **meta: Any) -> Study:
    write_study(folder / "made", arms, **meta)
    return read_study(folder / "made")


def cells(page: str, below: str) -> list[list[str]]:
    """Return the cells of the table below a line; columns are two blanks apart, and empty cells are gone."""
    lines = page.splitlines()
    rows = lines[lines.index(below) + 1 :]
    table = rows[: rows.index("")] if "" in rows else rows
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table]


def test_arms_stand_side_by_side_with_mean_and_standard_deviation(tmp_path: Path) -> None:
    table = cells(study_page(study(tmp_path, SCRATCH, KD, OURS)), "final runs:")

    head = "arm, seeds, test %, over scratch, gap closed, dfkt ahead by, p, val %, device s, epochs"
    assert table[0] == head.split(", ")
    assert table[1] == [
        "scratch", "2", "81.00 ± 1.41", "+5.00 [-20.45, +30.45]", "0.251", "80.00 ± 0.00", "30.0", "4",
    ]  # fmt: skip
    assert table[2][:5] == ["kd", "2", "79.00 ± 0.00", "-2.00", "-22 %"]
    assert table[3] == ["dfkt", "2", "86.00 ± 2.83", "+5.00", "56 %", "90.00 ± 0.00", "30.0", "4"]


def test_one_seed_has_neither_spread_nor_interval_nor_speed(tmp_path: Path) -> None:
    page = study_page(study(tmp_path, Arm("scratch", {1: 0.8}), Arm("dfkt", {1: 0.9})))

    assert "±" not in page.partition("test %: ")[0]
    assert "[" not in page.partition("test %: ")[0]
    assert "nan" not in page
    assert "until val accuracy" not in page
    assert cells(page, "final runs:")[2][:3] == ["dfkt", "1", "90.00"]


def test_without_scratch_nothing_stands_over_it_and_nothing_is_timed(tmp_path: Path) -> None:
    page = study_page(study(tmp_path, KD, OURS))

    assert "over scratch" not in cells(page, "final runs:")[0]
    assert "until val accuracy" not in page
    assert "nan" not in page


def test_without_dfkt_the_heading_names_the_arm_that_others_are_held_against(tmp_path: Path) -> None:
    arms = SCRATCH, replace(KD, curve=(("task", 0.9),)), Arm("fsp", {1: 0.9, 2: 0.95})

    assert "kd ahead by" in cells(study_page(study(tmp_path, *arms)), "final runs:")[0]


def test_the_speed_table_says_what_is_never_reached(tmp_path: Path) -> None:
    slow = Arm("kd", {1: 0.7, 2: 0.7}, (("task", 0.1), ("task", 0.2), ("task", 0.3), ("task", 0.4)))
    page = study_page(study(tmp_path, SCRATCH, slow, OURS))
    table = cells(page, "until val accuracy reaches 80.00 %, what scratch ends with:")

    assert table[0] == ["arm", "val % at the end", "steps", "training s", "of scratch's steps"]
    assert table[1:] == [
        ["scratch", "80.00", "40", "8.0", "1.00"],
        ["kd", "40.00", "never", "never"],
        ["dfkt", "90.00", "25", "5.0", "0.62"],
    ]


@pytest.mark.parametrize(("taught", "noted"), [(0.815, True), (0.78, True), (0.83, False), (None, False)])
def test_a_teacher_that_knows_hardly_more_than_scratch_is_noted(
    tmp_path: Path, taught: float | None, noted: bool
) -> None:
    teacher = {"key": "k", "network": "resnet26", "val_accuracy": 0.9, "test_accuracy": taught}
    page = study_page(study(tmp_path, SCRATCH, OURS, teacher=teacher))
    assert (
        f"the teacher has {100 * (taught or 0):.2f} % on test, scratch 81.00 %: it knows hardly more" in page
    ) == noted


def test_what_is_missing_failed_or_not_alike_is_noted(tmp_path: Path) -> None:
    arms = (
        SCRATCH,
        replace(KD, tests={1: 0.8, 2: None}),
        Arm("fsp"),
        OURS,
        Arm("dfkt-dense", parent="dfkt", skipped="so"),
    )
    longer = Arm("scratch-double", {1: 0.9}, SCRATCH.curve * 2, epochs=8, method="scratch")
    lines = study_page(study(tmp_path, *arms, longer)).splitlines()

    assert "not run, since so: dfkt-dense" in lines
    assert "no complete final run: fsp" in lines
    assert "failed, and in no table: kd seed 2" in lines
    assert "trained for another number of epochs: scratch-double (8)" in lines
    assert "at reference settings, not searched: scratch, kd, fsp, scratch-double" in lines


def test_ablations_stand_in_a_table_of_their_own_against_their_parent(tmp_path: Path) -> None:
    arms = SCRATCH, KD, Arm("kd-warm", {1: 0.9, 2: 0.91}, parent="kd"), OURS
    page = study_page(study(tmp_path, *arms))

    assert [row[0] for row in cells(page, "final runs:")] == ["arm", "scratch", "kd", "dfkt"]
    table = cells(page, "kd with one change:")
    assert [row[0] for row in table] == ["arm", "kd", "kd-warm"]
    assert "kd ahead by" in table[0]
    assert "kd-warm" not in page.partition("until val accuracy")[2]


def test_final_runs_that_all_failed_are_no_missing_ones(tmp_path: Path) -> None:
    assert study_page(study(tmp_path / "a", Arm("dfkt", {1: None}))).endswith("\n\nno final run is complete")
    assert study_page(study(tmp_path / "b", Arm("dfkt"))).endswith("\n\nno final runs yet")


def test_trials_are_counted_by_how_they_ended_and_the_best_come_first(tmp_path: Path) -> None:
    ended = [
        ("COMPLETE", 0.5),
        ("PRUNED", 0.99),
        ("COMPLETE", 0.7),
        ("FAIL", None),
        ("RUNNING", None),
        ("COMPLETE", 0.7),
    ]
    made = study(tmp_path, SCRATCH, replace(OURS, trials=ended))
    below = "dfkt: 6 trials: 3 complete, 1 stopped early, 1 failed, 1 unfinished"

    table = cells(study_page(made), below)
    assert table[0] == ["trial", "val %", "best %", "epochs", "device s", "settings"]
    assert [row[0] for row in table[1:]] == ["2", "5", "0"]
    assert table[1][1:5] == ["70.00", "70.00", "12.0", "60.4"]
    assert "task at 0.25" in table[1][5]
    assert [row[0] for row in cells(study_page(made, best=1), below)[1:]] == ["2"]


def test_of_several_searched_arms_each_shows_its_best_trial(tmp_path: Path) -> None:
    arms = [replace(SCRATCH, trials=[("COMPLETE", 0.3), ("FAIL", None)], planned=2), OURS, replace(KD, planned=2)]
    table = cells(study_page(study(tmp_path, *arms)), "")

    assert table[0][:4] == ["arm", "trials", "best", "val %"]
    assert table[1][:4] == ["scratch", "2: 1 complete, 1 failed", "0", "30.00"]
    assert table[2][:4] == ["dfkt", "2: 2 complete", "1", "70.00"]
    assert table[3] == ["kd", "0"]
    more = cells(study_page(read_study(tmp_path / "made"), best=2), "")
    assert [row[0] for row in more] == ["arm", "scratch", "dfkt", "0", "kd"]  # of dfkt, trial 1 and below it trial 0


def test_a_study_of_arms_that_were_not_searched_says_so(tmp_path: Path) -> None:
    lines = study_page(study(tmp_path, SCRATCH, KD)).splitlines()

    assert "no arm was searched" in lines
    assert "at reference settings, not searched: scratch, kd" in lines


def test_teacher_and_student_are_named(tmp_path: Path) -> None:
    tested, untested = study_page(study(tmp_path / "a", OURS)), study_page(study(tmp_path / "b", OURS, teacher={}))

    assert "\nteacher resnet26 (val 91.00 %, test 90.00 %)\n" in tested
    assert "teacher resnet26" not in untested
    assert "\nstudent resnet8; 4 epochs of batch 32; seeds 1, 2\n" in untested


def test_only_columns_that_are_there_are_explained(tmp_path: Path) -> None:
    page = study_page(study(tmp_path, Arm("kd", {1: 0.9})))

    assert "test %: " in page
    assert not any(f"{name}: " in page for name in ("gap closed", "ahead by", "p", "steps", "of scratch's steps"))


def test_saved_figures_have_the_same_page_but_for_what_they_keep_of_trials(tmp_path: Path) -> None:
    made = study(tmp_path, SCRATCH, KD, OURS)
    save_figures(read_figures(tmp_path / "made"), tmp_path / "saved")
    kept, whole = folder_page(tmp_path / "saved").splitlines(), study_page(made).splitlines()

    assert kept[kept.index("") + 2 :][:1] == ["trial  val %  device s  settings"]
    assert kept[6:] == whole[6:]
    assert "rate 0.25" in kept[4]


def test_several_studies_have_a_page_each(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_study(tmp_path / name, [SCRATCH, OURS])
    page = folder_page(tmp_path)

    assert page.startswith("one: Blobs")
    assert "\n\n\ntwo: Blobs" in page
    assert study_page(read_figures(tmp_path)).count("final runs:") == 2


# --- settings in a phrase


def test_a_trial_is_described_by_its_method() -> None:
    row = {"number": 0, "settings": json.dumps({"name": "kd", "rate": 0.2}), "param_rate": 0.2}

    assert describe_settings(row) == "rate 0.2, weight 0.9, temperature 4"


@pytest.mark.parametrize(
    ("settings", "params", "phrase"),
    [
        (
            {"name": "absent.module:Mine", "rate": 0.2},
            {"param_rate": 0.123456, "param_depth": 2},
            "rate 0.123, depth 2",
        ),
        ({"name": "absent.module:Mine", "rate": 0.2}, {}, "rate 0.2"),
        ({"name": "kd", "gone": 1}, {"param_rate": 0.5, "param_weight": None}, "rate 0.5"),
        ({"task_lr": 0.25}, {}, "task_lr 0.25"),
        (None, {"param_rate": 0.5}, "rate 0.5"),
    ],
    ids=["no such module", "and no parameters", "a setting that has gone", "saved figures", "no settings"],
)
def test_a_method_that_is_not_at_hand_is_described_by_its_parameters(settings: Any, params: Any, phrase: str) -> None:
    text = None if settings is None else json.dumps(settings)

    assert describe_settings({"number": 0, "settings": text} | params) == phrase


def test_the_last_line_says_which_student_to_take_and_val_alone_chooses_it(tmp_path: Path) -> None:
    flat = (("task", 0.9),)
    lucky = Arm("kd", {1: 0.99, 2: 0.99}, (("task", 0.5),))  # best by test, not by val
    page = study_page(study(tmp_path, lucky, replace(OURS, curve=flat)))

    assert page.splitlines()[-1].startswith("best by val: dfkt, test 86.00 %, -13.00 points to kd")
    assert page.endswith("its student that is best by val: students/dfkt-seed1")


def test_a_page_that_knows_its_studys_folder_names_the_students_in_full(tmp_path: Path) -> None:
    write_study(tmp_path / "some" / "made", [SCRATCH, OURS])
    last = f"best by val: {tmp_path}/some/made/students/dfkt-seed1"
    for folder in ("some/made", "some"):
        assert folder_page(tmp_path / folder).endswith(last.removeprefix("best by val: "))


def test_a_page_tells_what_teacher_and_student_cost_where_that_was_counted(tmp_path: Path) -> None:
    counts = {"parameters": 853_018, "macs": 125_485_696, "bytes": 3 * 2**20}
    cost = {"teacher": counts, "student": counts | {"parameters": 269_722, "macs": None, "bytes": 2**20}}
    page = study_page(study(tmp_path / "a", SCRATCH, OURS, cost=cost))
    assert cells(page, "what they cost:") == [
        ["network", "parameters", "MACs", "MiB", "test %"],
        ["teacher resnet26", "0.853 M", "125 M", "3", "90.00"],
        ["student resnet8", "0.27 M", "1", "86.00"],
    ]
    assert "MACs: multiply-accumulates of one image's forward pass" in page.replace("\n", " ")
    assert "what they cost" not in study_page(study(tmp_path / "b", SCRATCH, OURS))
    assert study_page(study(tmp_path / "c", Arm("scratch"), cost=cost)).endswith("no final runs yet")


def test_a_page_shows_how_early_stopping_did_and_what_the_columns_mean(tmp_path: Path) -> None:
    store = write_study(tmp_path / "made", [OURS])
    rows = [(0, "COMPLETE", 0.1), (1, "COMPLETE", 0.2), (2, "PRUNED", 0.05), (3, "COMPLETE", 0.3), (4, "COMPLETE", 0.4)]
    for number, state, at_rung in rows:
        place = {"index": 0, "epoch": 1.0, "phase": "task", "step": 1, "images": 9, "rung": 0.5, "rung_epoch": 1.0}
        row = trial(number, "dfkt", state, None if state == "PRUNED" else 0.5 + number / 10)
        store.save("trial", "dfkt", row, [place | {"rung_accuracy": at_rung}])
    page = study_page(read_study(tmp_path / "made"))

    assert cells(page, "early stopping:") == [
        ["arm", "rung", "trials there", "stopped", "ran through", "rank"],
        ["dfkt", "0.5", "5", "1", "4", "1.00"],
    ]
    assert "rank: Spearman's rank correlation" in page.replace("\n", " ")
    assert "early stopping" not in study_page(study(tmp_path / "none", SCRATCH, OURS))


def test_a_small_val_split_is_said_to_be_small(tmp_path: Path) -> None:
    page = study_page(study(tmp_path, SCRATCH, OURS))  # 10 images, the best trial at 70 %
    assert "val is small: of 10 images, 70.0 % are known to ±14.5 points (standard error)." in page
    large = study_page(study(tmp_path / "large", SCRATCH, OURS, data={"title": "Blobs", "train": 90, "val": 10_000}))
    unsearched = study_page(study(tmp_path / "plain", SCRATCH, KD))
    assert "val is small" not in large + unsearched


def test_confirmed_trials_stand_first_with_what_the_other_seed_gave(tmp_path: Path) -> None:
    store = write_study(tmp_path / "made", [OURS])  # trials 0 and 1 at 50 and 70 %
    assert "again %" not in study_page(read_study(tmp_path / "made"))
    for number, accuracy in ((0, 0.8), (1, 0.4)):
        store.save("confirmation", "dfkt", trial(number, "dfkt", "COMPLETE", accuracy))
    page = study_page(read_study(tmp_path / "made"))

    head, first, second = cells(page, "dfkt: 2 trials: 2 complete")
    assert head[:3] == ["trial", "val %", "again %"]
    assert (first[:3], second[:3]) == (["0", "50.00", "80.00"], ["1", "70.00", "40.00"])
    assert "again %: val accuracy of the same settings with another seed" in page.replace("\n", " ")
