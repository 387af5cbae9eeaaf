"""A file that is no student of ours is refused on one line, before anything is made of it."""

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfkt.errors import CheckpointError, ConfigError
from dfkt.store.files import Storage
from dfkt.students.exported import FORMAT, as_extra, as_properties, open_bytes, open_exported

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SAYS: dict[str, Any] = {
    "format": FORMAT, "version": "1", "kind": "onnx", "input": "", "network": {"name": "none"}, "classes": ["dark", "é"],
    "input_size": [1, 2, 2], "mean": [0.5], "std": [0.5], "weights": "abc", "test_accuracy": None,
}  # fmt: skip


def made(**changed: Any) -> bytes:
    """Return a file of a student that adds 255 up: its logits are the sums over a row of the image."""
    given, gives = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("images", (1, 2, 2)), ("logits", (2,)))
    )
    axes = onnx.numpy_helper.from_array(np.array([1, 3]), "axes")
    node = onnx.helper.make_node("ReduceSum", ["images", "axes"], ["logits"], keepdims=0)
    graph = onnx.helper.make_graph([node], "sums", [given], [gives], [axes])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    says = {name: value for name, value in (SAYS | changed).items() if value != "gone"}
    onnx.helper.set_model_props(model, as_properties(says))
    return bytes(model.SerializeToString())


def test_a_file_answers_and_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(made())
    found = open_exported(Storage(tmp_path), "a.onnx")
    assert (found.classes, found.input_size, found.size) == (("dark", "é"), (1, 2, 2), len(made()))
    assert found(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]] * 3)).tolist() == [[3.0, 7.0]] * 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read as a student in ONNX"),
        (b"no model", "cannot be read as a student in ONNX"),
        (made()[:-200], "cannot be read as a student in ONNX"),
        (made(format="gone"), "must be a file of `dfkt export`"),
        (made(format=99), f"format must be {FORMAT}, but a.onnx has 99"),
        (made(classes="gone"), "what it says of itself is incomplete"),
        (made(classes=[]), "what it says of itself is incomplete"),
        (made(input_size=[1, 2]), "what it says of itself is incomplete"),
        (made(input_size=7), "cannot be read as an exported student"),
    ],
)
def test_other_files_in_onnx_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        open_bytes(data, "a.onnx")
    assert "\n" not in str(caught.value)


def packed(**texts: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, text in texts.items():
            file.writestr(zipfile.ZipInfo(f"archive/extra/{name}.json"), text)  # of no time: the bytes name a test
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no archive", "cannot be read as a student of torch.export"),
        (packed(), "must be a file of `dfkt export`"),
        (packed(other="{}"), "must be a file of `dfkt export`"),
        (packed(dfkt="{"), "cannot be read as a student of torch.export"),
        (packed(dfkt=json.dumps({"dfkt.format": "99"})), f"format must be {FORMAT}"),
        (
            packed(dfkt=as_extra(SAYS)["dfkt.json"]),
            "cannot be read as a student of torch.export",
        ),  # and nothing else is in it
    ],
)
def test_other_files_of_torch_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        open_bytes(data, "a.pt2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "said"), [("a.onnx", "there is none at"), ("a.pth", r"must end in \.onnx or \.pt2")])
def test_a_file_that_is_absent_or_of_another_kind_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_exported(Storage(tmp_path), name)


def test_without_its_runtime_a_file_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime.*pip install 'dfkt\[export\]'$"):
        open_bytes(made(), "a.onnx")
