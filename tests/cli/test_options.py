"""Shared switches change what they name and nothing else; where things lie and what runs where is told rightly."""

import argparse
from pathlib import Path

import pytest
import torch
from cli.switches import make_folder, parsed

from dfkt.cli import distill, study, teacher
from dfkt.cli.hardware import read_demand, read_workers
from dfkt.cli.options import (
    absolute_path,
    add_data,
    as_name,
    data_name,
    read_augmentation,
    read_placement,
    split_names,
    split_numbers,
    with_choices,
    with_data,
    with_teacher,
)
from dfkt.config import DataConfig, NetworkConfig, OptimizerConfig, Placement, TeacherConfig, TrainConfig
from dfkt.errors import ConfigError
from dfkt.study.capacity import Demand
from dfkt.study.config import StudyConfig
from dfkt.study.driver import Workers
from dfkt.training.config import RunConfig

WHOLE = RunConfig(
    data=DataConfig(name="mnist", limit_train=500, padding=1),
    teacher=TeacherConfig(network=NetworkConfig(name="resnet14", taps=("stem", "layer1.1")), rate=0.2),
    student=NetworkConfig(name="resnet20", width=0.5, taps=("stem", "layer2.1")),
    train=TrainConfig(
        epochs=7, batch_size=32, clip_norm=3.0, seed=5, optimizer=OptimizerConfig(schedule="step", momentum=0.8)
    ),
)


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_switches_nothing_changes() -> None:
    assert with_choices(WHOLE, parsed(distill)) == WHOLE
    assert with_choices(StudyConfig(name="s"), parsed(study)) == StudyConfig(name="s")


def test_a_switch_changes_what_it_names() -> None:
    changed = with_choices(
        WHOLE, parsed(distill, "--epochs", "2", "--student-taps", "stem, layer1.0", "--data", "digits")
    )
    assert (changed.train.epochs, changed.student.taps, changed.data.name) == (2, ("stem", "layer1.0"), "digits")
    assert changed.train.optimizer == WHOLE.train.optimizer
    assert (changed.student.width, changed.data.padding, changed.teacher) == (0.5, 1, WHOLE.teacher)


def test_batches_and_precision_are_the_teachers_too() -> None:
    changed = with_choices(WHOLE, parsed(distill, "--batch-size", "16", "--precision", "float32"))
    for train in (changed.train, changed.teacher.train):
        assert (train.batch_size, train.precision) == (16, "float32")


def test_a_folder_of_images_is_named_by_its_absolute_path(tmp_path: Path) -> None:
    make_folder(tmp_path / "my images", "ab")
    make_folder(tmp_path / "mnist", "ab")
    for given, name in (("my images", str(tmp_path / "my images")), ("mnist", "mnist"), ("nowhere", "nowhere")):
        assert with_data(DataConfig(), parsed(distill, "--data", given)).name == name


