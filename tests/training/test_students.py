"""A kept student is loaded from its folder alone, whatever its network, and gives what it gave."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import synthetic_images
from small_runs import fitted

import dfkt
from dfkt.config import NetworkConfig
from dfkt.data.image_set import ImageSet
from dfkt.errors import CheckpointError, InputError
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.training.students import keep_student

SMALL = NetworkConfig(name="resnet8", width=0.25)


def left(folder: Path, config: NetworkConfig = SMALL, data: ImageSet | None = None) -> torch.nn.Module:
    """Keep a student in a folder and return it, in evaluation mode."""
    data = data or synthetic_images()
    network = build_network(config, num_classes=data.num_classes, in_channels=data.channels)
    keep_student(Storage(folder), config, fitted(network, data), data)
    return network.eval()


@pytest.mark.parametrize(
    ("config", "channels", "classes"),
    [
        (SMALL, 1, 4),
        (NetworkConfig(name="resnet14", width=0.5, taps=("stem", "layer3.1")), 3, 7),
        (NetworkConfig(name="torchvision:shufflenet_v2_x0_5"), 1, 3),
        (NetworkConfig(name="small_runs:usual_norms"), 3, 5),
    ],
    ids=lambda value: value.name if isinstance(value, NetworkConfig) else str(value),
)
def test_any_student_is_loaded_from_its_folder_and_answers_as_it_did(tmp_path, config, channels, classes):
    data = synthetic_images(32, channels, classes)
    data = replace(data, classes=tuple(f"class {k}" for k in range(classes)))
    network = left(tmp_path / "a", config, data)
    shutil.move(tmp_path / "a", tmp_path / "b")
    before = torch.get_rng_state()
    student = dfkt.load_student(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)

    assert (student.classes, student.image_size) == (data.classes, (32, 32))
    assert not any(module.training for module in student.network.modules())
    images = data.val.images
    with torch.inference_mode():
        logits = student.network((images.permute(0, 3, 1, 2) / 255 - student.mean) / student.std)
        torch.testing.assert_close(logits, network(data.normalise(images)), rtol=1e-3, atol=1e-4)


def test_a_student_of_double_precision_is_loaded_in_single(tmp_path):
    data = synthetic_images()
    network = left(tmp_path).double()
    keep_student(Storage(tmp_path), SMALL, network, data)
    assert {p.dtype for p in dfkt.load_student(tmp_path).network.parameters()} == {torch.float32}


def test_a_folder_without_a_whole_student_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold student.pt and student.json, but .*/none does not"):
        dfkt.load_student(tmp_path / "none")
    for name in ("student.pt", "student.json"):
        left(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(CheckpointError, match=r"must hold student.pt and student.json"):
            dfkt.load_student(tmp_path / name)


def test_a_damaged_description_or_one_of_another_student_is_refused_on_one_line(tmp_path):
    left(tmp_path)
    file = tmp_path / "student.json"
    about = json.loads(file.read_text())
    other = about | {"network": {"name": "resnet8", "width": 0.5}}
    gone = about | {"network": {"name": "gone_module:network"}}
    texts = ("{", "[]", "{}", *(json.dumps(about | {"network": net}) for net in (5, {"nme": 1}, {"width": 0})))
    for text in (*texts, json.dumps(other), json.dumps(gone)):
        file.write_text(text)
        with pytest.raises(InputError) as error:
            dfkt.load_student(tmp_path)
        assert "\n" not in str(error.value)
    file.write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match=r"Checkpoint .*/student.pt does not fit resnet8: .*shape"):
        dfkt.load_student(tmp_path)
