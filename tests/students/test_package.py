"""A kept student is loaded from its folder alone, whatever its network, and gives what it gave."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import synthetic_images
from pyarrow import fs
from small_runs import fitted
from torch import nn

import dfkt
from dfkt.config import DataConfig, NetworkConfig, Placement, Precision, TrainConfig
from dfkt.data.image_set import ImageSet
from dfkt.errors import CheckpointError, ConfigError, DataError, InputError, NetworkError
from dfkt.methods.kd import Kd
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import build_network
from dfkt.store import files
from dfkt.store.files import Storage
from dfkt.students import package
from dfkt.students.keep import Keeper, keep_student, note_test
from dfkt.training.cached import test_images_for as split_for_test
from dfkt.training.config import RunConfig
from dfkt.training.optim import autocast, computes_bfloat16
from dfkt.training.run import Job, Payload, Trained, run_job

SMALL = NetworkConfig(name="resnet8", width=0.25)
ELSEWHERE = """
import json, sys
sys.modules["sklearn"] = None  # where the digits come from
import numpy as np, torch, dfkt
torch.set_num_threads(1)
student = dfkt.load_student("student")
images, labels = (torch.from_numpy(np.load(name)) for name in ("images.npy", "labels.npy"))
with torch.inference_mode():
    for given in (images, images.float() / 255):
        batches = zip(given.split(512), labels.split(512))
        print(sum(int((student(part).argmax(1) == truth).sum()) for part, truth in batches) / len(labels))
"""


def trained(network: nn.Module, data: ImageSet, config: NetworkConfig = SMALL, **train: Any) -> Trained:
    """Return a student as the end of a run gives it."""
    run = RunConfig(method=Scratch(), student=config, train=TrainConfig(**{"precision": "float32"} | train))
    return Trained(run, network, data, 0.5, 0.25)


def left(folder: Path, config: NetworkConfig = SMALL, data: ImageSet | None = None) -> nn.Module:
    """Keep a student in a folder and return it, in evaluation mode."""
    data = data or synthetic_images()
    network = build_network(config, num_classes=data.num_classes, in_channels=data.channels)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    keep_student(Storage(folder), trained(fitted(network, data), data, config))
    return network.eval()


def described(folder: Path) -> dict[str, Any]:
    """Return what a package says of itself."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def change(folder: Path, **entries: Any) -> None:
    """Change entries of a package's description; those of ``dfkt`` one by one."""
    config = described(folder)
    config["dfkt"] |= entries.pop("dfkt", {})
    config["pretrained_cfg"] |= entries.pop("pretrained_cfg", {})
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_in_a_process_without_any_image_set_it_has_the_accuracy_that_was_stored(
    run_config: RunConfig, placement: Placement, tmp_path: Path, precision: Precision
) -> None:
    if precision == "bfloat16" and not computes_bfloat16("cpu"):
        pytest.skip("this processor computes no bfloat16, so a student is loaded in float32")
    config = replace(run_config, method=Scratch(), data=DataConfig(name="digits"), student=replace(SMALL, width=0.5))
    config = replace(config, train=replace(config.train, precision=precision, epochs=5))
    reports: list[Payload] = []
    run_job(Job(config, placement, str(tmp_path / "student"), None, test=True, keep=keep_student), reports.append)
    split = split_for_test(config.data, placement)
    np.save(tmp_path / "images.npy", split.images.permute(0, 3, 1, 2).contiguous().numpy())
    np.save(tmp_path / "labels.npy", split.labels.numpy())
    environment = {**os.environ, "PYTHONPATH": str(Path(dfkt.__file__).parents[1])}
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    assert done.returncode == 0, done.stderr
    own, last = described(tmp_path / "student")["dfkt"], reports[-1]
    assert own["precision"] == precision
    assert (own["val_accuracy"], own["test_accuracy"]) == (last["val_accuracy"], last["test_accuracy"])
    assert [float(line) for line in done.stdout.split()] == [own["test_accuracy"]] * 2
    assert 0.7 < own["test_accuracy"] < 1


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
def test_any_student_answers_in_another_place_to_the_last_bit_as_it_was_evaluated(
    tmp_path: Path, config: NetworkConfig, channels: int, classes: int
) -> None:
    data = synthetic_images(32, channels, classes)
    data = replace(data, classes=tuple(f"class {k}" for k in range(classes)))
    network = left(tmp_path / "a", config, data)
    shutil.move(tmp_path / "a", tmp_path / "b")
    before = torch.get_rng_state()
    student = dfkt.load_student(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)

    assert (student.classes, student.input_size) == (data.classes, (channels, 32, 32))
    assert not any(module.training for module in student.modules())
    images = data.val.images.permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = network(data.normalise(data.val.images))
        for given in (images, images.contiguous(), images / 255, images.double() / 255):
            assert torch.equal(student(given), expected)


