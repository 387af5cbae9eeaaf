"""What is read of studies, and what saving it keeps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made import SESSION, Arm, write_study

from dfkt.analysis.figures import Figures, load_figures, read_figures, read_studies, save_figures
from dfkt.analysis.pages import study_page
from dfkt.analysis.statistics import accuracy_table, speed_table
from dfkt.errors import StudyError
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
SLOW = (("flow", None), ("task", 0.2), ("task", 0.3), ("task", 0.4))
SEEDS = (1, 2, 3)
ARMS = (
    Arm("scratch", dict.fromkeys(SEEDS, 0.80) | {1: 0.81}),
    Arm("kd", dict.fromkeys(SEEDS, 0.82) | {2: None}),
    Arm("dfkt", dict.fromkeys(SEEDS, 0.85) | {3: 0.88}, SLOW, [("COMPLETE", 0.5), ("FAIL", None)], planned=2),
    Arm("dfkt-joint", {1: 0.81, 2: 0.83}, parent="dfkt"),
    Arm("dfkt-dense", parent="dfkt", skipped="dfkt is that already"),
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two settings side by side, a study each."""
    folder = tmp_path_factory.mktemp("stored")
    write_study(folder / "first", ARMS)
    write_study(folder / "second", ARMS[:2])
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def both(stored: Path) -> Figures:
    return read_figures(stored)


def same(first: Figures, second: Figures) -> None:
    for name in ("runs", "trials", "curves"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))
    assert first.about == second.about


def test_a_folder_holds_a_study_or_several_named_by_folder(stored: Path, both: Figures) -> None:
    assert list(both.about["settings"]) == ["first", "second"]
    assert list(read_figures(stored / "first").about["settings"]) == ["blobs"]  # the study's own name
    assert list(read_studies(str(stored / "second"))) == ["blobs"]
    assert set(both.runs.setting) == {"first", "second"}


def test_the_tables_hold_the_arms_of_a_study(both: Figures) -> None:
    runs = both.runs[both.runs.setting == "first"]

    assert runs.arm.drop_duplicates().tolist() == ["scratch", "kd", "dfkt", "dfkt-joint"]
    assert runs[runs.arm == "kd"].state.tolist() == ["COMPLETE", "FAIL", "COMPLETE"]
    assert [json.loads(text) for text in both.trials.settings] == [{"rate": 0.25}] * 2
    assert both.trials.arm.tolist() == ["dfkt", "dfkt"]


def test_curves_count_from_the_runs_begin_and_belong_to_its_arm(both: Figures) -> None:
    curves = both.curves[both.curves.setting == "first"]
    ours = curves[(curves.arm == "dfkt") & (curves.seed == 1)]

    assert len(curves) == 11 * 4  # runs of the same number in other arms are not mixed up
    assert ours.seconds.tolist() == [2, 4, 6, 8]
    assert ours.val_accuracy.isna().tolist() == [True, False, False, False]
    assert ours.phase.tolist() == ["flow", "task", "task", "task"]


def test_runs_of_an_earlier_winner_are_left_out(tmp_path: Path) -> None:
    write_study(tmp_path, [Arm("kd", {1: 0.1, 2: 0.7}, present=[1]), Arm("scratch", {1: 0.5}, present=[])])
    figures = read_figures(tmp_path)

    assert figures.runs.test_accuracy.tolist() == [0.7]
    assert set(figures.curves.arm) == {"kd"}


def test_what_is_said_of_a_study(both: Figures) -> None:
    about = both.about["settings"]["first"]

    assert about["arms"] == ["scratch", "kd", "dfkt", "dfkt-joint", "dfkt-dense"]
    assert about["ablations"] == {"dfkt-joint": "dfkt", "dfkt-dense": "dfkt"}
    assert about["searched"] == ["dfkt"]
    assert about["trials"] == {"scratch": 0, "kd": 0, "dfkt": 2, "dfkt-joint": 0, "dfkt-dense": 0}
    assert about["skipped"] == {"dfkt-dense": "dfkt is that already"}
    taught = {"network": "resnet26", "width": 1.0, "val_accuracy": 0.91, "test_accuracy": 0.9, "seconds": None}
    assert about["teacher"] == taught
    assert (about["title"], about["train"], about["val"], about["seeds"]) == ("Blobs", 90, 10, [1, 2, 3])
    assert about["sessions"] == [{name: SESSION[name] for name in about["sessions"][0]}]
    assert "started" not in about["sessions"][0]


