"""Networks of a user's own that no run could train, or read, are refused in one line before anything is written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import load_script

from dfkt.cli.main import main
from dfkt.config import NetworkConfig, Placement, TeacherConfig, TrainConfig
from dfkt.data.image_set import ImageSet
from dfkt.errors import InputError, NetworkError
from dfkt.methods.registry import METHODS
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.study.config import StudyConfig, ablations, default_arms
from dfkt.study.opening import check_study
from dfkt.training.config import RunConfig
from dfkt.training.probe import probe
from dfkt.training.run import build_student, check_networks, check_run

PLAIN = NetworkConfig(name="bad_input.odd_networks:Plain")
TRAIN = TrainConfig(epochs=20, batch_size=32)


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def own(name: str) -> NetworkConfig:
    """Return a network of :mod:`bad_input.odd_networks`."""
    return NetworkConfig(name=f"bad_input.odd_networks:{name}")


def run_of(student: NetworkConfig, method: str = "dfkt", teacher: NetworkConfig = PLAIN) -> RunConfig:
    return RunConfig(
        method=METHODS[method](), student=student, teacher=TeacherConfig(network=teacher, train=TRAIN), train=TRAIN
    )


FAULTS = {
    "Two": r"must return finite logits \[B, \d+\] of torch.float32, but returns a tuple in training mode\. Let it return",
    "Named": "but returns a dict in training mode",
    "TwoInTraining": "but returns a tuple in training mode",
    "More": r"but returns \[3, \d+\] for 3 images in training mode. A logit for each class",
    "Spatial": r"but returns \[3, \d+, 1, 1\] for 3 images",
    "Squeezed": r"but returns \[\d+\] for 1 image in evaluation mode",
    "Whole": r"but returns \[3\] for 3 images",
    "Long": "but returns torch.float64 in training mode. Let it compute in the type of its images",
    "Nan": "but returns nan or inf in training mode",
    "Frozen": "has no parameter that requires a gradient, so it cannot learn",
    "Detached": "cannot learn: no gradient reaches a parameter",
    "Overwriting": "must leave its images as they are, but changes them",
    "BrokenGradient": "cannot take 3 images of 1x8x8 in training mode: RuntimeError: .*inplace",
    "Raising": "cannot take .*KeyError: 'no such thing'",
    "Leaving": "cannot take .*SystemExit: 0",
    "Lazy": "must have its shapes when it is built, but fc.weight is lazy",
    "wanting": "Cannot build .*wanting.*TypeError: .*'depth'",
    "raising": "Cannot build .*ZeroDivisionError: 4 classes are too many",
    "leaving": "Cannot build .*SystemExit: this network needs a licence",
    "nothing": "must return a torch.nn.Module, but returned NoneType",
    "Text": "Cannot import .*Text",
}
CUT = {
    "Branching": "cannot be traced by torch.fx .*control flow",
    "Leading": "cannot be traced by torch.fx .*SystemExit: 3",
    "Counting": "must give the same when it is cut behind its taps, but gives something else at low",
    "Noisy": "must give the same when it is cut behind its taps, but gives something else at low",
}
"""Faults of networks that are read at taps; others may use them."""


def refused(config: RunConfig, images: ImageSet, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_run(config, images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["kd", "dfkt"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_student_that_cannot_be_trained_is_refused(images: ImageSet, name: str, method: str) -> None:
    refused(run_of(own(name), method), images, FAULTS[name])


@pytest.mark.parametrize("name", FAULTS)
def test_a_teacher_that_cannot_be_trained_is_refused(images: ImageSet, name: str) -> None:
    refused(run_of(PLAIN, "kd", own(name)), images, FAULTS[name])


def test_a_network_without_weights_is_refused(images: ImageSet) -> None:
    refused(run_of(own("Weightless"), "scratch"), images, "has no parameter that requires a gradient")


@pytest.mark.parametrize("name", CUT)
def test_a_network_that_cannot_be_cut_is_refused_where_taps_are_read_and_taken_where_none_are(
    images: ImageSet, name: str
) -> None:
    refused(run_of(own(name)), images, CUT[name])
    if name != "Noisy":  # a teacher draws none: it is never in training mode where it is read
        refused(run_of(PLAIN, teacher=own(name)), images, CUT[name])
    assert check_run(run_of(own(name), "kd", own(name)), images)


@pytest.mark.parametrize("name", ["Plain", "made", "Idle", "Double", "Half", "Spectral"])
def test_an_unusual_network_that_can_be_trained_is_taken(images: ImageSet, name: str) -> None:
    for method in ("kd", "dfkt", "fsp"):
        assert check_run(run_of(own(name), method, own(name)), images)


def test_a_teacher_must_be_one_that_can_be_copied_a_student_need_not(images: ImageSet) -> None:
    assert check_run(run_of(own("Uncopied")), images)
    refused(run_of(PLAIN, "kd", own("Uncopied")), images, "cannot be copied and frozen: TypeError: there is only one")


def test_a_users_teacher_that_is_trained_need_not_learn(images: ImageSet) -> None:
    torch.save(build_network(own("Frozen"), num_classes=4, in_channels=1).state_dict(), "own.pt")
    config = run_of(PLAIN, teacher=own("Frozen"))
    assert check_run(replace(config, teacher=replace(config.teacher, checkpoint="own.pt")), images)


@pytest.mark.parametrize("name", ["Double", "Half"])
def test_weights_of_another_precision_are_those_of_a_run_from_the_beginning(images: ImageSet, name: str) -> None:
    network = build_network(own(name), num_classes=4, in_channels=1)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    check_networks(own(name), None, images, precision="float64")
    with pytest.raises(NetworkError, match=r"of torch.float64, but returns torch.float32"):
        check_networks(own("Single"), None, images, precision="float64")


@pytest.mark.parametrize("taps", [None, ("low", "high")], ids=["three", "two"])
def test_few_taps_are_enough_for_every_method_and_all_that_a_study_draws_by_itself(
    images: ImageSet, taps: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = replace(PLAIN, taps=taps)
    for method in METHODS:
        assert check_run(run_of(network, method, network), images)
    arms = default_arms()
    arms += ablations(arms[-1], ("dense", "adjacent", "joint", *(("sliding",) if taps is None else ())))
    teacher = TeacherConfig(network=network, train=TRAIN)
    study = StudyConfig(name="s", student=network, teacher=teacher, train=TRAIN, arms=arms)
    monkeypatch.setattr("dfkt.study.opening.images_for", lambda config, placement: images)
    monkeypatch.setattr("dfkt.study.opening.check_test", lambda *given: None, raising=False)
    found = check_study(study, Storage("s"), Placement(), lambda line: None)
    assert found.taps.count == (3 if taps is None else 2)


MODULES = {
    "raises": ("raise OSError('no\\nweights here')", "Cannot import 'odd_raises:net': OSError: no weights here"),
    "exits": ("import sys; sys.exit(1)", "Cannot import 'odd_exits:net': it is a script that ends when imported"),
    "is_broken": ("def net(:", "Cannot import 'odd_is_broken:net': SyntaxError"),
    "has_no_such": ("def other(): pass", "Cannot import 'odd_has_no_such:net': AttributeError"),
    "has_a_number": ("net = 3", "Cannot build network 'odd_has_a_number:net': TypeError"),
    "imports_none": ("import nowhere_at_all", "Cannot import 'odd_imports_none:net': ModuleNotFoundError"),
}


@pytest.mark.parametrize("case", MODULES)
def test_a_module_that_gives_no_network_is_refused(images: ImageSet, tmp_path: Path, case: str) -> None:
    text, message = MODULES[case]
    (tmp_path / f"odd_{case}.py").write_text(text)
    refused(run_of(NetworkConfig(name=f"odd_{case}:net"), "kd"), images, message)


def test_what_is_tried_is_left_as_it_was_and_draws_nothing_of_the_process(images: ImageSet) -> None:
    student = build_student(own("Spectral"), images, seed=0)
    student.network.eval()
    before = torch.get_rng_state()
    probe(student, "it", images, "auto", learns=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in student.network.modules())
    assert all(not module._forward_hooks for module in student.network.modules())
    assert all(parameter.grad is None for parameter in student.network.parameters())


def commands(name: str) -> dict[str, list[str]]:
    """Return a command line of everything that trains, with a network."""
    odd = own(name).name
    tiny = ["--data", "digits", "--limit-train", "300", "--limit-test", "60", "--batch-size", "64"]
    kept = ["--teacher-root", "teachers"]
    return {
        "distill": ["distill", *tiny, *kept, "--student", odd, "--teacher", PLAIN.name, "--out", "out"],
        "distill by": ["distill", *tiny, *kept, "--student", PLAIN.name, "--teacher", odd, "--out", "out"],
        "study": ["study", *tiny, *kept, "--student", odd, "--teacher", PLAIN.name, "--name", "s"],
        "teacher": ["teacher", *tiny, *kept, "--teacher", odd],
        "compare": [*tiny, *kept, "--pairs", f"{PLAIN.name}:{odd}", "--results", "out"],
    }


@pytest.mark.parametrize("command", commands(""))
@pytest.mark.parametrize("name", ["Two", "Leaving", "leaving", "Frozen"])
def test_a_command_says_so_in_one_line_and_leaves_no_file(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = commands(name)[command]
    script = load_script(Path(__file__).parents[2] / "studies" / "compare.py") if command == "compare" else None
    assert (main(argv) if script is None else script.main(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert name in line
    assert [*tmp_path.rglob("*")] == []
