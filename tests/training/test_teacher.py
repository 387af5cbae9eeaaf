"""The teacher: trained once, found again, or a user's own."""

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import synthetic_images

from dfkt.training import teacher as module
from dfkt.training.state import load_state
from dfkt.config import NetworkConfig, OptimizerConfig, TeacherConfig, TrainConfig
from dfkt.data.load import ImageSet
from dfkt.errors import CheckpointError
from dfkt.store.files import Storage
from dfkt.training.teacher import check_checkpoint, find_teacher, load_teacher, publish_teacher, teacher_key
from dfkt.training.loop import evaluate


@pytest.fixture
def config(tmp_path: Path) -> TeacherConfig:
    return TeacherConfig(
        network=NetworkConfig(name="resnet8", width=0.25),
        root=str(tmp_path / "teachers"),
        train=TrainConfig(epochs=3, batch_size=32),
    )


def quiet(line: str) -> None:
    """Print nothing."""


def only_folder(config: TeacherConfig) -> Path:
    (folder,) = Path(config.root).iterdir()
    return folder


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def test_a_teacher_is_trained_once_and_found_from_then_on(images, config):
    lines: list[str] = []
    first = find_teacher(config, images, lines.append)
    trained = len(lines)
    second = find_teacher(config, images, lines.append)

    assert trained == 1 + 3 + 1  # what begins, every epoch, what is ready
    assert len(lines) == trained + 1
    assert lines[-1].endswith(f"found in {only_folder(config)}")
    assert same(first.network, second.network)
    assert (first.key, first.val_accuracy) == (second.key, second.val_accuracy)
    assert evaluate(second.network, images, images.val, config.train)[0] == second.val_accuracy
    assert not (only_folder(config) / "state.pt").exists()


def test_the_description_says_what_was_trained(images, config):
    find_teacher(config, images, quiet)
    about = json.loads((only_folder(config) / "teacher.json").read_text())

    assert about["network"]["name"] == "resnet8"
    assert about["train"]["epochs"] == 3
    assert about["seconds"] > 0


def test_those_who_ask_at_once_wait_for_the_one_who_trains(images, config):
    lines: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: find_teacher(config, images, lines.append), range(3)))

    assert sum(line.startswith("training teacher") for line in lines) == 1
    assert sum("found in" in line for line in lines) == 2
    assert same(found[0].network, found[1].network)
    assert same(found[0].network, found[2].network)


def _ask(config: TeacherConfig, queue: "multiprocessing.Queue[list[str]]") -> None:
    lines: list[str] = []
    torch.set_num_threads(1)
    find_teacher(config, synthetic_images(), lines.append)
    queue.put(lines)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_that_ask_at_once_train_once(config):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_ask, args=(config, queue), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    lines = [line for _ in processes for line in queue.get(timeout=250)]
    for process in processes:
        process.join()

    assert sum(line.startswith("training teacher") for line in lines) == 1


def test_the_key_follows_settings_and_images_and_not_where_files_lie(images, config):
    key = teacher_key(config, images)
    others = [
        replace(config, network=replace(config.network, width=0.5)),
        replace(config, train=replace(config.train, epochs=4)),
        replace(config, train=replace(config.train, seed=1)),
        replace(config, optimizer=OptimizerConfig(lr=0.05)),
    ]
    darker = replace(images, train=replace(images.train, images=images.train.images // 2))
    swapped = replace(images, train=replace(images.train, labels=images.train.labels.flip(0)))
    keys = {
        key,
        *(teacher_key(other, images) for other in others),
        *(teacher_key(config, other) for other in (darker, swapped, replace(images, flip=True))),
    }

    assert len(keys) == 1 + len(others) + 3
    assert teacher_key(replace(config, root="/elsewhere"), images) == key
    assert teacher_key(replace(config, checkpoint="own.pt"), images) == key
    assert teacher_key(config, synthetic_images()) == key


class StopHereError(Exception):
    """Stands for a kill."""


def stop_after(epochs: int, images: ImageSet, config: TeacherConfig) -> None:
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if len(lines) == 1 + epochs:
            raise StopHereError

    with pytest.raises(StopHereError):
        find_teacher(config, images, log)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_an_interrupted_training_goes_on_and_ends_the_same(images, config, tmp_path, epochs):
    whole = find_teacher(replace(config, root=str(tmp_path / "whole")), images, quiet)
    stop_after(epochs, images, config)
    state = load_state(Storage(only_folder(config)))
    assert state is not None
    assert state["step"] == epochs * 3
    lines: list[str] = []
    resumed = find_teacher(config, images, lines.append)

    assert sum("teacher epoch" in line for line in lines) == 3 - epochs
    assert same(resumed.network, whole.network)
    assert resumed.val_accuracy == whole.val_accuracy


def test_a_published_teacher_is_loaded_by_every_worker(images, config, tmp_path):
    teacher = find_teacher(config, images, quiet)
    publish_teacher(teacher, Storage(tmp_path / "study"))

    assert same(load_teacher(config, images, Storage(tmp_path / "study")), teacher.network)
    with pytest.raises(CheckpointError, match=r"must lie in .*/empty/teacher.pt, but there are none"):
        load_teacher(config, images, Storage(tmp_path / "empty"))


def test_a_users_checkpoint_is_measured_and_nothing_is_trained(images, config, tmp_path, monkeypatch):
    trained = find_teacher(config, images, quiet)
    path = tmp_path / "own.pt"
    torch.save({"state_dict": trained.network.state_dict()}, path)
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("nothing may be trained"))
    lines: list[str] = []
    own = find_teacher(replace(config, checkpoint=str(path)), images, lines.append)

    assert own.val_accuracy == trained.val_accuracy
    assert same(own.network, trained.network)
    assert own.key != trained.key
    assert own.about["checkpoint"] == str(path)
    assert lines == [f"teacher resnet8 from {path}: val {100 * own.val_accuracy:.2f} %"]


@pytest.mark.parametrize("ask", [check_checkpoint, lambda c, i: find_teacher(c, i, quiet)], ids=["check", "find"])
def test_a_users_checkpoint_that_does_not_fit_is_refused(images, config, tmp_path, ask):
    path = tmp_path / "own.pt"
    wide = replace(config, network=NetworkConfig(name="resnet8", width=0.5))
    torch.save(module._build(wide, images).state_dict(), path)

    with pytest.raises(CheckpointError, match=rf"{path} does not fit resnet8 for 4 classes and 1 channels: .*shape"):
        ask(replace(config, checkpoint=str(path)), images)
    with pytest.raises(CheckpointError, match=r"absent\.pt does not exist"):
        ask(replace(config, checkpoint=str(tmp_path / "absent.pt")), images)


def test_a_checkpoint_that_fits_passes_the_check(images, config, tmp_path):
    path = tmp_path / "own.pt"
    torch.save(module._build(config, images).state_dict(), path)

    check_checkpoint(replace(config, checkpoint=str(path)), images)
    check_checkpoint(config, images)