def test_sessions_that_are_alike_are_said_once(tmp_path: Path) -> None:
    other = SESSION | {"commit": "1" * 40}
    write_study(tmp_path, ARMS, sessions=[SESSION, SESSION | {"started": "2026-11-23T00:00:00+00:00"}, other])

    assert len(read_figures(tmp_path).about["settings"]["blobs"]["sessions"]) == 2


def test_saving_and_loading_change_nothing(both: Figures, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    save_figures(both, saved)

    same(both, load_figures(saved))
    same(both, read_figures(Storage(saved)))
    assert sorted(p.name for p in saved.iterdir()) == ["about.json", "curves.parquet", "runs.parquet", "trials.parquet"]


def test_a_study_before_its_first_run_is_saved_and_printed(tmp_path: Path) -> None:
    write_study(tmp_path / "s", [Arm("scratch"), Arm("dfkt", planned=3)], data={}, teacher={}, sessions=[])
    figures = read_figures(tmp_path / "s")
    save_figures(figures, tmp_path / "saved")

    same(figures, load_figures(tmp_path / "saved"))
    assert study_page(figures).startswith("blobs: digits\n\ndfkt: 0 trials: no trials yet\n")


@pytest.mark.parametrize("folder", sorted(EVIDENCE.iterdir()), ids=lambda path: path.name)
def test_figures_of_before_studies_had_arms_are_read(folder: Path) -> None:
    figures = load_figures(folder)

    for setting, about in figures.about["settings"].items():
        listed = json.loads((folder / "about.json").read_text())["settings"][setting]
        assert about["arms"] == listed["arms"]
        assert list(about["skipped"]) == listed.get("skipped", [])
        assert all(name.startswith("dfkt-") for name in about["ablations"])
        assert {arm for arm, count in listed["trials"].items() if count} == set(about["searched"])
        assert len(accuracy_table(figures, setting)) == len(about["arms"]) - len(about["skipped"])
        assert len(speed_table(figures, setting, ["scratch", "dfkt"])) == 2


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"must hold a study \(study.json\), several below it, or saved figures"):
        read_figures(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "must have an about.json"), ("{", "is damaged"), ("{}", "is damaged"), ('{"format": 2}', "format 1")],
)
def test_saved_figures_without_a_good_about_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "about.json").write_text(text)
    with pytest.raises(StudyError, match=message):
        load_figures(tmp_path)


def test_damaged_and_missing_tables_are_refused(both: Figures, tmp_path: Path) -> None:
    save_figures(both, tmp_path)
    (tmp_path / "runs.parquet").write_bytes(b"no")
    with pytest.raises(StudyError, match=r"runs\.parquet .* is damaged"):
        load_figures(tmp_path)
    (tmp_path / "runs.parquet").unlink()
    with pytest.raises(StudyError, match=r"must have runs\.parquet"):
        load_figures(tmp_path)


def test_a_study_beside_saved_figures_is_what_is_read(stored: Path, both: Figures, tmp_path: Path) -> None:
    folder = shutil.copytree(stored / "second", tmp_path / "study")
    save_figures(both, folder)

    assert list(read_figures(folder).about["settings"]) == ["blobs"]


def test_a_later_arm_is_read_with_those_of_before(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS[:2])
    store = StudyStore.open(Storage(tmp_path))
    config: dict[str, Any] = store.meta["config"]
    config["arms"].append(config["arms"][1] | {"name": "kd-longer", "epochs": 8.0})
    store.update_meta(config=config)

    assert read_figures(tmp_path).about["settings"]["blobs"]["arms"] == ["scratch", "kd", "kd-longer"]
