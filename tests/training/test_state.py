"""States as bytes, draws that belong to one run, and users' weights in all shapes that people save."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import same
from torch import nn

from dfkt.errors import CheckpointError, InputError
from dfkt.store.files import Storage
from dfkt.training.state import (
    draw_seed,
    hash_weights,
    load_state,
    load_weights,
    own_random,
    read_weights,
    save_state,
)

CPU = torch.device("cpu")


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
    assert same(back["student"], network().state_dict())
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


def test_draws_of_ones_own_follow_the_seed_and_leave_the_process_where_it_was():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    found = []
    for seed in (7, 7, 8):
        with own_random(seed, CPU):
            found.append(torch.rand(2))

    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.rand(3), expected)


def test_the_process_goes_on_where_it_was_after_an_error_too():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shape"), own_random(3, CPU):
        torch.rand(2).reshape(3)

    assert torch.equal(torch.get_rng_state(), before)


def test_every_seed_step_and_worker_draws_its_own():
    seeds = {draw_seed(seed, step, rank) for seed in (0, 1, 2**63 - 1) for step in range(5) for rank in range(4)}

    assert len(seeds) == 3 * 5 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(1, 2, 3) == draw_seed(1, 2, 3)


def test_a_hash_names_weights_to_the_last_bit_whatever_their_order_and_memory():
    weights = dict(network().state_dict())
    name = hash_weights(weights)
    one_bit = {n: v.clone() for n, v in weights.items()}
    one_bit["0.weight"].view(torch.int32)[0, 0] ^= 1
    turned = weights | {"0.weight": weights["0.weight"].T.contiguous().T}
    others = [
        one_bit,
        weights | {"0.weight": weights["0.weight"].double()},
        weights | {"0.weight": weights["0.weight"].reshape(3, 2)},
        {("1.weight" if n == "1.bias" else "1.bias" if n == "1.weight" else n): v for n, v in weights.items()},
        {n: v for n, v in weights.items() if n != "1.num_batches_tracked"},
    ]

    assert len(name) == 12
    assert hash_weights(dict(reversed(weights.items()))) == hash_weights(turned) == name
    assert not turned["0.weight"].is_contiguous()
    assert len({name, *map(hash_weights, others)}) == 1 + len(others)


def test_weights_of_every_type_have_a_hash():
    weights = {"b": torch.ones(2, dtype=torch.bfloat16), "t": torch.tensor(True), "e": torch.ones(0)}
    assert hash_weights(weights) != hash_weights(weights | {"t": torch.tensor(False)})


def prefixed(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


WRAPPED = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w, "optimizer": {}},
    "student": lambda w: {"student": w, "step": 3},
    "nested": lambda w: {"state_dict": {"model": w}},
    "DataParallel": lambda w: prefixed(w, "module."),
    "DataParallel in state_dict": lambda w: {"state_dict": prefixed(w, "module."), "arch": "resnet26"},
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled, then DataParallel": lambda w: prefixed(w, "module._orig_mod."),
    "DataParallel, then compiled": lambda w: {"model": prefixed(w, "_orig_mod.module.")},
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_users_weights_are_found_in_every_usual_wrapping(tmp_path, wrap):
    expected = network().state_dict()
    path = str(tmp_path / "teacher.pt")
    torch.save(WRAPPED[wrap](dict(expected)), path)
    weights = read_weights(path)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    load_weights(other, weights, path, "the teacher")

    assert weights.keys() == expected.keys()
    assert same(other.state_dict(), expected)


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
    assert "Checkpoint own.pt does not fit resnet8 for 4 classes: " in str(error.value)
    assert problem in str(error.value)
    assert same(own.state_dict(), network().state_dict())


def test_what_a_network_has_of_itself_may_be_infinite_but_no_weight():
    own = network()
    own.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    load_weights(own, dict(own.state_dict()), "own.pt", "it")
    with pytest.raises(CheckpointError, match=r"0\.bias holds nan or inf"):
        load_weights(own, own.state_dict() | {"0.bias": torch.tensor([0.0, float("-inf")])}, "own.pt", "it")
