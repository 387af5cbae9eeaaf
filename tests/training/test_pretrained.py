"""A teacher's training may begin with weights that somebody else trained; these were written by the test."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import synthetic_images

from dfkt.config import PRETRAINED_OWN, NetworkConfig, Placement, TeacherConfig, TrainConfig
from dfkt.data.image_set import ImageSet
from dfkt.errors import CheckpointError, ConfigError
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.training import teacher as module
from dfkt.training.cached import teacher_for
from dfkt.training.evaluate import evaluate
from dfkt.training.normalisation import renormalise, with_normalisation
from dfkt.training.pretrained import fitted, load_pretrained, own_normalisation
from dfkt.training.state import hash_weights
from dfkt.training.teacher import check_teacher, find_teacher, recipe_key

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TRAIN = TrainConfig(epochs=1, batch_size=32, precision="float32")
SMALL = TeacherConfig(network=NetworkConfig(name="resnet8", width=0.25), train=TRAIN, rate=1e-6)
VISION = TeacherConfig(
    network=NetworkConfig(name="torchvision:mobilenet_v3_small"), train=TRAIN, pretrained=PRETRAINED_OWN
)
TIMM = replace(VISION, network=NetworkConfig(name="timm:resnet10t"))
Weights = dict[str, torch.Tensor]


def quiet(line: str) -> None:
    """Print nothing."""


def weights_of(name: str, classes: int, channels: int = 3) -> Weights:
    """Return weights of another seed than any that is used otherwise."""
    torch.manual_seed(11)
    network = build_network(
        NetworkConfig(name=name, width=0.25 if ":" not in name else 1), num_classes=classes, in_channels=channels
    )
    return network.state_dict()


@pytest.fixture
def colours() -> ImageSet:
    """Images in colour, of 4 classes, 32x32."""
    return synthetic_images(size=32, channels=3)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Weights]:
    """What the libraries' servers would send: weights of 1000 classes, the real shapes with made-up values."""
    held = {name: weights_of(name, 1000) for name in (VISION.network.name, TIMM.network.name)}

    def send(url: str, *_: Any, **__: Any) -> Weights:
        assert "mobilenet_v3_small" in url
        return held[VISION.network.name]

    def send_timm(model_id: str, *_: Any, **__: Any) -> Weights:
        assert "resnet10t" in model_id
        return dict(held[TIMM.network.name])

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", send)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", send_timm)
    return held


def begun(config: TeacherConfig, data: ImageSet) -> tuple[Weights, list[str]]:
    network = module._build(config, data)
    fresh = load_pretrained(network, config, num_classes=data.num_classes, in_channels=data.channels)
    return network.state_dict(), fresh


@pytest.mark.parametrize(("config", "head"), [(VISION, "classifier.3"), (TIMM, "fc")], ids=["torchvision", "timm"])
def test_a_librarys_weights_are_all_taken_but_for_the_last_layer(
    libraries: dict[str, Weights], colours: ImageSet, config: TeacherConfig, head: str
) -> None:
    found, fresh = begun(config, colours)
    theirs = libraries[config.network.name]
    assert fresh == [f"{head}.weight", f"{head}.bias"]
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[key], theirs[key]) for key in found if key not in fresh)
    assert found[f"{head}.weight"].shape[0] == 4
    assert own_normalisation(config) == IMAGENET


def test_a_file_with_the_same_classes_is_taken_whole(images: ImageSet, tmp_path: Path) -> None:
    theirs = weights_of("resnet8", 4, 1)
    torch.save({"state_dict": theirs}, tmp_path / "own.pt")
    found, fresh = begun(replace(SMALL, pretrained=str(tmp_path / "own.pt")), images)
    assert fresh == []
    assert hash_weights(found) == hash_weights(theirs)


def test_a_first_convolution_over_colours_answers_a_grey_image_as_one_in_colour(libraries: dict[str, Weights]) -> None:
    grey = synthetic_images(size=32, channels=1)
    for config in (VISION, TIMM):
        found, _ = begun(config, grey)
        first = next(key for key, value in found.items() if value.dim() == 4)
        theirs = libraries[config.network.name][first]
        image = torch.rand(1, 1, 9, 9)
        same = torch.nn.functional.conv2d(image.expand(1, 3, 9, 9), theirs)
        torch.testing.assert_close(torch.nn.functional.conv2d(image, found[first]), same)
        first_step = renormalise(config, grey, "float32")
        assert first_step is not None
        inside = first_step((image - grey.mean) / grey.std)
        expected = (image - sum(IMAGENET[0]) / 3) / (sum(IMAGENET[1]) / 3)
        torch.testing.assert_close(inside, expected)


