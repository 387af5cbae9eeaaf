"""Several workers give what one gives: gradients, losses, statistics; and what one sees go wrong ends all.

The workers are processes of their own (``parallel_runs``); all cases share one start of them.
"""

import contextlib
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import synthetic_images
from parallel_runs import APART, BARE, CASES, PATIENCE, Seen, observe, started
from small_runs import build
from torch import nn

from dfkt.training.parallel import Group, SynchronisedBatchNorm, synchronise_batch_norms

pytestmark = pytest.mark.xdist_group("workers")  # the processes of a run are started once for the whole file

SCRIPT = Path(__file__).parents[1] / "parallel_runs.py"
WORLDS = (2, 3)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """What every worker saw, by number of workers and rank."""
    folder = tmp_path_factory.mktemp("workers")
    command = [sys.executable, str(SCRIPT)]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context((folder / f"{rank}.log").open("w+")) for rank in range(3)]
        processes = [
            stack.enter_context(subprocess.Popen([*command, str(rank), str(folder)], stderr=log))
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            stack.callback(process.kill)
        codes = [process.wait(4 * PATIENCE.total_seconds()) for process in processes]
    said = "\n".join((folder / f"{rank}.log").read_text() for rank in range(3))
    assert codes == [0, 0, 0], said[-3000:]
    assert not said.strip()  # a warning would be one for every user of several workers
    return {(world, rank): torch.load(folder / f"{world}-{rank}.pt") for world in WORLDS for rank in range(world)}


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between tensors, over the largest value."""
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    return max(float((ours[name] - value).abs().max()) for name, value in theirs.items()) / largest


def assert_alike(ours: dict[str, Any], theirs: dict[str, Any], *, measured: bool) -> None:
    """Compare two records; without ``measured``, but for what batch norms without statistics make of batches of val."""
    names = [name for name in theirs if measured or not name.startswith("val_")]
    numbers = [name for name in names if isinstance(theirs[name], float)]
    assert {"loss", "lr"} <= set(numbers)
    assert [ours[name] for name in numbers] == pytest.approx([theirs[name] for name in numbers], rel=1e-9, abs=1e-12)
    assert [ours[name] for name in names if name not in numbers] == [
        theirs[name] for name in names if name not in numbers
    ]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", [name for name in CASES if name != APART])
def test_several_workers_give_what_one_gives(workers, name):
    case = CASES[name]
    alone: Seen = observe(started(case))

    assert [s["record"]["phase"] for s in alone][-1] == "task"
    for rank in range(case.world):
        seen = workers[case.world, rank][name]
        assert len(seen) == len(alone)
        for ours, theirs in zip(seen, alone, strict=True):
            assert differences(ours["gradients"], theirs["gradients"]) < 1e-9
            assert differences(ours["weights"], theirs["weights"]) < 1e-9
            assert_alike(ours["record"], theirs["record"], measured=case.student != BARE)


def test_the_cases_hold_stages_of_both_kinds_adapters_and_shares_that_differ():
    phases = {stage.phase for case in CASES.values() for stage in started(case).schedule}
    adapted = [name for name, case in CASES.items() if started(case).adapters]

    assert phases == {"task", "flow", "hint"}
    assert len(adapted) >= 8
    assert {len({Group(rank, c.world).share(c.batch_size) for rank in range(c.world)}) for c in CASES.values()} == {
        1,
        2,
    }


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_statistics_apart_give_other_gradients_and_agree_at_the_end_of_an_epoch(workers):
    alone = observe(started(CASES[APART]))
    first, second = (workers[2, rank][APART] for rank in range(2))

    assert differences(first[0]["gradients"], alone[0]["gradients"]) > 1e-3
    for ours, theirs in zip(first, second, strict=True):
        assert differences(ours["weights"], theirs["weights"]) < 1e-12
        assert ours["record"] == theirs["record"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_one_worker_sees_go_wrong_ends_all_at_once_with_the_same_message(workers):
    ends = [workers[2, rank]["nan of one"] for rank in range(2)]

    assert ends[0] == ends[1]
    assert ends[0].startswith(
        "NonFiniteLossError: The loss became nan or inf in task stage, epoch 1, step 1 (task nan)"
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_resumed_run_of_several_workers_equals_an_uninterrupted_one_though_each_drops_its_own(workers):
    assert workers[2, 0]["resumed"]
    assert workers[2, 1]["resumed"]
    assert not torch.equal(workers[2, 0]["drops"], workers[2, 1]["drops"])


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_workers_read_what_the_teacher_said_to_their_shares_to_the_last_bit(workers):
    assert workers[2, 0]["kept"]
    assert workers[2, 1]["kept"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_workers_with_another_number_of_batches_do_not_wait_for_each_other_in_evaluation(workers):
    assert workers[2, 0]["evaluated apart"] == workers[2, 1]["evaluated apart"]


def test_shares_add_up_to_the_number_of_workers():
    for world in (1, 2, 3, 7):
        shares = [Group(rank, world).share(15) for rank in range(world)]
        assert sum(shares) == pytest.approx(world)
    assert Group(0, 2).share(15) == 2 * 8 / 15
    assert Group(1, 2).share(15) == 2 * 7 / 15


def test_one_worker_alone_talks_to_nobody():
    group, rows = Group(), torch.rand(3, 2)
    model = nn.Linear(2, 2)

    assert group.share(7) == 1
    assert group.mean(rows) is rows
    assert group.gather(rows, 3) is rows
    assert group.wrap(model, torch.device("cpu")) is model
    group.average_buffers(model)


@pytest.fixture
def alone_in_a_group(monkeypatch):
    """A group of one: what is summed over it stays as it is."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: None)


NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average of all": {"momentum": None},
    "no parameters": {"affine": False},
    "no bias": {},
    "no statistics": {"track_running_stats": False},
    "other numbers": {"eps": 1e-2, "momentum": 0.3},
}
TYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.usefixtures("alone_in_a_group")
def test_a_synchronised_batch_norm_of_one_worker_is_a_batch_norm(kind, dtype):
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5, **NORMS[kind]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if kind == "no bias":
        plain.bias = None
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    network = nn.Sequential(copy.deepcopy(plain))
    names = list(network.state_dict())
    both = (plain, synchronise_batch_norms(network)[0])
    assert type(both[1]) is SynchronisedBatchNorm
    assert list(network.state_dict()) == names
    close = {"atol": TYPES[dtype], "rtol": TYPES[dtype]}

    for step in range(3):
        images = (torch.randn(6, 5, 4, 3, dtype=torch.float64) * 3 + 2).to(dtype)
        pull = torch.randn(6, 5, 4, 3, dtype=torch.float64).to(dtype)
        inputs = [images.clone().requires_grad_() for _ in both]
        outputs = [norm(x) for norm, x in zip(both, inputs, strict=True)]
        for output in outputs:
            output.backward(pull)
        assert outputs[1].dtype == dtype
        torch.testing.assert_close(outputs[1], outputs[0], **close)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)
        for ours, theirs in zip(both[1].parameters(), both[0].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=TYPES[dtype], atol=(step + 1) * 30 * TYPES[dtype])
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(both[1].state_dict()[name], value, **close)
    evaluated = [norm.eval()(images) for norm in both]
    torch.testing.assert_close(evaluated[1], evaluated[0], **close)


def test_networks_keep_names_parameters_statistics_and_modes_and_one_norm_at_two_paths_stays_one():
    network = build(BARE, synthetic_images(), seed=0)
    network.again = nn.Sequential(network.plain)
    network.own.eval()
    before = {name: value.data_ptr() for name, value in network.state_dict().items()}
    modes = {path: module.training for path, module in network.named_modules()}

    assert synchronise_batch_norms(network) is network

    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == before
    assert {path: module.training for path, module in network.named_modules()} == modes
    assert network.again[0] is network.plain
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())
    norms = [network.plain, network.own, network.mean]
    assert synchronise_batch_norms(network) is network
    assert [network.plain, network.own, network.mean] == norms


def test_a_batch_norm_says_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"expected \[B, C, \.\.\.\], but got \[3\]"):
        SynchronisedBatchNorm(3)(torch.ones(3))
