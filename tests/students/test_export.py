"""An exported student is the student: its logits, its accuracy, for any number of images; what cannot be one is named."""

import io
import json
import logging
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import synthetic_images
from exports import left, taught_digits

from dfkt.config import DataConfig
from dfkt.data.load import load_data, load_test
from dfkt.errors import ConfigError, NetworkError, RunError
from dfkt.store.files import Storage
from dfkt.students import export
from dfkt.students.export import about, accuracy, check_free, compare, onnx_bytes, to_int8, to_onnx, to_pt2
from dfkt.students.exported import as_input, open_bytes
from dfkt.students.package import Student, load_student

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """A student of the digits."""
    return load_student(taught_digits(tmp_path_factory.mktemp("digits")), "float32")


@pytest.fixture(scope="module")
def files(student: Student) -> dict[str, bytes]:
    """What it is exported to."""
    data = load_data(DataConfig(name="digits"), "unused")
    model = to_onnx(student)
    plain = onnx_bytes(model, about(student, "onnx"))
    small = to_int8(model, as_input(data.train.images[:128]))
    return {"onnx": plain, "int8": onnx_bytes(small, about(student, "int8", 0.5)), "pt2": to_pt2(student)}


def stored() -> tuple[torch.Tensor, torch.Tensor]:
    config = DataConfig(name="digits")
    test = load_test(config, "unused", load_data(config, "unused"))
    return as_input(test.images), test.labels


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_has_the_students_logits_and_its_stored_test_accuracy(
    student: Student, files: dict[str, bytes], kind: str
) -> None:
    where = f"student.{kind}"
    images, labels = stored()
    found = open_bytes(files[kind], where)
    with torch.inference_mode():
        for count in (1, 2, 7, len(images)):
            torch.testing.assert_close(found(images[:count]), student(images[:count]), rtol=0, atol=1e-4)
    assert accuracy(found, iter([(images, labels)])) == student.config["dfkt"]["test_accuracy"] > 0.6
    assert compare(student, files[kind], where) <= 1e-4


def test_users_of_onnx_need_neither_torch_nor_dfkt_and_find_classes_and_normalisation_in_the_file(
    student: Student, files: dict[str, bytes]
) -> None:
    session = onnxruntime.InferenceSession(files["onnx"])
    (given,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(float)", [1, 8, 8])
    assert (gives.name, gives.shape[1:]) == ("logits", [10])
    assert given.shape[0] == gives.shape[0]
    assert isinstance(given.shape[0], str)  # any number
    says = {entry.key: json.loads(entry.value) for entry in onnx.load_from_string(files["onnx"]).metadata_props}
    assert says["dfkt.classes"] == [str(k) for k in range(10)]
    assert says["dfkt.input_size"] == [1, 8, 8]
    assert (says["dfkt.mean"], says["dfkt.std"]) == tuple(student.config["pretrained_cfg"][m] for m in ("mean", "std"))
    assert says["dfkt.network"]["name"] == "resnet8"
    assert says["dfkt.version"]
    assert "0..1" in says["dfkt.input"]
    image = np.zeros((1, 1, 8, 8), np.float32)
    assert session.run(None, {"images": image})[0].shape == (1, 10)


@pytest.mark.parametrize("kind", ["onnx", "int8", "pt2"])
def test_no_file_tells_where_the_sources_lay(files: dict[str, bytes], kind: str) -> None:
    data = files[kind]
    if kind == "pt2":
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            data = b"".join(file.read(name) for name in file.namelist())
    here = str(Path(export.__file__).parents[2]).encode()
    assert data.count(here) == 0


def test_eight_bits_have_a_range_per_channel_a_smaller_file_and_nearly_the_accuracy(
    student: Student, files: dict[str, bytes]
) -> None:
    model = onnx.load_from_string(files["int8"])
    kernels = [tensor for tensor in model.graph.initializer if tensor.name.endswith("conv1.weight_scale")]
    assert {tuple(tensor.dims) for tensor in kernels} == {(8,), (16,), (32,)}
    assert {node.op_type for node in model.graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    first = next(node for node in model.graph.node if "images" in node.input)
    assert first.op_type == "Mul"  # images are normalised as they are
    assert len(files["int8"]) < 0.7 * len(files["onnx"])
    found = open_bytes(files["int8"], "student.int8.onnx")
    assert found.about["test_accuracy"] == 0.5
    images, labels = stored()
    with torch.inference_mode():
        wanted = student(images)
        off = (found(images) - wanted).abs()
    assert 0 < off.mean() < 0.1 * wanted.abs().mean()
    assert abs(accuracy(found, iter([(images, labels)])) - student.config["dfkt"]["test_accuracy"]) < 0.03


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("timm:test_resnet", 1, 224), ("torchvision:squeezenet1_1", 3, 64)]
)
@pytest.mark.timeout(240)
def test_other_peoples_networks_become_files_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, channels: int, size: int
) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    before = (list(warnings.filters), logging.root.manager.disable)
    student = load_student(left(tmp_path, name, synthetic_images(size, channels, count=8)), "float32")
    model = to_onnx(student)
    compare(student, onnx_bytes(model, about(student, "onnx")), "student.onnx")
    compare(student, to_pt2(student), "student.pt2")
    images = torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(0))
    small = open_bytes(onnx_bytes(to_int8(model, images), about(student, "int8")), "student.int8.onnx")
    assert small(images).shape == (4, 4)
    assert bool(small(images).isfinite().all())
    assert capfd.readouterr() == ("", "")
    assert (list(warnings.filters), logging.root.manager.disable) == before