def test_training_begins_there_by_the_weights_own_normalisation_and_is_read_so(
    libraries: dict[str, Weights], colours: ImageSet, placement: Placement, tmp_path: Path
) -> None:
    config = replace(
        TIMM, rate=1e-9, train=replace(TRAIN, epochs=1)
    )  # next to no step: what is kept is what it began with
    assert len(check_teacher(config, colours, tapped=True, precision="float32")) == 5
    own = Storage(tmp_path / "study")
    teacher = find_teacher(config, colours, placement, quiet, own)
    theirs = libraries[TIMM.network.name]
    kept = teacher.network.state_dict()
    assert kept.keys() == theirs.keys()  # and no name of what normalises
    torch.testing.assert_close(kept["layer4.0.conv1.weight"], theirs["layer4.0.conv1.weight"], atol=1e-6, rtol=0)

    assert evaluate(with_normalisation(config, colours, teacher.network), colours, colours.val, "float32")[0] == (
        teacher.val_accuracy
    )
    frozen = teacher_for(config, colours, own.path, tapped=False, precision="float32")
    assert frozen.taps == ()
    image = torch.rand(2, 3, 32, 32)
    given = (image - colours.mean.view(3, 1, 1)) / colours.std.view(3, 1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    expected = teacher.network.eval()((image - mean) / std)
    first = renormalise(config, colours, "float32")
    assert first is not None
    torch.testing.assert_close(teacher.network(first(given)), expected, atol=1e-4, rtol=1e-4)


def test_a_recipe_follows_the_weights_that_it_begins_with_not_where_they_lie(images: ImageSet, tmp_path: Path) -> None:
    def key(name: str, weights: Weights) -> str:
        torch.save(weights, tmp_path / name)
        return recipe_key(replace(SMALL, pretrained=str(tmp_path / name)), images)

    weights = weights_of("resnet8", 4, 1)
    other = {name: value * 2 for name, value in weights.items()}
    assert key("a.pt", weights) == key("b.pt", weights) != key("c.pt", other)
    assert recipe_key(SMALL, images) not in {key("a.pt", weights), key("c.pt", other)}


def spoil(change: Callable[[Weights], Any]) -> Weights:
    weights = weights_of("resnet8", 4, 1)
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (spoil(lambda w: w.pop(next(iter(w)))), "1 missing, such as"),
        (spoil(lambda w: w.update(more=torch.ones(1))), "1 unexpected, such as more"),
        (spoil(lambda w: w.update({next(iter(w)): torch.ones(3, 3)})), r"has shape \(3, 3\) instead of"),
    ],
)
def test_weights_of_another_network_are_refused(
    images: ImageSet, tmp_path: Path, weights: Weights, message: str
) -> None:
    torch.save(weights, tmp_path / "own.pt")
    with pytest.raises(CheckpointError, match=message) as told:
        begun(replace(SMALL, pretrained=str(tmp_path / "own.pt")), images)
    assert str(told.value).startswith("Weights to begin with must fit resnet8 but for its last layer, but ")


def test_where_nothing_can_be_downloaded_one_line_says_so(monkeypatch: pytest.MonkeyPatch, colours: ImageSet) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    for config in (VISION, TIMM):
        with pytest.raises(
            CheckpointError, match=r"cannot be had: .*Name or service not known.*--teacher-pretrained FILE"
        ) as told:
            check_teacher(config, colours, tapped=True, precision="float32")
        assert "\n" not in str(told.value)


def test_what_has_no_weights_of_its_own_is_refused(colours: ImageSet) -> None:
    with pytest.raises(
        ConfigError, match="Only torchvision:NAME and timm:NAME have weights of their own, but got resnet8"
    ):
        begun(replace(SMALL, pretrained=PRETRAINED_OWN), colours)
    with pytest.raises(ConfigError, match="a teacher has a checkpoint or begins with one"):
        replace(VISION, checkpoint="own.pt")


def test_classes_that_are_others_make_the_last_layer_new_and_nothing_else() -> None:
    own = {"conv.weight": torch.zeros(4, 3, 1, 1), "fc.weight": torch.zeros(7, 4), "fc.bias": torch.zeros(7)}
    given = {"conv.weight": torch.ones(4, 3, 1, 1), "fc.weight": torch.ones(9, 4), "fc.bias": torch.ones(9)}
    begun_with, fresh = fitted(own, given | {"aux1.fc.weight": torch.ones(1)}, 7)
    assert fresh == ["fc.weight", "fc.bias"]
    assert begun_with.keys() == own.keys()
    assert float(begun_with["conv.weight"].sum()) == 12
    wrong = given | {"fc.weight": torch.ones(9, 5)}
    assert fitted(own, wrong, 7)[0]["fc.weight"].shape == (9, 5)  # left to be refused