def test_a_path_means_the_same_everywhere_and_ends_in_a_name(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    assert absolute_path("a") == str(tmp_path / "a")
    assert absolute_path("link") == str(tmp_path / "link")
    assert absolute_path("a/b/..") == str(tmp_path.resolve() / "a")
    assert absolute_path("~/x") == str(Path.home() / "x")
    assert absolute_path(None) is None
    with pytest.raises(ConfigError, match="must not be empty"):
        absolute_path("")


def test_any_folder_gives_a_name_that_a_study_can_have(tmp_path: Path) -> None:
    assert data_name("my images") == "my_images"
    assert data_name(".") == as_name(tmp_path.name)
    assert data_name("a/b/..") == "a"
    assert data_name("cifar10") == "cifar10"
    assert as_name("täps/x:y") == "t_ps_x_y"


def test_names_are_separated_by_commas() -> None:
    assert split_names(None) is None
    assert split_names("") == ()
    assert split_names("a, b,,c") == ("a", "b", "c")


def test_numbers_are_separated_by_commas_and_nothing_else_is_taken() -> None:
    assert split_numbers("--x", None) is None
    assert split_numbers("--x", "0.5, 1,1e-3") == (0.5, 1.0, 0.001)
    for wrong in ("", "a", "0.5,", "0.5 0.5"):
        with pytest.raises(ConfigError, match=f"`--x` takes numbers separated by commas, but got '{wrong}'"):
            split_numbers("--x", wrong)


def test_a_users_teacher_has_the_normalisation_that_it_is_given() -> None:
    given = ("--teacher-checkpoint", "own.pt", "--teacher-mean", "0.485,0.456,0.406", "--teacher-std", "0.25")
    for command in (teacher, distill, study):
        config = with_teacher(TeacherConfig(), parsed(command, *given))
        assert (config.mean, config.std) == ((0.485, 0.456, 0.406), (0.25,))
        for wrong in (given[2:], given[:4], given[:2] + given[4:]):
            with pytest.raises(ConfigError, match="must hold"):
                with_teacher(TeacherConfig(), parsed(command, *wrong))


def test_one_cpu_is_what_a_run_takes_unless_it_is_told_otherwise() -> None:
    assert read_workers(parsed(study)) == Workers(count=1, cpus=1, gpus=None)
    given = parsed(study, "--workers-per-run", "2", "--cpus-per-worker", "3", "--gpus-per-worker", "0.5")
    assert read_workers(given) == Workers(count=2, cpus=3, gpus=0.5)


def test_a_number_of_workers_may_be_a_range_and_they_may_be_spread() -> None:
    given = read_workers(parsed(study, "--workers-per-run", "2..8", "--placement", "spread"))
    assert given == Workers(count=2, up_to=8, spread=True)
    assert (given.most, given.alone, given.strategy) == (8, False, "SPREAD")
    for wrong in ("", "two", "2..", "..8", "2-8", "2...8", "-2"):
        with pytest.raises(
            ConfigError, match=r"`--workers-per-run` takes a number, or a range such as 2\.\.8, but got "
        ):
            read_workers(parsed(study, f"--workers-per-run={wrong}"))
    with pytest.raises(ConfigError, match="most workers per run >= fewest` must hold, but got count=8, up_to=2"):
        read_workers(parsed(study, "--workers-per-run", "8..2"))


def test_what_is_asked_of_the_cluster_is_told() -> None:
    assert read_demand(parsed(study)) == Demand(at_once=None, wait=15, silence=60)
    given = parsed(study, "--at-once", "12", "--wait", "0.5", "--silence", "0")
    assert read_demand(given) == Demand(at_once=12, wait=0.5, silence=0)
    with pytest.raises(ConfigError, match="runs at once >= 1"):
        read_demand(parsed(study, "--at-once", "0"))


def test_without_gpus_a_run_is_placed_on_the_cpu() -> None:
    workers = read_workers(parsed(study, "--gpus-per-worker", "0"))
    assert workers.gpus == 0  # and not left to the cluster, as None is
    assert workers.place(Placement()).device == "cpu"
    assert "GPU" not in workers.resources


@pytest.mark.parametrize("wrong", ["--workers-per-run 0", "--cpus-per-worker 0", "--gpus-per-worker -1"])
def test_impossible_workers_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"per (run|worker) >= "):
        read_workers(parsed(study, *wrong.split()))


def test_places_are_told_and_count_in_no_key(tmp_path: Path) -> None:
    switches = ["--data-root", "d", "--teacher-root", "t", "--checkpoint-every", "3"]
    placement = read_placement(parsed(study, *switches))
    assert (placement.data_root, placement.teacher_root) == (str(tmp_path / "d"), str(tmp_path / "t"))
    assert placement.checkpoint_every == 3
    assert with_choices(WHOLE, parsed(study, *switches)).key == WHOLE.key


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (2, "cuda")])
def test_a_command_without_a_cluster_takes_a_gpu_if_there_is_one(
    gpus: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert read_placement(parsed(distill)).device == device
    assert read_placement(parsed(distill, "--device", "cpu", "--threads", "3")) == Placement(threads=3)
    assert read_placement(parsed(study)).device == "cpu"  # a study's runs are told by their driver


@pytest.mark.parametrize("wrong", ["cuda:2", "cuda:x", "tpu", "", "cuda:"])
def test_a_device_that_is_not_there_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert read_placement(parsed(distill, "--device", "cuda:1")).device == "cuda:1"
    with pytest.raises(ConfigError, match=f"must be one of cpu, cuda, cuda:0, cuda:1, but got '{wrong}'"):
        read_placement(parsed(distill, "--device", wrong))


def test_a_teachers_command_takes_only_what_changes_a_teacher() -> None:
    def told(*argv: str) -> argparse.Namespace:
        return parsed(teacher, *argv)

    for switch in ("--epochs", "--teacher-epochs"):
        assert with_teacher(TeacherConfig(), told(switch, "3")).train.epochs == 3
    for switch in ("--clip-norm", "--checkpoint-every", "--student-width"):
        with pytest.raises(SystemExit):
            told(switch, "1")


@pytest.mark.parametrize("text", ["", "flip,none", "crop,resize", "mirror", "none,none"])
def test_unknown_augmentation_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`--augment` takes crop or resize, flip, separated by commas, or none"):
        read_augmentation(text)


def test_augmentation_reaches_the_images() -> None:
    parser = argparse.ArgumentParser()
    add_data(parser)
    read = lambda *words: with_data(DataConfig(flip=True), parser.parse_args(words))  # noqa: E731

    assert (read().crop, read().flip) == (None, True)
    assert (read("--augment", "crop").crop, read("--augment", "crop").flip) == ("padded", False)
    assert read("--augment", "resize,flip").crop == "resized"
    assert read("--augment", "none") == DataConfig(crop="none", flip=False)
    assert read("--padding", "2").padding == 2
