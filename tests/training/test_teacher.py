"""The teacher: trained once, found again, a study's own for good, or a user's."""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import synthetic_images
from small_runs import fitted, same

from dfkt.config import NetworkConfig, OptimizerConfig, Placement, TeacherConfig, TrainConfig
from dfkt.data.batches import train_batches
from dfkt.data.image_set import ImageSet, Split
from dfkt.errors import CheckpointError, ConfigError
from dfkt.store.files import Storage
from dfkt.training import teacher as module
from dfkt.training.cached import teacher_for
from dfkt.training.evaluate import evaluate
from dfkt.training.normalisation import renormalise, with_normalisation
from dfkt.training.optim import network_dtype
from dfkt.training.state import hash_weights, load_state, read_weights, save_state
from dfkt.training.teacher import (
    Teacher,
    find_teacher,
    load_teacher,
    read_own,
    recipe_key,
    warn_of_chance,
)

CONFIG = TeacherConfig(network=NetworkConfig(name="resnet8", width=0.25), train=TrainConfig(epochs=3, batch_size=32))
WIDE = replace(CONFIG, network=NetworkConfig(name="resnet8", width=0.5))


def quiet(line: str) -> None:
    """Print nothing."""


def only_folder(placement: Placement) -> Path:
    (folder,) = Path(placement.teacher_root).iterdir()
    return folder


def trained_alike(a: Teacher, b: Teacher) -> bool:
    return same(a.network.state_dict(), b.network.state_dict()) and (a.key, a.val_accuracy) == (b.key, b.val_accuracy)


@pytest.fixture
def own(images: ImageSet, tmp_path: Path) -> str:
    """A user's checkpoint, of another seed than the one that would be trained."""
    path = tmp_path / "own.pt"
    network = module._build(replace(CONFIG, train=replace(CONFIG.train, seed=5)), images)
    torch.save({"state_dict": network.state_dict()}, path)
    return str(path)


def test_a_teacher_is_trained_once_and_found_from_then_on(images, placement):
    lines: list[str] = []
    first = find_teacher(CONFIG, images, placement, lines.append)
    trained = len(lines)
    second = find_teacher(CONFIG, images, placement, lines.append)

    assert trained == 1 + 3 + 1  # what begins, every epoch, what is ready
    assert len(lines) == trained + 1
    assert lines[-1].endswith(f"found in {only_folder(placement)}")
    assert trained_alike(first, second)
    assert first.seconds == second.seconds > 0
    assert first.key == hash_weights(first.network.state_dict())
    assert evaluate(second.network, images, images.val, "auto")[0] == second.val_accuracy
    assert not (only_folder(placement) / "state.pt").exists()


def test_the_description_says_what_was_trained(images, placement):
    find_teacher(CONFIG, images, placement, quiet)
    about = json.loads((only_folder(placement) / "teacher.json").read_text())

    assert about["network"]["name"] == "resnet8"
    assert about["train"]["epochs"] == 3
    assert about["seconds"] > 0


def test_weights_that_were_deleted_are_trained_again(images, placement):
    first = find_teacher(CONFIG, images, placement, quiet)
    (only_folder(placement) / "teacher.pt").unlink()

    assert trained_alike(find_teacher(CONFIG, images, placement, quiet), first)


def test_those_who_ask_at_once_wait_for_the_one_who_trains(images, placement):
    lines: list[str] = []
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: find_teacher(CONFIG, images, placement, lines.append), range(3)))

    assert sum(line.startswith("training teacher") for line in lines) == 1
    assert sum("found in" in line for line in lines) == 2
    assert trained_alike(found[0], found[1])
    assert trained_alike(found[0], found[2])


