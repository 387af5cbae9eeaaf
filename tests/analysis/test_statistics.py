"""Arms side by side: what their figures are, how they are stored, and the page that shows them."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from conftest import load_script

from dfkt.analysis.statistics import (
    Comparison,
    accuracy_table,
    comparison_report,
    load_comparison,
    mean_interval,
    read_comparison,
    save_comparison,
    scratch_level,
    speed_table,
)
from dfkt.config import RunConfig, TrainConfig, to_dict
from dfkt.errors import StudyError
from dfkt.store.study_store import StudyStore
from dfkt.store.files import Storage
from dfkt.analysis.tables import markdown_table

ROOT = Path(__file__).parents[2]
SESSION = {
    "started": "2026-11-22T15:00:36+00:00",
    "versions": {"python": "3.11.7", "torch": "2.15.0", "ray": "2.60.0", "optuna": "5.0.0"},
    "commit": "8e626c2555d87a7653a6cf1fb429c199b4cf067b",
    "dirty": False,
    "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory_bytes": 24 * 2**30, "gpus": []},
    "command": ["studies/some.py", "--name", "two words"],
}
Curve = list[tuple[str, float | None]]


def write_arm(folder: Path, arm: str, tests: dict[int, float | None], curve: Curve, **more: Any) -> StudyStore:
    """Write a study as a search leaves it: ``tests`` per seed (``None``: failed), ``curve`` the same for all seeds."""
    base = RunConfig(method=arm.partition("-")[0], train=TrainConfig(epochs=len(curve), batch_size=32))  # type: ignore[arg-type]
    meta = {
        "config": {"base": to_dict(base)},
        "data": {"title": "Blobs", "train": 90, "val": 10},
        "teacher": {"network": "resnet26", "val_accuracy": 0.91, "test_accuracy": 0.9},
        "sessions": [SESSION],
        "present_finals": list(range(len(tests))),
    } | more
    store = StudyStore.create(Storage(folder / arm), {"task_lr": float, "order": str}, meta)
    row: dict[str, Any] = {"number": 0, "state": "COMPLETE", "method": base.method, "last_val_accuracy": 0.5}
    store.save_trial(row | {"param_task_lr": 0.25})
    for number, (seed, test) in enumerate(tests.items()):
        store.save_final(*final(number, base.method, seed, test, curve))
    return store


def final(number: int, method: str, seed: int, test: float | None, curve: Curve) -> tuple[Any, Any]:
    ends = {"last_val_accuracy": curve[-1][1], "best_val_accuracy": max(v for _, v in curve if v is not None)}
    row = {"number": number, "state": "COMPLETE", "method": method, "seed": seed, "test_accuracy": test} | ends
    row |= {"steps": 10 * len(curve), "images": 320 * len(curve), "epochs": float(len(curve)), "device_seconds": 30.0}
    if test is None:
        row |= {"state": "FAIL", "error": "The loss became nan"}
    records = [
        {"index": k, "epoch": k + 1.0, "phase": phase, "stage": 1 if phase == "flow" else None, "step": 10 * (k + 1)}
        | {"images": 320 * (k + 1), "seconds": 2.0, "loss": 0.5, "val_accuracy": val}
        for k, (phase, val) in enumerate(curve)
    ]
    return row | {"key": f"{number:012x}"}, records


SCRATCH: Curve = [("task", 0.2), ("task", 0.4), ("task", 0.6), ("task", 0.8)]
FAST: Curve = [("flow", None), ("task", 0.7), ("task", 0.85), ("task", 0.84)]
SLOW: Curve = [("task", 0.1), ("task", 0.2), ("task", 0.3), ("task", 0.4)]
SEEDS = (1, 2, 3, 4, 5)
OURS = dict(zip(SEEDS, (0.82, 0.84, 0.83, 0.85, 0.86), strict=True))
PLAIN = dict(zip(SEEDS, (0.80, 0.81, 0.80, 0.79, 0.80), strict=True))
HINTS = dict(zip(SEEDS, (0.78, 0.77, None, 0.79, 0.78), strict=True))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of one setting: two arms were not run yet, one run of another failed."""
    folder = tmp_path_factory.mktemp("stored")
    arms = ["scratch", "kd", "fsp", "dfkt", "dfkt-adjacent"]
    index = {"format": 1, "settings": {"blobs": {"arms": arms, "base": {}}}, "commands": []}
    (folder / "comparison.json").write_text(json.dumps(index))
    for arm, tests, curve in (("scratch", PLAIN, SCRATCH), ("fsp", HINTS, SLOW), ("dfkt", OURS, FAST)):
        write_arm(folder / "blobs", arm, tests, curve)
    return folder


