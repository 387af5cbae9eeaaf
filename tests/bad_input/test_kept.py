"""What the program left itself and finds damaged: it is made again where it can be, and said so; else a clear line."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import synthetic_images
from small_runs import timeless

from dfkt.config import DataConfig, NetworkConfig, Placement, TeacherConfig, TrainConfig
from dfkt.data.image_set import ImageSet
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import build_network
from dfkt.training.config import RunConfig
from dfkt.training.run import Job, Payload, run_job
from dfkt.training.state import hash_weights
from dfkt.training.teacher import Teacher, find_teacher

SMALL = NetworkConfig(name="resnet8", width=0.25)
CONFIG = TeacherConfig(network=SMALL, train=TrainConfig(epochs=2, batch_size=32))


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(width: float = 0.25) -> dict[Any, Any]:
    torch.manual_seed(0)
    network = build_network(replace(SMALL, width=width), num_classes=4, in_channels=1)
    return dict(network.state_dict())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Teacher]:
    """A folder with a trained teacher, and the teacher."""
    root = tmp_path_factory.mktemp("teachers")
    teacher = find_teacher(CONFIG, synthetic_images(), Placement(teacher_root=str(root)), lambda line: None)
    (folder,) = root.iterdir()
    return folder, teacher


@pytest.fixture
def kept(trained: tuple[Path, Teacher], tmp_path: Path) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(trained[0], tmp_path / "teachers" / trained[0].name))


def other(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps(about | changes))


def without(folder: Path, name: str) -> None:
    about = json.loads((folder / "teacher.json").read_text())
    del about[name]
    (folder / "teacher.json").write_text(json.dumps(about))


def save(folder: Path, state: Any) -> None:
    torch.save(state, folder / "teacher.pt")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda f: (f / "teacher.pt").write_bytes((f / "teacher.pt").read_bytes()[:1000]),
    "empty": lambda f: (f / "teacher.pt").write_bytes(b""),
    "text": lambda f: (f / "teacher.pt").write_text("hello"),
    "other shapes": lambda f: save(f, weights(width=0.5)),
    "nan": lambda f: save(f, weights() | {"fc.bias": torch.full((4,), float("nan"))}),
    "sparse": lambda f: save(f, weights() | {"fc.bias": torch.ones(4).to_sparse()}),
    "integer keys": lambda f: save(f, dict(enumerate(weights().values()))),
    "mixed keys": lambda f: save(f, weights() | {5: torch.ones(1)}),
    "no tensors": lambda f: save(f, dict.fromkeys(weights(), 1)),
    "a list": lambda f: save(f, [1]),
    "garbage": lambda f: (f / "teacher.json").write_text("{"),
    "no text": lambda f: (f / "teacher.json").write_bytes(b"\xff\xfe\x00"),
    "empty description": lambda f: (f / "teacher.json").write_text(""),
    "a list of nothing": lambda f: (f / "teacher.json").write_text("[]"),
    "no accuracy": lambda f: without(f, "val_accuracy"),
    "no seconds": lambda f: without(f, "seconds"),
    "an accuracy that is none": lambda f: other(f, val_accuracy="high"),
    "nan accuracy": lambda f: other(f, val_accuracy=float("nan")),
    "null seconds": lambda f: other(f, seconds=None),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_kept_teacher_that_is_damaged_is_trained_again_and_said_so(
    images: ImageSet, kept: Path, trained: tuple[Path, Teacher], case: str
) -> None:
    DAMAGES[case](kept)
    placement, lines = Placement(teacher_root=str(kept.parent)), list[str]()
    teacher = find_teacher(CONFIG, images, placement, lines.append)
    assert teacher.key == trained[1].key == hash_weights(torch.load(kept / "teacher.pt", weights_only=True))
    assert [line for line in lines if "damaged" in line] == lines[:1]
    assert lines[0].startswith(f"the teacher in {kept} is damaged, so it is trained again (")
    assert "\n" not in lines[0]
    lines.clear()
    assert find_teacher(CONFIG, images, placement, lines.append).key == teacher.key
    assert "found in" in lines[0]


class StopHereError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def midway(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a teacher's training that was stopped in the middle."""
    root = tmp_path_factory.mktemp("midway")

    def stop(line: str) -> None:
        if "epoch 1/" in line:
            raise StopHereError

    with pytest.raises(StopHereError):
        find_teacher(CONFIG, synthetic_images(), Placement(teacher_root=str(root)), stop)
    (folder,) = root.iterdir()
    return (folder / "state.pt").read_bytes()


