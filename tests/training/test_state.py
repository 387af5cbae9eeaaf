"""States as bytes, and users' weights in all shapes that people save."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkt.training.state import load_state, load_weights, random_state, read_weights, save_state, set_random_state
from dfkt.errors import CheckpointError, InputError
from dfkt.store.files import Storage


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_a_state_comes_back_as_it_was(tmp_path):
    folder = Storage(tmp_path)
    state = {"student": network().state_dict(), "step": 3, "optimizer": None, "history": [{"loss": 0.5, "stage": None}]}
    save_state(folder, state)
    back = load_state(folder)

    assert back is not None
    assert (back["step"], back["optimizer"], back["history"]) == (3, None, state["history"])
    assert all(torch.equal(value, back["student"][name]) for name, value in network().state_dict().items())
    assert folder.names() == ["state.pt"]


def test_where_nothing_was_written_nothing_is_found(tmp_path):
    assert load_state(Storage(tmp_path)) is None
    assert load_state(Storage(tmp_path / "absent")) is None


def test_names_keep_states_apart(tmp_path):
    folder = Storage(tmp_path)
    save_state(folder, {"step": 1})
    save_state(folder, {"step": 2}, "student.pt")

    assert load_state(folder) == {"step": 1}
    assert load_state(folder, "student.pt") == {"step": 2}


@pytest.mark.parametrize("keep", [0, 10, 300], ids=["empty", "head", "cut off"])
def test_a_damaged_state_is_named_with_a_remedy(tmp_path, keep):
    folder = Storage(tmp_path)
    save_state(folder, {"student": network().state_dict()})
    file = tmp_path / "state.pt"
    file.write_bytes(file.read_bytes()[:keep])

    with pytest.raises(CheckpointError, match=rf"Checkpoint {tmp_path}/state.pt cannot be read .*delete it"):
        load_state(folder)


def test_random_numbers_go_on_where_they_were():
    states = random_state()
    first = torch.rand(3)
    torch.rand(5)
    set_random_state(states)

    assert torch.equal(torch.rand(3), first)


def prefixed(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model": w, "optimizer": {}},
        lambda w: {"student": w, "step": 3},
        lambda w: {"state_dict": {"model": w}},
        lambda w: prefixed(w, "module."),
        lambda w: {"state_dict": prefixed(w, "module."), "arch": "resnet26"},
    ],
    ids=["bare", "state_dict", "model", "student", "nested", "DataParallel", "DataParallel in state_dict"],
)
def test_a_users_weights_are_found_in_every_usual_wrapping(tmp_path, wrap):
    expected = network().state_dict()
    path = str(tmp_path / "teacher.pt")
    torch.save(wrap(dict(expected)), path)
    weights = read_weights(path)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    load_weights(other, weights, path, "the teacher")

    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "must be a state dict saved by torch.save, but cannot be read: ."),
        (b"not a checkpoint at all", "must be a state dict saved by torch.save, but cannot be read: ."),
        ([1, 2], "must hold a state dict, but holds list"),
        ({}, "must hold a state dict"),
        ({"epoch": 3}, "must hold a state dict"),
        (network(), "must be a state dict saved by torch.save, but cannot be read: ."),
    ],
    ids=["absent", "empty", "text", "list", "empty dict", "no tensors", "a whole network"],
)
def test_a_file_without_weights_is_named_with_the_reason(tmp_path, content, message):
    path = tmp_path / "teacher.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)

    with pytest.raises(CheckpointError, match=f"Teacher checkpoint {path} {message}") as error:
        read_weights(str(path))
    assert "\n" not in str(error.value)
    assert isinstance(error.value, InputError)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_weights(str(tmp_path))


def without(name: str) -> dict[str, torch.Tensor]:
    return {n: v for n, v in network().state_dict().items() if n != name}


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (without("0.bias"), "1 missing, such as 0.bias"),
        (network().state_dict() | {"fc.weight": torch.ones(1)}, "1 unexpected, such as fc.weight"),
        (without("0.bias") | {"0.weight": torch.ones(4, 3)}, "1 missing, such as 0.bias; 0.weight has shape (4, 3)"),
        (network().state_dict() | {"0.weight": torch.ones(4, 3)}, "0.weight has shape (4, 3) instead of (2, 3)"),
    ],
    ids=["missing", "unexpected", "two problems", "shape"],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path: Path, weights, problem):
    own = network()

    with pytest.raises(CheckpointError) as error:
        load_weights(own, weights, "own.pt", "resnet8 for 4 classes")
    assert "Teacher checkpoint own.pt does not fit resnet8 for 4 classes: " in str(error.value)
    assert problem in str(error.value)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in network().state_dict().items())
