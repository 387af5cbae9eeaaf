"""A study has one teacher: made once, named by its weights, and never another one."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from study.played import ABOUT, TAPS, arm, tiny

from dfkt.config import Placement
from dfkt.errors import CheckpointError, StudyError
from dfkt.store.files import Storage
from dfkt.study.config import StudyConfig
from dfkt.study.opened import OpenStudy
from dfkt.study.opening import about_data, check_store, open_store
from dfkt.study.teaching import keep_teacher
from dfkt.training.cached import images_for
from dfkt.training.state import hash_weights

KEYS = {"key", "network", "width", "val_accuracy", "test_accuracy", "seconds"}


class Teaching:
    """A study's folder and a folder for teachers; what is kept there is trained once for this file's tests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.placement = folder, Placement(teacher_root=str(folder / "teachers"))
        self.lines: list[str] = []

    def keep(self, config: StudyConfig, **teacher: Any) -> dict[str, Any]:
        """Keep a study's teacher, as a run of the study does; return what is known of it."""
        config = replace(config, teacher=replace(config.teacher, **teacher))
        storage, about = Storage(self.folder / config.name), about_data(images_for(config.data, self.placement))
        store = open_store(config, storage, about, TAPS)
        store.update_meta(arms={"a": {}})  # so that it has begun
        keep_teacher(OpenStudy(config, store, self.placement, TAPS), self.lines.append)
        found: dict[str, Any] = store.meta.get("teacher", {})
        return found

    @property
    def file(self) -> Path:
        """The weights in the study's folder."""
        return self.folder / "tiny" / "teacher.pt"

    def weights(self) -> dict[str, torch.Tensor]:
        """Return them."""
        found: dict[str, torch.Tensor] = torch.load(self.file, weights_only=True)
        return found

    def other_weights(self) -> Path:
        """Write a checkpoint of other weights, as a user might have one."""
        path = self.folder / "own.pt"
        torch.save({name: value + 1 if name == "fc.bias" else value for name, value in self.weights().items()}, path)
        return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of one taught arm, its teacher, and where that was trained."""
    folder = tmp_path_factory.mktemp("trained")
    Teaching(folder).keep(tiny("tiny", arm("dfkt")))
    return folder


@pytest.fixture
def teaching(trained: Path, tmp_path: Path) -> Teaching:
    """A copy of it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return Teaching(tmp_path)


TAUGHT = tiny("tiny", arm("dfkt"))


def test_a_teacher_is_named_by_its_weights_and_measured(teaching: Teaching) -> None:
    known = teaching.keep(TAUGHT)
    assert set(known) == KEYS
    assert known["key"] == hash_weights(teaching.weights())
    assert (known["network"], known["width"]) == ("resnet8", 0.5)
    assert 0 <= known["test_accuracy"] <= 1
    assert known["seconds"] > 0


def test_the_time_of_its_training_stays_known_where_only_the_weights_are_left(teaching: Teaching) -> None:
    store = open_store(TAUGHT, Storage(teaching.folder / "tiny"), ABOUT, TAPS)
    seconds = store.meta["teacher"]["seconds"]
    store.update_meta(teacher={name: value for name, value in store.meta["teacher"].items() if name != "test_accuracy"})
    shutil.rmtree(teaching.folder / "teachers")
    assert teaching.keep(TAUGHT)["seconds"] == seconds > 0


def test_a_study_run_again_takes_its_own_teacher_and_trains_none(teaching: Teaching) -> None:
    shutil.rmtree(teaching.folder / "teachers")  # the cache is gone: the study's folder says which it is
    before = teaching.file.read_bytes()
    known = teaching.keep(TAUGHT)
    assert teaching.keep(TAUGHT) == known
    assert teaching.file.read_bytes() == before
    assert not (teaching.folder / "teachers").exists()
    assert all("the study's own" in line or "chance" in line for line in teaching.lines)


def test_another_study_finds_the_teacher_that_was_trained_before(teaching: Teaching) -> None:
    known = teaching.keep(TAUGHT)
    assert teaching.keep(replace(TAUGHT, name="second")) == known
    assert (teaching.folder / "second" / "teacher.pt").exists()
    assert not any("training" in line for line in teaching.lines)


def test_a_study_without_taught_arms_has_no_teacher_until_one_is_added(teaching: Teaching) -> None:
    alone = tiny("alone", arm("scratch"))
    assert teaching.keep(alone) == {}
    assert not (teaching.folder / "alone" / "teacher.pt").exists()
    assert set(teaching.keep(replace(alone, arms=(arm("scratch"), arm("dfkt"))))) == KEYS
    assert (teaching.folder / "alone" / "teacher.pt").exists()


def test_a_teacher_that_is_gone_is_put_back_if_it_is_found_by_its_weights(teaching: Teaching) -> None:
    known = teaching.keep(TAUGHT)
    teaching.file.unlink()
    assert teaching.keep(TAUGHT) == known
    assert hash_weights(teaching.weights()) == known["key"]