def test_an_operator_that_onnx_has_not_is_named(tmp_path: Path) -> None:
    student = load_student(left(tmp_path, "exports:bessel"), "float32")
    with pytest.raises(NetworkError, match=r"exports:bessel uses prims\.bessel_j0, which it has not\.$"):
        to_onnx(student)
    compare(student, to_pt2(student), "student.pt2")  # which torch has


def test_a_network_that_decides_by_values_is_no_program(tmp_path: Path) -> None:
    student = load_student(left(tmp_path, "exports:deciding"), "float32")
    for make in (to_onnx, to_pt2):
        with pytest.raises(NetworkError, match="must be one program, but exports:deciding is not: ") as caught:
            make(student)
        assert "\n" not in str(caught.value)


def test_another_students_file_does_not_pass_for_this_ones(tmp_path: Path, files: dict[str, bytes]) -> None:
    data = load_data(DataConfig(name="digits"), "unused")
    other = load_student(left(tmp_path, data=data), "float32")
    with pytest.raises(RunError, match=r"must give the student's logits, but student\.onnx is off by "):
        compare(other, files["onnx"], "student.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_what_is_not_installed_is_named_with_the_remedy(
    student: Student, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"{missing}.*pip install 'dfkt\[export\]'$"):
        to_onnx(student)


def test_only_its_like_is_replaced(tmp_path: Path, files: dict[str, bytes]) -> None:
    storage = Storage(tmp_path)
    check_free(storage, "student.onnx")
    foreign: list[tuple[str, Any]] = [
        ("student.onnx", b"mine"),
        ("student.pt2", b"mine"),
        ("cut.onnx", files["onnx"][:-50]),
    ]
    for name, data in foreign:
        storage.write(name, data)
        with pytest.raises(ConfigError, match="replaces none but its like"):
            check_free(storage, name)
    for kind, name in (("onnx", "student.onnx"), ("pt2", "student.pt2")):
        storage.write(name, files[kind])
        check_free(storage, name)


def test_a_folder_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must exist, but .*none does not"):
        check_free(Storage(tmp_path / "none"), "student.onnx")
    assert list(tmp_path.iterdir()) == []