def test_every_value_of_a_pixel_is_normalised_to_the_bits_of_training_whether_whole_or_divided(tmp_path: Path) -> None:
    data = synthetic_images(16)
    left(tmp_path, data=data)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    student = dfkt.load_student(tmp_path)
    expected = data.normalise(pixels.permute(0, 2, 3, 1))
    assert torch.equal(student.normalise(pixels), expected)
    assert torch.equal(student.normalise(pixels / 255), expected)


@pytest.mark.parametrize("fast", [False, True])
def test_bfloat16_is_computed_where_it_is_fast_and_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(package, "_is_fast", lambda device: fast)
    data = synthetic_images()
    network = left(tmp_path, data=data)
    change(tmp_path, dfkt={"precision": "bfloat16"})
    images = data.val.images.permute(0, 3, 1, 2)
    with torch.inference_mode():
        plain = network(data.normalise(data.val.images))
        with autocast("bfloat16", torch.device("cpu")):
            rounded = network(data.normalise(data.val.images)).float()
        assert not torch.equal(plain, rounded)
        assert torch.equal(dfkt.load_student(tmp_path)(images), rounded if fast else plain)
        assert torch.equal(dfkt.load_student(tmp_path, "bfloat16")(images), rounded)
        assert torch.equal(dfkt.load_student(tmp_path, "float32")(images), plain)
    with pytest.raises(ConfigError, match="`precision` must be one of"):
        dfkt.load_student(tmp_path, "auto")


def test_a_student_of_double_precision_stays_one_unless_another_is_asked_for(tmp_path: Path) -> None:
    data = synthetic_images()
    network = fitted(build_network(SMALL, num_classes=4, in_channels=1), data).double().eval()
    keep_student(Storage(tmp_path), trained(network, data, precision="float64"))
    student = dfkt.load_student(tmp_path)
    images = data.val.images
    with torch.inference_mode():
        logits = student(images.permute(0, 3, 1, 2))
        torch.testing.assert_close(logits, network(data.normalise(images).double()), rtol=1e-12, atol=1e-12)
    assert {p.dtype for p in dfkt.load_student(tmp_path, "float32").parameters()} == {torch.float32}


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(in_channels, in_channels, 1), nn.Conv2d(in_channels, in_channels, 1)
        self.high.weight = self.low.weight
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # noqa: D102
        found: torch.Tensor = self.fc(self.high(self.low(images)).mean((2, 3)))
        return found


class Noting(Tied):
    """It keeps a text in its state."""

    def get_extra_state(self) -> str:  # noqa: D102
        return "a text"

    def set_extra_state(self, state: str) -> None:  # noqa: D102
        pass


def test_layers_that_share_weights_still_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tied_networks", sys.modules[__name__])
    network = left(tmp_path, NetworkConfig(name="tied_networks:Tied"))
    loaded = dfkt.load_student(tmp_path).network
    assert loaded.low.weight is loaded.high.weight
    assert torch.equal(loaded.low.weight, network.low.weight)


def test_a_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="must have tensors alone in its state, but _extra_state is str"):
        keep_student(Storage(tmp_path), trained(Noting(4, 1), synthetic_images()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 1, 8, 8).long()])
def test_what_are_no_images_is_one_line(tmp_path: Path, images: torch.Tensor) -> None:
    left(tmp_path)
    with pytest.raises(DataError, match=r"Images must be (\[B, 1, H, W\]|uint8)") as error:
        dfkt.load_student(tmp_path)(images)
    assert "\n" not in str(error.value)