def test_a_teacher_that_is_gone_is_never_replaced_by_another_not_even_at_the_second_try(teaching: Teaching) -> None:
    (kept,) = (teaching.folder / "teachers").glob("*/teacher.pt")
    shutil.copy(teaching.other_weights(), kept)
    teaching.file.unlink()
    for _ in range(2):
        with pytest.raises(StudyError, match=r"teacher must stay \w+, but teacher\.pt is gone, and there is \w+"):
            teaching.keep(TAUGHT)
        assert not teaching.file.exists()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:1000]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("hello"),
    "no weights": lambda file: torch.save({"fc.bias": 1}, file),
    "a list": lambda file: torch.save([1], file),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_teacher_that_is_damaged_is_put_back_if_it_is_found_by_its_weights(teaching: Teaching, case: str) -> None:
    known = teaching.keep(TAUGHT)
    DAMAGES[case](teaching.file)
    teaching.lines.clear()
    assert teaching.keep(TAUGHT) == known
    assert hash_weights(teaching.weights()) == known["key"]
    assert teaching.lines[0] == "the study's teacher.pt is damaged; the same one is looked for, or made again"


def test_a_teacher_that_is_damaged_or_another_is_never_replaced_silently(teaching: Teaching) -> None:
    (kept,) = (teaching.folder / "teachers").glob("*/teacher.pt")
    other = teaching.other_weights()
    shutil.copy(other, kept)
    shutil.copy(other, teaching.file)
    with pytest.raises(StudyError, match=r"teacher must stay \w+, but teacher\.pt holds \w+\. Put the file back"):
        teaching.keep(TAUGHT)
    teaching.file.write_bytes(b"")
    with pytest.raises(StudyError, match=r"teacher must stay \w+, but teacher\.pt is damaged, and there is \w+"):
        teaching.keep(TAUGHT)
    assert teaching.file.read_bytes() == b""


def test_a_users_teacher_is_the_studys_from_its_beginning(teaching: Teaching) -> None:
    own = teaching.other_weights()
    fresh = replace(TAUGHT, name="own")
    known = teaching.keep(fresh, checkpoint=str(own))
    assert known["key"] == hash_weights(torch.load(own, weights_only=True))
    assert teaching.keep(fresh, checkpoint=str(own)) == known
    own.unlink()
    assert teaching.keep(fresh) == known  # its copy lies in the study's folder


def test_a_users_normalisation_is_the_studys_in_val_and_test_and_cannot_change(teaching: Teaching) -> None:
    fresh, own = replace(TAUGHT, name="own"), str(teaching.file)
    plain = teaching.keep(replace(fresh, name="plain"), checkpoint=own)
    images = images_for(TAUGHT.data, teaching.placement)
    same, other = (images.mean.tolist(), images.std.tolist()), ((0.9,), (0.05,))
    known = teaching.keep(fresh, checkpoint=own, mean=tuple(same[0]), std=tuple(same[1]))
    assert known == plain
    odd = teaching.keep(replace(fresh, name="odd"), checkpoint=own, mean=other[0], std=other[1])
    assert odd["key"] == plain["key"]
    assert all(odd[name] != plain[name] for name in ("val_accuracy", "test_accuracy"))
    told = replace(fresh, teacher=replace(fresh.teacher, checkpoint=own, mean=other[0], std=other[1]))
    with pytest.raises(StudyError, match=r"teacher\.mean was \[.*\], is \[0\.9\]; teacher\.std was"):
        check_store(told, Storage(teaching.folder / "own"), about_data(images))


def test_a_teacher_little_better_than_chance_is_said_so_at_every_run_of_the_study(teaching: Teaching) -> None:
    store = open_store(
        TAUGHT, Storage(teaching.folder / "tiny"), about_data(images_for(TAUGHT.data, teaching.placement)), TAPS
    )
    for accuracy, count in ((0.2, 1), (0.9, 1)):
        store.update_meta(teacher=store.meta["teacher"] | {"val_accuracy": accuracy})
        teaching.keep(TAUGHT)
        assert sum("little better than chance" in line for line in teaching.lines) == count


def test_a_users_other_teacher_is_refused_and_the_studys_stays(teaching: Teaching) -> None:
    before = teaching.file.read_bytes()
    with pytest.raises(CheckpointError, match="teacher must stay"):
        teaching.keep(TAUGHT, checkpoint=str(teaching.other_weights()))
    assert teaching.file.read_bytes() == before
    assert set(teaching.keep(TAUGHT)) == KEYS


def test_where_runs_are_given_gpus_the_teacher_is_made_on_one(
    teaching: Teaching, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Remote:
        def __init__(self, function: Any) -> None:
            self.remote = lambda *given: asked.append(given) or {"key": "k", "seconds": 3.0}

    monkeypatch.setattr("ray.remote", lambda **given: asked.append(given) or Remote)
    monkeypatch.setattr("ray.get", lambda about: about)
    fresh = replace(TAUGHT, name="fresh")
    teaching.keep(fresh)  # on the CPU: nothing is asked of Ray
    assert asked == []
    storage = Storage(teaching.folder / "gpu")
    store = open_store(fresh, storage, ABOUT, TAPS)
    keep_teacher(OpenStudy(fresh, store, Placement(device="cuda"), TAPS), print)
    assert asked[0] == {"num_gpus": 1}
    assert asked[1][:2] == (fresh.teacher, fresh.data)
    assert store.meta["teacher"] == {"key": "k", "seconds": 3.0}