@pytest.fixture(scope="module")
def blobs(stored: Path) -> Comparison:
    return read_comparison(stored)


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(stored, tmp_path / "copy")


def made(
    runs: list[tuple[str, int, float | None]], curves: list[tuple[str, int, int, float]], **about: Any
) -> Comparison:
    """Make frames by hand: runs are (arm, seed, accuracy), curves (arm, seed, step, val accuracy)."""
    ends = {(arm, seed): (step, val) for arm, seed, step, val in curves}
    rows = [
        {"setting": "s", "arm": arm, "method": arm, "seed": seed, "state": "FAIL" if a is None else "COMPLETE"}
        | {"test_accuracy": a, "last_val_accuracy": ends.get((arm, seed), (0, a))[1], "best_val_accuracy": a}
        | {"steps": ends.get((arm, seed), (40, a))[0], "images": 0, "epochs": 1.0, "device_seconds": 3.0, "key": "k"}
        for arm, seed, a in runs
    ]
    records = [
        {
            "setting": "s",
            "arm": arm,
            "seed": seed,
            "epoch": 1.0,
            "step": step,
            "images": 32 * step,
            "seconds": step / 10,
        }
        | {"phase": "task", "stage": None, "loss": 0.1, "val_accuracy": val}
        for arm, seed, step, val in curves
    ]
    columns = ["setting", "arm", "seed", "epoch", "step", "images", "seconds", "phase", "stage", "loss", "val_accuracy"]
    arms = list(dict.fromkeys(arm for arm, *_ in runs))
    settings = {"s": {"arms": arms, "teacher": {"test_accuracy": 0.9}} | about}
    return Comparison(
        runs=pd.DataFrame(rows),
        trials=pd.DataFrame(),
        curves=pd.DataFrame(records, columns=columns),
        about={"format": 1, "settings": settings},
    )


def row_of(table: pd.DataFrame, arm: str) -> dict[str, Any]:
    return table[table.arm == arm].iloc[0].to_dict()


def same(first: Comparison, second: Comparison) -> None:
    for name in ("runs", "trials", "curves"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))
    assert first.about == second.about


# --- accuracy


def test_means_gain_and_share_of_the_gap(blobs):
    table = accuracy_table(blobs, "blobs")
    ours, plain = row_of(table, "dfkt"), row_of(table, "scratch")

    assert table.arm.tolist() == ["scratch", "fsp", "dfkt"]  # as listed; what was not run is absent
    assert ours["test_mean"] == pytest.approx(0.84)
    assert ours["test_std"] == pytest.approx(math.sqrt(0.001 / 4))
    assert ours["gain"] == pytest.approx(0.04)
    assert ours["gap_share"] == pytest.approx(0.4)  # of 0.90 - 0.80
    assert ours["device_seconds"] == 30.0
    assert math.isnan(plain["gain"])
    assert math.isnan(ours["difference"])  # from itself


def test_the_paired_difference_has_students_interval(blobs):
    plain = row_of(accuracy_table(blobs, "blobs"), "scratch")
    pairs = [0.02, 0.03, 0.03, 0.06, 0.06]
    spread = math.sqrt(sum((x - 0.04) ** 2 for x in pairs) / 4)
    half = 2.776445 * spread / math.sqrt(5)

    assert plain["difference"] == pytest.approx(0.04)
    assert (plain["low"], plain["high"]) == pytest.approx((0.04 - half, 0.04 + half))


def test_pairs_are_seeds_that_both_completed(blobs):
    hints = row_of(accuracy_table(blobs, "blobs"), "fsp")

    assert (hints["seeds"], hints["pairs"]) == (4, 4)
    assert hints["difference"] == pytest.approx((0.04 + 0.07 + 0.06 + 0.08) / 4)


