"""Teachers that cannot teach: a user's file is refused in one line, what can be made again is made again."""

import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkt.cli.main import main
from dfkt.config import NetworkConfig, Placement, TeacherConfig, TrainConfig
from dfkt.data.image_set import ImageSet
from dfkt.errors import CheckpointError, InputError
from dfkt.methods.kd import Kd
from dfkt.networks.build import build_network
from dfkt.training.config import RunConfig
from dfkt.training.run import check_run
from dfkt.training.teacher import find_teacher

SMALL = NetworkConfig(name="resnet8", width=0.25)
CONFIG = TeacherConfig(network=SMALL, train=TrainConfig(epochs=2, batch_size=32))
Weights = dict[Any, Any]


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(name: str = "resnet8", classes: int = 4, channels: int = 1, width: float = 0.25) -> Weights:
    torch.manual_seed(0)
    network = build_network(NetworkConfig(name=name, width=width), num_classes=classes, in_channels=channels)
    return dict(network.state_dict())


def changed(change: Callable[[Tensor], Any], name: str = "fc.weight") -> Callable[[], Weights]:
    """Return what makes a teacher's weights with one of them changed."""
    return lambda: {key: change(value) if key == name else value for key, value in weights().items()}


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def fill(tensor: Tensor) -> Tensor:
        found = tensor.clone().double()
        found.view(-1)[0] = value
        return found

    return fill


SAVED: dict[str, tuple[Callable[[], Any], str]] = {
    "nan": (
        changed(filled(float("nan"))),
        "does not fit resnet8 for 4 classes and 1 channels: fc.weight holds nan or inf",
    ),
    "inf": (changed(filled(float("-inf")), "layer1.0.bn1.running_var"), "running_var holds nan or inf"),
    "too large for its type": (changed(filled(1e300)), "fc.weight holds nan or inf"),
    "negative variance": (
        changed(lambda v: -v, "stem.bn.running_var"),
        "must return finite logits .* returns nan or inf",
    ),
    "integer keys": (
        lambda: dict(enumerate(weights().values())),
        "[0-9]+ missing, such as .*; [0-9]+ unexpected, such as 0",
    ),
    "mixed keys": (lambda: {**weights(), 5: torch.ones(1)}, "1 unexpected, such as 5"),
    "sparse": (changed(lambda v: v.to_sparse()), "fc.weight is a sparse tensor"),
    "meta": (changed(lambda v: v.to("meta")), "fc.weight is a meta tensor, without values"),
    "complex": (changed(lambda v: v.to(torch.complex64)), "fc.weight is of torch.complex64 instead of torch.float32"),
    "integer weights": (changed(lambda v: v.to(torch.int64)), "fc.weight is of torch.int64 instead of torch.float32"),
    "float counts": (
        changed(lambda v: v.float(), "stem.bn.num_batches_tracked"),
        "num_batches_tracked is of torch.float32 instead of torch.int64",
    ),
    "another depth": (
        lambda: weights("resnet14"),
        "unexpected, such as .*saved of .--teacher., trained for these classes",
    ),
    "another width": (lambda: weights(width=0.5), "has shape .* instead of"),
    "other classes": (lambda: weights(classes=7), r"fc.* has shape \(7.*\) instead of \(4.*\)\. Take the network"),
    "other channels": (lambda: weights(channels=3), r"has shape \(.*3, 3, 3\) instead of"),
    "fewer": (lambda: {"fc.weight": weights()["fc.weight"]}, "missing, such as"),
    "no tensors": (lambda: {"epoch": 3}, "must hold a state dict, but holds dict"),
    "a list": (lambda: [1, 2], "must hold a state dict, but holds list"),
    "a whole network": (lambda: nn.Linear(2, 2), "holds more than weights; save the state_dict.. alone"),
    "code": (lambda: Malicious(), "holds more than weights; save the state_dict.. alone"),
}


class Malicious:
    """Would make a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def refused(path: Path | str, images: ImageSet, message: str) -> None:
    """Check that a file is refused by a run's check and by the search for a teacher, and nothing else is there."""
    config = replace(CONFIG, checkpoint=str(path))
    before = sorted(map(str, Path.cwd().rglob("*")))
    run = RunConfig(method=Kd(), student=SMALL, teacher=config, train=CONFIG.train)
    asks: list[Callable[[], Any]] = [
        lambda: check_run(run, images),
        lambda: find_teacher(config, images, Placement(teacher_root="teachers"), print),
    ]
    for ask in asks:
        with pytest.raises(InputError, match=message) as error:
            ask()
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        assert "weights_only" not in str(error.value)
    assert sorted(map(str, Path.cwd().rglob("*"))) == before


@pytest.mark.parametrize("case", SAVED)
def test_a_file_of_torch_that_holds_no_such_weights_is_refused(images: ImageSet, case: str) -> None:
    make, message = SAVED[case]
    torch.save(make(), "own.pt")
    refused("own.pt", images, message)


def cut_off() -> bytes:
    buffer = io.BytesIO()
    torch.save(weights(), buffer)
    return buffer.getvalue()[:2000]


def legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save(weights(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()[:2000]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "text": (lambda: b"epoch,val\n1,0.5\n", "torch.save did not write it"),
    "zeros": (lambda: bytes(5000), "torch.save did not write it"),
    "cut off": (cut_off, "it is damaged or cut off"),
    "cut off, of an earlier torch": (legacy, "it is damaged"),
    "another archive": (zipped, "it is damaged or cut off"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_torch_cannot_read_is_refused_without_its_advice(images: ImageSet, case: str) -> None:
    make, message = FILES[case]
    Path("own.pt").write_bytes(make())
    refused("own.pt", images, f"must be a state dict saved by torch.save, but cannot be read: {message}")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_network_that_was_scripted_is_refused(images: ImageSet) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2), check_trace=False).save("own.pt")
    refused("own.pt", images, "it is a TorchScript archive; save the state_dict")


def test_what_is_no_file_is_refused_and_a_pipe_is_not_waited_for(images: ImageSet) -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for path in ("folder", "pipe", "/dev/null"):
        refused(path, images, "must be a file, but is a folder or a device")
    for path in ("absent.pt", "x" * 300, "folder/own.pt"):
        refused(path, images, "does not exist")


def test_published_weights_of_other_classes_are_refused_with_a_remedy(images: ImageSet) -> None:
    published = NetworkConfig(name="torchvision:squeezenet1_1")
    with torch.device("meta"):
        network = build_network(published, num_classes=1000, in_channels=3)
    torch.save({n: torch.zeros(v.shape) for n, v in network.state_dict().items()}, "published.pth")
    config = TeacherConfig(network=published, checkpoint="published.pth")
    run = RunConfig(method=Kd(), student=SMALL, teacher=config, train=CONFIG.train)
    with pytest.raises(CheckpointError, match=r"for 4 classes and 1 channels: .* instead of .*--teacher.*classes"):
        check_run(run, images)


DIGITS = ["--data", "digits", "--limit-train", "300", "--limit-test", "60", "--batch-size", "64"]
OWN = ["--teacher", "resnet8", "--teacher-width", "0.25", "--teacher-checkpoint", "own.pt"]


@pytest.mark.parametrize("command", ["distill", "study", "teacher"])
def test_a_command_says_so_in_one_line_and_leaves_no_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({n: v * float("nan") if n == "fc.bias" else v for n, v in weights(classes=10).items()}, "own.pt")
    assert main([command, *DIGITS, *OWN, "--teacher-root", "teachers"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "fc.bias holds nan or inf" in line
    assert [*tmp_path.iterdir()] == [tmp_path / "own.pt"]