def test_the_description_has_timms_names_and_all_that_trained_it_but_no_folder_of_this_machine(
    run_config: RunConfig, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm.models")
    data = synthetic_images(8, 3)
    folder = replace(run_config.data, name=str(tmp_path / "photos"))
    run = replace(run_config, method=Kd(), data=folder, train=replace(run_config.train, seed=7))
    network = build_network(SMALL, num_classes=4, in_channels=3)
    known = {"key": "abc", "network": "resnet8", "val_accuracy": 0.75, "parameters": 1000, "macs": 5000}
    keep_student(Storage(tmp_path), Trained(run, network, data, 0.5, None), known)
    config = described(tmp_path)

    assert config["pretrained_cfg"].keys() <= {field.name for field in fields(timm.PretrainedCfg)}
    assert (config["architecture"], config["model_args"], config["num_features"]) == ("resnet8", {"width": 0.25}, 16)
    assert (config["pretrained_cfg"]["classifier"], config["pretrained_cfg"]["first_conv"]) == ("fc", "stem.conv")
    assert config["pretrained_cfg"]["mean"] == data.mean.tolist()
    own = config["dfkt"]
    assert (own["key"], own["seed"], own["method"]["name"]) == (run.key, 7, "kd")
    assert own["teacher"]["settings"]["network"]["width"] == 0.5
    assert {**own["teacher"], "settings": 0} == {name: known[name] for name in known if name != "network"} | {
        "settings": 0
    }
    assert own["parameters"] == sum(p.numel() for p in network.parameters())
    assert own["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert "/" not in (tmp_path / "config.json").read_text()


def test_a_student_lies_in_a_remote_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_from_uri", lambda uri: (bucket, uri.removeprefix("s3://")))
    data = synthetic_images()
    network = build_network(SMALL, num_classes=4, in_channels=1)
    keep_student(Storage("s3://bucket/kd-seed1"), trained(network, data))
    assert {path.name for path in (tmp_path / "bucket" / "kd-seed1").iterdir()} == {*package.PACKAGE_FILES}
    images = data.val.images.permute(0, 3, 1, 2)
    with torch.inference_mode():
        assert torch.equal(
            dfkt.load_student("s3://bucket/kd-seed1")(images), dfkt.load_student(tmp_path / "bucket/kd-seed1")(images)
        )
    with pytest.raises(CheckpointError, match=r"s3://bucket/none has no config\.json"):
        dfkt.load_student("s3://bucket/none")


def test_what_keeps_a_student_travels_with_its_job_and_equals_its_copy(tmp_path: Path) -> None:
    keeper = Keeper({"key": "abc", "test_accuracy": 0.9})
    copy = pickle.loads(pickle.dumps(keeper))
    assert copy == keeper
    assert copy != Keeper()
    run = RunConfig(method=Kd(), student=SMALL)
    copy(
        Storage(tmp_path),
        Trained(run, build_network(SMALL, num_classes=4, in_channels=1), synthetic_images(), 0.5, None),
    )
    assert described(tmp_path)["dfkt"]["teacher"]["test_accuracy"] == 0.9


def test_a_test_accuracy_that_comes_later_is_noted_and_the_weights_stay(tmp_path: Path) -> None:
    data = synthetic_images()
    network = build_network(SMALL, num_classes=4, in_channels=1)
    keep_student(Storage(tmp_path), replace(trained(network, data), test_accuracy=None))
    before, weights = described(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    assert before["dfkt"]["test_accuracy"] is None
    note_test(Storage(tmp_path), 0.875)
    assert described(tmp_path)["dfkt"] == before["dfkt"] | {"test_accuracy": 0.875}
    assert "| 50.00 | 87.50 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_a_kill_between_two_files_leaves_no_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left(tmp_path)
    write = Storage.write

    def killed(storage: Storage, name: str, data: bytes) -> None:
        if name == "README.md":
            raise KeyboardInterrupt
        write(storage, name, data)

    monkeypatch.setattr(Storage, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        left(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        dfkt.load_student(tmp_path)


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(bytes(data))


def _exchange(folder: Path, **values: torch.Tensor) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights | values))


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"must hold config\.json and model\.safetensors, but .* has no config\.json"),
    "no description": (lambda at: (at / "config.json").unlink(), r"has no config\.json"),
    "no weights": (lambda at: (at / "model.safetensors").unlink(), r"must hold model\.safetensors"),
    "empty weights": (lambda at: (at / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged"),
    "garbage": (lambda at: (at / "model.safetensors").write_bytes(b"garbage" * 9), r"model\.safetensors is damaged"),
    "cut off": (_cut, r"model\.safetensors is damaged"),
    "a bit flipped": (_flip, "was damaged or exchanged"),
    "other values": (lambda at: _exchange(at, **{"fc.bias": torch.ones(4)}), "was damaged or exchanged"),
    "other shapes": (lambda at: change(at, dfkt={"network": {"name": "resnet8", "width": 0.5}}), "has shape"),
    "one too many": (lambda at: _exchange(at, more=torch.ones(1)), "1 unexpected, such as more"),
    "nan": (lambda at: _exchange(at, **{"fc.bias": torch.full((4,), torch.nan)}), "fc.bias holds nan or inf"),
    "integers": (lambda at: _exchange(at, **{"fc.bias": torch.ones(4).int()}), "fc.bias is of torch.int32 instead of"),
    "a later format": (lambda at: change(at, dfkt={"format": 2}), "format must be 1, but .* has 2. Use the dfkt"),
    "a network that is gone": (lambda at: change(at, dfkt={"network": {"name": "gone_module:x"}}), "Cannot import"),
    "no JSON": (lambda at: (at / "config.json").write_text("{"), "cannot be read as a student's"),
    "nested too deep": (lambda at: (at / "config.json").write_text("[" * 100_000), "cannot be read as a student's"),
    "no mapping": (lambda at: (at / "config.json").write_text("[]"), "cannot be read as a student's"),
    "another program's": (lambda at: (at / "config.json").write_text('{"num_classes": 4}'), "cannot be read as a"),
    "classes of text": (lambda at: change(at, label_names="abcd"), "label_names are names"),
    "no class": (lambda at: change(at, label_names=[]), "label_names are names"),
    "classes that are numbers": (lambda at: change(at, label_names=[1, 2, 3, 4]), "label_names are names"),
    "a size of text": (lambda at: change(at, pretrained_cfg={"input_size": "1x8x8"}), "input_size is channels"),
    "two sides": (lambda at: change(at, pretrained_cfg={"input_size": [8, 8]}), "input_size is channels"),
    "a negative side": (lambda at: change(at, pretrained_cfg={"input_size": [1, 8, -8]}), "input_size is channels"),
    "a mean of text": (lambda at: change(at, pretrained_cfg={"mean": "0.5"}), "mean and std have a number"),
    "a nan mean": (lambda at: change(at, pretrained_cfg={"mean": [float("nan")]}), "mean and std have a number"),
    "a std of zero": (lambda at: change(at, pretrained_cfg={"std": [0.0]}), "mean and std have a number"),
    "more means": (lambda at: change(at, pretrained_cfg={"mean": [0.1, 0.2]}), "mean and std have a number"),
    "nested means": (lambda at: change(at, pretrained_cfg={"mean": [[0.5]], "std": [[0.5]]}), "mean and std have a"),
    "no network": (lambda at: change(at, dfkt={"network": None}), "NetworkConfig must be given by its settings"),
    "no such setting": (lambda at: change(at, dfkt={"network": {"nme": 1}}), "Unknown setting nme"),
    "no such precision": (lambda at: change(at, dfkt={"precision": "float8"}), "`precision` must be one of"),
    "no key of the weights": (lambda at: change(at, dfkt={"weights": 3}), "weights is a text"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_package_that_is_not_whole_is_refused_on_one_line(tmp_path: Path, case: str) -> None:
    left(tmp_path / "s")
    spoil, message = SPOILT[case]
    spoil(tmp_path / "s")
    with pytest.raises(InputError, match=message) as error:
        dfkt.load_student(tmp_path / "s")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value) or case == "a network that is gone"