def test_one_pair_has_no_interval_and_none_no_difference():
    table = accuracy_table(made([("scratch", 1, 0.8), ("kd", 2, 0.7), ("dfkt", 1, 0.85)], []), "s")

    assert row_of(table, "scratch")["difference"] == pytest.approx(0.05)
    assert math.isnan(row_of(table, "scratch")["low"])
    assert math.isnan(row_of(table, "kd")["difference"])
    assert mean_interval(pd.Series([2.0, 2.0])) == (2.0, 2.0, 2.0)


def test_no_share_of_a_gap_where_the_teacher_is_hardly_ahead():
    runs: list[tuple[str, int, float | None]] = [("scratch", 1, 0.8), ("dfkt", 1, 0.85)]

    for teacher in (0.8, 0.809, 0.7, None):
        table = accuracy_table(made(runs, [], teacher={"test_accuracy": teacher}), "s")
        assert table.gap_share.isna().all()
        assert row_of(table, "dfkt")["gain"] == pytest.approx(0.05)


def test_without_scratch_or_dfkt_the_rest_stands():
    table = accuracy_table(made([("kd", 1, 0.8), ("kd", 2, 0.9)], []), "s")

    assert row_of(table, "kd")["test_mean"] == pytest.approx(0.85)
    assert table[["gain", "gap_share", "difference"]].isna().all(axis=None)


# --- speed


def test_steps_until_scratchs_level_count_the_flow_stages(blobs):
    ours = row_of(speed_table(blobs, "blobs"), "dfkt")

    assert scratch_level(blobs, "blobs") == pytest.approx(0.8)
    assert (ours["seeds"], ours["reached"]) == (5, 5)
    assert (ours["steps"], ours["images"], ours["seconds"]) == (30, 960, 6)  # third record, the first one of flow
    assert ours["step_ratio"] == pytest.approx(30 / 40)


def test_seeds_that_never_reach_are_counted_and_null(blobs):
    slow = row_of(speed_table(blobs, "blobs"), "fsp")

    assert (slow["seeds"], slow["reached"]) == (4, 0)
    assert all(math.isnan(slow[name]) for name in ("steps", "images", "seconds", "step_ratio"))


def test_medians_are_over_all_seeds_and_the_first_time_counts():
    curves = [("scratch", 1, 100, 0.5), ("scratch", 2, 100, 0.7)]
    curves += [("kd", 1, 20, 0.61), ("kd", 1, 40, 0.1), ("kd", 2, 20, 0.5), ("kd", 2, 40, 0.6), ("kd", 3, 40, 0.59)]
    runs: list[tuple[str, int, float | None]] = [("scratch", 1, 0.5), ("scratch", 2, 0.5)]
    table = speed_table(made([*runs, *(("kd", seed, 0.5) for seed in (1, 2, 3))], curves), "s")
    kd, scratch = row_of(table, "kd"), row_of(table, "scratch")

    assert (kd["seeds"], kd["reached"], kd["steps"]) == (3, 2, 40)  # 20, 40 and never
    assert kd["step_ratio"] == 0.4  # of scratch's full length: half of its seeds is not more than half
    assert (scratch["seeds"], scratch["reached"]) == (2, 1)
    assert math.isnan(scratch["steps"])


def test_a_part_of_an_earlier_winner_is_left_out(tmp_path):
    index = {"format": 1, "settings": {"blobs": {"arms": ["dfkt", "dfkt-joint", "dfkt-dense"]}}}
    Storage(tmp_path / "c").write("comparison.json", json.dumps(index).encode())
    write_arm(tmp_path / "c" / "blobs", "dfkt", {1: 0.8}, SLOW)
    for arm, parent in (("dfkt-joint", "new"), ("dfkt-dense", "old")):
        write_arm(tmp_path / "c" / "blobs", arm, {1: 0.8}, SLOW)
        StudyStore.open(Storage(tmp_path / "c" / "blobs" / arm)).update_meta(parent=parent)
    StudyStore.open(Storage(tmp_path / "c" / "blobs" / "dfkt")).update_meta(best={"key": "new"})

    assert set(read_comparison(tmp_path / "c").runs.arm) <= {"dfkt", "dfkt-joint"}
    assert set(read_comparison(tmp_path / "c").about["settings"]["blobs"]["trials"]) == {"dfkt", "dfkt-joint"}