def spoilt(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Return what changes a checkpoint that remains a file of torch."""

    def spoil(saved: bytes) -> bytes:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        change(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    return spoil


def momentum(state: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state of the first parameter."""
    first: dict[str, Any] = next(iter(state["optimizer"]["state"].values()))
    return first


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda saved: saved[:1000],
    "empty": lambda saved: b"",
    "text": lambda saved: b"hello",
    "nothing in it": spoilt(lambda s: s.clear()),
    **{f"no {name}": spoilt(lambda s, name=name: s.pop(name)) for name in ("student", "adapters", "optimizer", "ends")},
    **{
        f"no {name}": spoilt(lambda s, name=name: s.pop(name))
        for name in ("step", "index", "average", "device_seconds")
    },
    "weights of other shapes": spoilt(lambda s: s.update(student=weights(width=0.5))),
    "weights that are none": spoilt(lambda s: s.update(student=[1, 2])),
    "a weight that is none": spoilt(lambda s: s["student"].update({"fc.bias": 3})),
    "nan": spoilt(lambda s: s["student"]["fc.bias"].fill_(float("nan"))),
    "a step of text": spoilt(lambda s: s.update(step="3")),
    "a step beyond the end": spoilt(lambda s: s.update(step=10**6)),
    "another schedule": spoilt(lambda s: s.update(ends=[7])),
    "seconds of text": spoilt(lambda s: s.update(device_seconds="long")),
    "an optimizer of text": spoilt(lambda s: s.update(optimizer="sgd")),
    "an optimizer without state": spoilt(lambda s: s.update(optimizer=None)),
    "an optimizer of fewer": spoilt(lambda s: s["optimizer"]["param_groups"][0]["params"].pop()),
    "an optimizer of other shapes": spoilt(lambda s: momentum(s).update(momentum_buffer=torch.ones(1))),
    "an optimizer of another kind": spoilt(lambda s: s["optimizer"]["param_groups"][0].update(momentum=0.5)),
    "an average of other shapes": spoilt(lambda s: s.update(average={"weights": [torch.ones(1)], "steps": 1})),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_training_whose_checkpoint_is_damaged_begins_anew_and_says_so(
    images: ImageSet, trained: tuple[Path, Teacher], midway: bytes, case: str
) -> None:
    folder = Path("teachers").absolute() / trained[0].name
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(SPOILT[case](midway))
    lines: list[str] = []
    teacher = find_teacher(CONFIG, images, Placement(teacher_root="teachers"), lines.append)
    assert teacher.key == trained[1].key
    assert [line for line in lines if "damaged" in line] == lines[:1]
    assert lines[0].startswith(f"checkpoint {folder}/state.pt is damaged, training begins anew (")
    assert sum("teacher epoch" in line for line in lines) == 2


def test_a_whole_checkpoint_is_gone_on_from(images: ImageSet, trained: tuple[Path, Teacher], midway: bytes) -> None:
    folder = Path("teachers").absolute() / trained[0].name
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(spoilt(lambda state: None)(midway))
    lines: list[str] = []
    assert find_teacher(CONFIG, images, Placement(teacher_root="teachers"), lines.append).key == trained[1].key
    assert sum("teacher epoch" in line for line in lines) == 1


RUN = RunConfig(
    method=Scratch(),
    data=DataConfig(name="digits", limit_train=300, limit_test=60),
    student=SMALL,
    train=TrainConfig(epochs=2, batch_size=128),
)


def run(stop: int = 0) -> list[Payload]:
    """Run in the current folder, or stop at a report; return the reports."""
    reports: list[Payload] = []

    def report(payload: Payload) -> None:
        reports.append(payload)
        if len(reports) == stop:
            raise StopHereError

    job = Job(RUN, Placement(), "run", None)
    if stop:
        with pytest.raises(StopHereError):
            run_job(job, report)
    else:
        run_job(job, report)
    return reports


def records(reports: list[Payload]) -> list[dict[str, Any]]:
    return [timeless(record) for payload in reports for record in payload["records"]]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, Any]]]:
    """The checkpoint of a run that was stopped at its first report, and the records of a whole one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        expected = records(run())
        patch.chdir(tmp_path_factory.mktemp("stopped"))
        run(stop=1)
        return Path("run/state.pt").read_bytes(), expected


RUNS: dict[str, Callable[[bytes], bytes]] = {
    **{name: SPOILT[name] for name in ("cut off", "nothing in it", "weights of other shapes", "an optimizer of fewer")},
    **{f"no {name}": spoilt(lambda s, name=name: s.pop(name)) for name in ("key", "history", "clock", "index")},
    "a history of text": spoilt(lambda s: s.update(history="long")),
    "an empty history": spoilt(lambda s: s.update(history=[])),
    "a record of text": spoilt(lambda s: s.update(history=["first"])),
    "a record without its phase": spoilt(lambda s: s["history"][0].pop("phase")),
    "attempts of text": spoilt(lambda s: s["clock"].update(attempts="two")),
    "no start": spoilt(lambda s: s["clock"].pop("started")),
    "seconds of nothing": spoilt(lambda s: s["clock"].update(wall_seconds=None)),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_whose_checkpoint_is_damaged_begins_anew(
    begun: tuple[bytes, list[dict[str, Any]]], case: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(RUNS[case](begun[0]))
    reports = run()
    assert records(reports) == begun[1]
    assert (reports[-1]["complete"], reports[-1]["attempts"]) == (True, 1)


def test_a_whole_checkpoint_of_a_run_is_gone_on_from(begun: tuple[bytes, list[dict[str, Any]]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(spoilt(lambda state: None)(begun[0]))
    reports = run()
    assert records(reports) == begun[1]
    assert reports[-1]["attempts"] == 2