def test_the_recipe_follows_settings_and_images(images):
    darker = replace(images, padded=Split(images.padded.images // 2, images.padded.labels))
    swapped = replace(images, padded=Split(images.padded.images, images.padded.labels.flip(0)))
    recipes = [
        (CONFIG, images),
        (WIDE, images),
        (replace(CONFIG, network=NetworkConfig(name="resnet14", width=0.25)), images),
        (replace(CONFIG, rate=0.05), images),
        (replace(CONFIG, train=replace(CONFIG.train, epochs=4)), images),
        (replace(CONFIG, train=replace(CONFIG.train, seed=1)), images),
        (replace(CONFIG, train=replace(CONFIG.train, batch_size=16)), images),
        (replace(CONFIG, train=replace(CONFIG.train, clip_norm=1.0)), images),
        (replace(CONFIG, train=replace(CONFIG.train, precision="float32")), images),
        (replace(CONFIG, train=replace(CONFIG.train, optimizer=OptimizerConfig(momentum=0.5))), images),
        (CONFIG, darker),
        (CONFIG, swapped),
        (CONFIG, synthetic_images(padding=2)),
        (CONFIG, synthetic_images(flip=True)),
        (CONFIG, synthetic_images(count=95)),
    ]

    assert len({recipe_key(config, data) for config, data in recipes}) == len(recipes)


def test_the_recipe_leaves_out_what_the_training_does_not_depend_on(images):
    alike = [
        replace(CONFIG, checkpoint="own.pt"),
        replace(CONFIG, network=replace(CONFIG.network, taps=("stem", "layer1.0"))),
        replace(CONFIG, train=replace(CONFIG.train, sync_batch_norm=False)),
    ]
    moved = replace(images, name="/elsewhere/synthetic", title="Another title")

    assert {recipe_key(config, images) for config in alike} == {recipe_key(CONFIG, images)}
    assert recipe_key(CONFIG, moved) == recipe_key(CONFIG, synthetic_images()) == recipe_key(CONFIG, images)


class StopHereError(Exception):
    """Stands for a kill."""


def stop_after(epochs: int, images: ImageSet, placement: Placement) -> None:
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if len(lines) == 1 + epochs:
            raise StopHereError

    with pytest.raises(StopHereError):
        find_teacher(CONFIG, images, placement, log)


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_interrupted_training_goes_on_and_ends_the_same(images, placement, tmp_path, epochs):
    whole = find_teacher(CONFIG, images, replace(placement, teacher_root=str(tmp_path / "whole")), quiet)
    stop_after(epochs, images, placement)
    state = load_state(Storage(only_folder(placement)))
    assert state is not None
    assert state["step"] == epochs * 3
    lines: list[str] = []
    resumed = find_teacher(CONFIG, images, placement, lines.append)

    assert sum("teacher epoch" in line for line in lines) == 3 - epochs
    assert trained_alike(resumed, whole)


def test_a_study_keeps_its_teacher_whatever_becomes_of_the_others(images, placement, tmp_path, monkeypatch):
    folder = Storage(tmp_path / "study")
    first = find_teacher(CONFIG, images, placement, quiet, folder)
    shutil.rmtree(placement.teacher_root)
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("nothing may be trained"))
    lines: list[str] = []
    second = find_teacher(CONFIG, images, placement, lines.append, folder)

    assert trained_alike(first, second)
    assert lines == [f"teacher resnet8: val {100 * first.val_accuracy:.2f} %, the study's own"]


def test_a_studys_teacher_wins_over_one_that_the_machine_has_trained(images, placement, tmp_path, own):
    folder = Storage(tmp_path / "study")
    theirs = find_teacher(replace(CONFIG, checkpoint=own), images, placement, quiet, folder)
    ours = find_teacher(CONFIG, images, placement, quiet)

    assert ours.key != theirs.key
    assert trained_alike(find_teacher(CONFIG, images, placement, quiet, folder), theirs)


def test_workers_load_the_teacher_of_the_study(images, placement, tmp_path):
    folder = Storage(tmp_path / "study")
    teacher = find_teacher(CONFIG, images, placement, quiet, folder)

    assert same(load_teacher(CONFIG, images, folder).state_dict(), teacher.network.state_dict())
    with pytest.raises(CheckpointError, match=r"must lie in .*/empty/teacher.pt, but there are none"):
        load_teacher(CONFIG, images, Storage(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"study/teacher.pt does not fit resnet8: .*shape"):
        load_teacher(WIDE, images, folder)


def test_a_users_checkpoint_is_measured_and_nothing_is_trained(images, placement, own, monkeypatch):
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("nothing may be trained"))
    lines: list[str] = []
    config = replace(CONFIG, checkpoint=own)
    teacher = find_teacher(config, images, placement, lines.append)

    assert same(teacher.network.state_dict(), read_weights(own))
    assert teacher.key == hash_weights(read_weights(own))
    assert teacher.seconds is None
    assert teacher.val_accuracy == evaluate(read_own(config, images), images, images.val, "auto")[0]
    assert lines[0] == f"teacher resnet8 from {own}: val {100 * teacher.val_accuracy:.2f} %"


def test_a_study_that_began_with_other_weights_refuses_a_users_checkpoint(images, placement, own, tmp_path):
    folder = Storage(tmp_path / "study")
    config = replace(CONFIG, checkpoint=own)
    first = find_teacher(config, images, placement, quiet, folder)
    assert trained_alike(find_teacher(config, images, placement, quiet, folder), first)
    weights = read_weights(own)
    weights["fc.bias"][0] += 1
    torch.save(weights, own)

    with pytest.raises(CheckpointError, match=rf"must stay {first.key}, but {own} holds other weights. Take another"):
        find_teacher(config, images, placement, quiet, folder)
    assert same(load_teacher(CONFIG, images, folder).state_dict(), first.network.state_dict())


ASKS: list[Callable[[TeacherConfig, ImageSet, Placement], object]] = [
    lambda config, images, placement: read_own(config, images),
    lambda config, images, placement: find_teacher(config, images, placement, quiet),
]


@pytest.mark.parametrize("ask", ASKS, ids=["read", "find"])
def test_a_users_checkpoint_that_does_not_fit_is_refused(images, placement, own, tmp_path, ask):
    with pytest.raises(CheckpointError, match=rf"{own} does not fit resnet8 for 4 classes and 1 channels: .*shape"):
        ask(replace(WIDE, checkpoint=own), images, placement)
    with pytest.raises(CheckpointError, match=r"absent\.pt does not exist"):
        ask(replace(CONFIG, checkpoint=str(tmp_path / "absent.pt")), images, placement)


def test_a_teacher_of_double_precision_is_trained_kept_and_read(images, placement, own, tmp_path):
    config = replace(CONFIG, train=replace(CONFIG.train, precision="float64", epochs=1))
    folder = Storage(tmp_path / "study")
    teacher = find_teacher(config, images, placement, quiet, folder)

    assert all(p.dtype == torch.float64 for p in teacher.network.parameters())
    assert trained_alike(find_teacher(config, images, placement, quiet, folder), teacher)
    assert 0 <= find_teacher(replace(config, checkpoint=own), images, placement, quiet).val_accuracy <= 1


def test_the_process_draws_on_as_if_no_teacher_had_been_trained(images, placement):
    before = torch.get_rng_state()
    find_teacher(CONFIG, images, placement, quiet)

    assert torch.equal(torch.get_rng_state(), before)


def test_a_users_teacher_gets_its_images_by_its_own_normalisation(images, placement, tmp_path):
    other = replace(images, mean=torch.tensor([0.1]), std=torch.tensor([0.6]))
    theirs = find_teacher(CONFIG, other, placement, quiet)
    torch.save(theirs.network.state_dict(), tmp_path / "own.pt")
    config = replace(CONFIG, checkpoint=str(tmp_path / "own.pt"))
    told = replace(config, mean=(0.1,), std=(0.6,))
    folder = Storage(tmp_path / "study")

    assert find_teacher(config, images, placement, quiet).val_accuracy < theirs.val_accuracy - 0.2
    for _ in range(2):  # as a user's, and as the study's own
        assert trained_alike(find_teacher(told, images, placement, quiet, folder), theirs)
    seen = with_normalisation(told, images, theirs.network)
    assert evaluate(seen, images, images.val, "auto") == pytest.approx(
        evaluate(theirs.network, other, images.val, "auto"), abs=1e-5
    )
    assert with_normalisation(config, images, theirs.network) is theirs.network


@pytest.mark.parametrize("tapped", [True, False])
def test_a_run_reads_a_users_teacher_by_its_own_normalisation(images, tmp_path, tapped):
    other = replace(images, mean=torch.tensor([0.1]), std=torch.tensor([0.6]))
    plain = replace(CONFIG, checkpoint="own.pt")
    save_state(Storage(tmp_path), fitted(module._build(CONFIG, images), other).state_dict(), "teacher.pt")

    def read(config: TeacherConfig, data: ImageSet) -> dict[str, torch.Tensor]:
        teacher = teacher_for(config, data, str(tmp_path), tapped=tapped, precision="auto")
        crops, _ = next(train_batches(data, 32, seed=0, epoch=0))
        outputs: dict[str, torch.Tensor] = teacher.part((0, 2) if tapped else (), logits=True)(crops)
        return outputs

    expected, found = read(plain, other), read(replace(plain, mean=(0.1,), std=(0.6,)), images)
    assert set(found) == ({"0", "2", "logits"} if tapped else {"logits"})
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(read(plain, images)["logits"], expected["logits"], rtol=0.1)


@pytest.mark.parametrize("values", [(0.485, 0.456, 0.406), (0.5,)], ids=["per channel", "one for all"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_renormalised_images_are_those_normalised_at_once(values, precision):
    data = synthetic_images(channels=3, padding=2)
    first = renormalise(replace(CONFIG, checkpoint="own.pt", mean=values, std=values), data, precision)
    assert first is not None
    batch, _ = next(train_batches(data, 32, seed=0, epoch=0))
    batch = batch.to(network_dtype(precision))
    mean = torch.tensor(values)[:, None, None]
    crops = (batch * data.std[:, None, None] + data.mean[:, None, None]).double()  # 0..1 again, black edges among them
    assert (crops.abs() < 1e-6).all(1).any()
    given = first(batch)
    assert given.dtype == batch.dtype
    assert given.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(given.double(), (crops - mean) / mean, atol=1e-6, rtol=1e-5)


def test_a_normalisation_that_does_not_fit_the_channels_is_refused_before_weights_are_read(images, placement):
    for mean, std, name in (((0.5, 0.5), (0.5,), "mean"), ((0.5,), (0.5, 0.5, 0.5), "std")):
        config = replace(CONFIG, checkpoint="absent.pt", mean=mean, std=std)
        rule = rf"a teacher's {name} has 1 number, or one for each .*: 1` .*got {name}=.* Change --teacher-{name}"
        with pytest.raises(ConfigError, match=rule):
            read_own(config, images)


def test_a_teacher_is_trained_with_the_threads_it_is_given_and_the_process_goes_on_with_its_own(images, placement):
    seen: list[int] = []
    before = torch.get_num_threads()
    find_teacher(CONFIG, images, replace(placement, threads=before + 1), lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    with pytest.raises(CheckpointError):
        find_teacher(replace(CONFIG, checkpoint="absent.pt"), images, replace(placement, threads=before + 1), quiet)
    assert torch.get_num_threads() == before


OWN = replace(CONFIG, checkpoint="own.pt")


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (CONFIG, r"train it longer \(--teacher-epochs\)"),
        (OWN, r"was it trained with another normalisation\? Give --teacher-mean and --teacher-std\. Or .*order"),
        (replace(OWN, mean=(0.5,), std=(0.5,)), "are --teacher-mean, --teacher-std and the order of the classes those"),
    ],
    ids=["trained", "own", "own, normalised"],
)
def test_a_teacher_near_chance_is_said_so_with_a_remedy(config, remedy):
    assert re.search(
        rf"^teacher resnet8 is little .*, val 27.00 % of 10 classes: {remedy}", warn_of_chance(config, 0.27, 10)
    )
    for accuracy, classes, warned in (
        (0.28, 10, False),
        (0.59, 2, True),
        (0.61, 2, False),
        (0.029, 100, True),
        (0.03, 100, False),
    ):
        assert bool(warn_of_chance(config, accuracy, classes)) == warned


def test_whoever_asks_for_a_teacher_near_chance_is_told(images, placement, own):
    constant = {name: torch.zeros_like(value) for name, value in read_weights(own).items()}
    torch.save(constant, own)
    hardly = replace(CONFIG, train=replace(CONFIG.train, epochs=0.34), rate=1e-6)
    for config in (hardly, replace(CONFIG, checkpoint=own)):
        lines: list[str] = []
        teacher = find_teacher(config, images, placement, lines.append)
        assert lines[-1] == warn_of_chance(config, teacher.val_accuracy, 4) != ""