def test_equal_ends_reach_their_own_mean():
    runs: list[tuple[str, int, float | None]] = [("scratch", seed, 0.1) for seed in range(3)]
    table = speed_table(made(runs, [("scratch", seed, 10, 0.1) for seed in range(3)]), "s")

    assert row_of(table, "scratch")["reached"] == 3


def test_without_scratch_there_is_no_level():
    comparison = made([("kd", 1, 0.8), ("scratch", 1, None)], [("kd", 1, 10, 0.8)])

    assert math.isnan(scratch_level(comparison, "s"))
    assert speed_table(comparison, "s").empty
    assert "step_ratio" in speed_table(comparison, "s")


# --- reading and storing


def test_a_comparison_holds_what_its_studies_do(blobs):
    about = blobs.about["settings"]["blobs"]

    assert blobs.runs.groupby("arm").size().to_dict() == {"scratch": 5, "fsp": 5, "dfkt": 5}
    assert blobs.runs[blobs.runs.state == "FAIL"][["arm", "seed"]].values.tolist() == [["fsp", 3]]
    assert blobs.trials.settings.tolist() == ['{"task_lr":0.25}'] * 3
    ours = blobs.curves[(blobs.curves.arm == "dfkt") & (blobs.curves.seed == 2)]
    assert ours.seconds.tolist() == [2, 4, 6, 8]
    assert ours.stage.isna().tolist() == [False, True, True, True]
    assert ours.val_accuracy.isna().tolist() == [True, False, False, False]
    assert about["trials"] == {"scratch": 1, "fsp": 1, "dfkt": 1}
    assert about["seeds"] == [1, 2, 3, 4, 5]
    assert about["differences"] == []
    assert len(about["sessions"]) == 1  # the same in all arms
    assert "started" not in about["sessions"][0]


def test_runs_of_an_earlier_winner_or_another_method_are_left_out(folder):
    store = write_arm(folder / "blobs", "kd", {1: 0.1, 2: 0.7}, SLOW, present_finals=[1, 2])
    store.save_final(*final(2, "scratch", 1, 0.99, SCRATCH))
    runs = read_comparison(folder).runs

    assert runs[runs.arm == "kd"].test_accuracy.tolist() == [0.7]
    assert 0.99 not in runs.test_accuracy.tolist()


def test_arms_that_are_not_alike_are_noted(folder):
    base = RunConfig(method="kd", train=TrainConfig(epochs=4, batch_size=64, seed=7))
    teacher = {"network": "resnet26", "val_accuracy": 0.92}
    write_arm(folder / "blobs", "kd", {1: 0.8}, SLOW, config={"base": to_dict(base)}, teacher=teacher)

    note = "not the same in all arms: train.batch_size, the teacher's val accuracy"
    assert note in comparison_report(read_comparison(folder))


def test_saving_and_loading_change_nothing(blobs, tmp_path):
    saved = tmp_path / "saved"
    save_comparison(blobs, saved)

    same(blobs, load_comparison(saved))
    same(blobs, read_comparison(Storage(saved)))
    assert comparison_report(load_comparison(saved)) == comparison_report(blobs)
    assert sorted(p.name for p in saved.iterdir()) == ["about.json", "curves.parquet", "runs.parquet", "trials.parquet"]


def test_a_comparison_without_any_study_is_stored_and_printed(tmp_path):
    (tmp_path / "comparison.json").write_text('{"format": 1, "settings": {"blobs": {"arms": ["scratch"]}}}')
    comparison = read_comparison(tmp_path)
    save_comparison(comparison, tmp_path / "saved")

    same(comparison, load_comparison(tmp_path / "saved"))
    assert comparison_report(comparison).startswith("blobs: no arm was run yet\nno complete final run: scratch\n")


def test_a_study_before_its_final_runs_is_printed(folder):
    write_arm(folder / "blobs", "kd", {}, SLOW, sessions=[], teacher={"network": "resnet26", "val_accuracy": 0.91})

    assert "no complete final run: kd, dfkt-adjacent" in comparison_report(read_comparison(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "must have a comparison.json"), ("{", "is damaged"), ("{}", "is damaged"), ('{"format": 2}', "format 1")],
)
def test_a_folder_that_holds_no_comparison_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(StudyError, match=message):
        read_comparison(tmp_path)


def test_damaged_and_missing_tables_are_refused(blobs, tmp_path):
    save_comparison(blobs, tmp_path / "saved")
    (tmp_path / "saved" / "runs.parquet").write_bytes(b"no")
    with pytest.raises(StudyError, match=r"runs\.parquet .* is damaged"):
        load_comparison(tmp_path / "saved")
    (tmp_path / "saved" / "runs.parquet").unlink()
    with pytest.raises(StudyError, match=r"must have runs\.parquet"):
        load_comparison(tmp_path / "saved")


def test_an_unknown_setting_is_refused(blobs):
    with pytest.raises(StudyError, match="one of blobs, but got 'blob'"):
        accuracy_table(blobs, "blob")


# --- text


def test_the_report_says_what_was_run_and_what_came_out(blobs):
    lines = comparison_report(blobs).splitlines()
    table = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]

    assert lines[0] == (
        "blobs: Blobs, 90 train and 10 val images; teacher resnet26 (val 91.00 %, test 90.00 %), student resnet8; "
        "4 epochs of batch 32; 1 trials per arm; seeds 1, 2, 3, 4, 5"
    )
    assert "no complete final run: kd, dfkt-adjacent" in lines
    assert "failed, and in no table: fsp seed 3" in lines
    assert ["scratch", "5", "80.00 ± 0.71", "+4.00 [+1.68, +6.32]", "30.0"] in table
    assert ["fsp", "4", "78.00 ± 0.82", "-2.00", "-20 %", "+6.25 [+3.53, +8.97]", "30.0"] in table
    assert ["dfkt", "5", "84.00 ± 1.58", "+4.00", "40 %", "30.0"] in table
    assert "until val accuracy reaches 80.00 %:" in lines
    assert ["dfkt", "5 of 5", "30", "960", "6.0", "0.75"] in table
    assert ["fsp", "0 of 4"] in table
    assert "nan" not in "\n".join(lines[:20]).lower()


def test_parts_that_were_not_searched_are_named(blobs):
    settings = {"blobs": blobs.about["settings"]["blobs"] | {"trials": {"dfkt": 8, "kd": 12, "dfkt-adjacent": 0}}}
    text = comparison_report(replace(blobs, about={"settings": settings}))

    assert "8 to 12 trials per arm (not searched: dfkt-adjacent)" in text


def test_fewer_pairs_than_seeds_are_said():
    runs: list[tuple[str, int, float | None]] = [("kd", 1, 0.5), ("kd", 2, 0.5), ("dfkt", 1, 0.6)]
    text = comparison_report(made(runs, []))

    assert "+10.00 (1 seeds)" in text


def test_markdown_leaves_null_empty_and_escapes_bars():
    table = markdown_table(pd.DataFrame({"a|b": ["x", None], "n": pd.array([1, None], dtype="Int64")}))

    assert table.splitlines() == ["| a\\|b | n |", "|---|---|", "| x | 1 |", "|  |  |"]


# --- the page


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return load_script(ROOT / "docs" / "build_results.py")


NAMES = ("about first/blobs", "accuracy first/blobs", "speed first/blobs", "columns")
PAGE = (
    "# Results\n\n"
    + "\nbetween\n".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in NAMES)
    + "\nend\n"
)


@pytest.fixture
def docs(blobs, tmp_path):
    """A docs folder with the comparison as evidence."""
    save_comparison(blobs, tmp_path / "docs" / "evidence" / "first")
    (tmp_path / "docs" / "results.md").write_text(PAGE)
    return tmp_path / "docs"


def test_blocks_are_replaced_and_the_rest_stays(build, docs):
    assert build.main(["--check"], docs) == 1
    assert build.main([], docs) == 0
    text = (docs / "results.md").read_text()

    assert "old" not in text
    assert text.startswith("# Results\n\n<!-- begin about first/blobs -->\nblobs: Blobs, 90 train")
    assert "commit 8e626c2555d8; 2 cores of AMD EPYC, 24 GiB, no GPU; python 3.11.7, torch 2.15.0" in text
    assert "```\npython studies/some.py --name 'two words'\n```\n<!-- end about first/blobs -->\nbetween\n" in text
    assert "| dfkt | 5 | 84.00 ± 1.58 | +4.00 | 40 % |  | 30.0 |" in text
    assert "| fsp | 0 of 4 |  |  |  |  |" in text
    assert text.endswith("\n<!-- end columns -->\nend\n")
    assert build.main(["--check"], docs) == 0
    assert build.rebuild(text, build.load_evidence(docs / "evidence")) == text


def test_a_changed_number_is_found(build, docs, capsys):
    page = docs / "results.md"
    page.write_text(build.rebuild(PAGE, build.load_evidence(docs / "evidence")))
    assert build.main(["--check"], docs) == 0
    page.write_text(page.read_text().replace("84.00", "84.10"))

    assert build.main(["--check"], docs) == 1
    assert "84.10" in page.read_text()
    assert "not what the evidence gives" in capsys.readouterr().err


def test_plots_are_written_and_equal_ones_are_equal_files(build, docs, blobs):
    build.main([], docs)
    first = {path.name: path.read_text() for path in (docs / "figures").iterdir()}

    assert sorted(first) == ["first-blobs-accuracy.svg", "first-blobs-curves.svg"]
    assert first["first-blobs-curves.svg"] == build.svg(build.plot_curves(blobs, "blobs"))
    assert "where scratch ends" in first["first-blobs-curves.svg"]
    assert "dc:date" not in first["first-blobs-curves.svg"]


def test_a_partial_comparison_has_blocks_and_plots_too(build):
    partial = made([("kd", 1, 0.8)], [("kd", 1, 10, 0.8)], teacher={})

    assert "no level to reach" in build.block("speed p/s", {"p/s": partial})
    assert "| kd | 1 | 80.00 |" in build.block("accuracy p/s", {"p/s": partial})
    assert all("</svg>" in build.svg(plot(partial, "s")) for plot in (build.plot_curves, build.plot_accuracy))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- begin acuracy a/b -->\n<!-- end acuracy a/b -->", "A marker must name .* but got 'acuracy a/b'"),
        ("<!-- begin speed blobs -->\n<!-- end speed blobs -->", "with one of first/blobs, but got 'speed blobs'"),
        ("<!-- begin columns -->\n", "<!-- begin columns --> has no end"),
        ("<!-- end columns -->\n", "must pair up"),
        ("<!-- begin columns -->\n<!-- end speed blobs -->", "must pair up"),
    ],
)
def test_markers_that_cannot_be_filled_are_an_error(build, docs, capsys, page, message):
    (docs / "results.md").write_text(page)

    assert build.main([], docs) == 2
    assert pd.Series([capsys.readouterr().err]).str.contains(message).all()
    assert (docs / "results.md").read_text() == page


def test_two_comparisons_may_have_the_same_setting(build, docs, blobs):
    save_comparison(blobs, docs / "evidence" / "second")
    evidence = build.load_evidence(docs / "evidence")

    assert sorted(evidence) == ["first/blobs", "second/blobs"]
    assert build.block("speed first/blobs", evidence) == build.block("speed second/blobs", evidence)


def test_parts_of_the_method_stand_in_a_table_of_their_own(build):
    arms = [("scratch", 1, 0.7), ("dfkt", 1, 0.8), ("dfkt-joint", 1, 0.75)]
    curves = [(arm, 1, 10, 0.8) for arm in ("scratch", "dfkt", "dfkt-joint")]
    evidence = {"p/s": made(arms, curves, teacher={})}
    tables = {kind: build.block(f"{kind} p/s", evidence) for kind in ("accuracy", "parts", "speed")}
    rows = {kind: re.findall(r"^\| ([a-z-]+) \|", text, re.MULTILINE)[1:] for kind, text in tables.items()}

    assert rows == {"accuracy": ["scratch", "dfkt"], "parts": ["dfkt", "dfkt-joint"], "speed": ["scratch", "dfkt"]}
    assert "joint" not in build.svg(build.plot_curves(evidence["p/s"], "s"))
