"""Recorded steps: on the CPU by a tape of operations in the place of a CUDA graph, so that all but the card itself is tried."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import METHODS, RESNET, TRAIN, records, same, start, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfkt.config import Placement
from dfkt.errors import ConfigError, GraphError
from dfkt.methods.ramp import Ramp
from dfkt.training import replay, targets, update
from dfkt.training.replay import WARM_UP, Replayed, replays
from dfkt.training.targets import Keeping

PAIRS = tuple((i, j) for i in range(4) for j in range(i + 1, 4))
WIDE = replace(RESNET, width=0.5)


class Tape(TorchDispatchMode):
    """Operations with the tensors that they read and made, in order: like a graph it knows no Python."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, _tensors(found)))
        return found

    def play(self) -> None:
        """Do the operations again, on the same memory."""
        with torch.inference_mode():
            for func, args, kwargs, places in self.operations:
                for place, value in zip(places, _tensors(func(*args, **kwargs)), strict=True):
                    if place.data_ptr() != value.data_ptr():
                        place.copy_(value)


class Recorder:
    """Plays CUDA graphs by tapes, and counts them."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, function: Callable[..., Any], *tensors: Tensor) -> tuple[Callable[[], None], Any]:
        """Return what replays a call, and where its result lies."""
        self.recorded += 1
        fresh = True  # the first replay is this call: a graph that is recorded does nothing
        with Tape() as tape:
            found = function(*tensors)

        def play() -> None:
            nonlocal fresh
            self.replayed += 1
            if not fresh:
                tape.play()
            fresh = False

        return play, found


def _tensors(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(replay, "record", made)
    return made


def test_a_function_is_called_as_it_stands_then_recorded_once(recorder):
    calls: list[int] = []

    def double(values: Tensor, by: Tensor) -> dict[str, Tensor]:
        calls.append(len(calls))
        return {"found": 2 * values * by}

    replayed = Replayed(double)
    for number in range(6):
        found = replayed(torch.full((2,), float(number)), torch.tensor(3.0))
        assert found["found"].tolist() == [6.0 * number] * 2
    assert (recorder.recorded, recorder.replayed) == (1, 6 - WARM_UP)


def test_what_was_recorded_returns_the_same_tensors_at_every_call(recorder):
    replayed = Replayed(lambda values: values + 1)
    found = [replayed(torch.zeros(3)) for _ in range(WARM_UP + 3)]
    assert len({id(tensor) for tensor in found[WARM_UP:]}) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_recorded_steps_is_the_run_without_to_the_last_bit(images, recorder, name, precision):
    train = replace(TRAIN, precision=precision, epochs=8, clip_norm=1.0)
    expected = start(images, METHODS[name], train, teacher=WIDE)
    told = records(expected)

    ours = start(images, METHODS[name], train, teacher=WIDE, replay=True)

    assert records(ours) == told
    assert same(weights(ours), weights(expected))
    lengths = [end - begin for begin, end in pairwise((0, *ours.ends))]
    graphs = [1 + stage.reads_teacher for stage in ours.schedule]
    assert recorder.recorded == sum(g for g, steps in zip(graphs, lengths, strict=True) if steps > WARM_UP) > 0
    assert recorder.replayed == sum(g * max(steps - WARM_UP, 0) for g, steps in zip(graphs, lengths, strict=True))


@pytest.mark.parametrize("name", ["kd", "dfkt", "fsp", "fitnets", "similarity"])
def test_recorded_steps_keep_and_read_what_the_teacher_says(images, recorder, name, tmp_path: Path):
    keeping = Keeping(str(tmp_path / "targets"), "study", 10**9, PAIRS)
    train = replace(TRAIN, epochs=4)
    expected = start(images, METHODS[name], train, teacher=WIDE)
    told = [record["loss"] for record in records(expected)]
    for _ in range(2):
        ours = start(images, METHODS[name], train, teacher=WIDE, keeping=keeping, replay=True)
        assert [record["loss"] for record in records(ours)] == told
        assert same(weights(ours), weights(expected))


@pytest.mark.parametrize("name", ["fsp", "dfkt"])
@pytest.mark.parametrize("lack", ["room", "files"])
def test_the_teachers_answers_may_be_read_computed_and_kept_in_turns(images, recorder, name, lack, tmp_path: Path):
    """What the gradients follow from is then recorded in several ways, and each has gradients of its own."""
    keeping = Keeping(str(tmp_path / "targets"), "study", 1000 if lack == "room" else 10**9, PAIRS)
    train = replace(TRAIN, epochs=20)
    expected = start(images, METHODS[name], train, teacher=WIDE)
    told = [record["loss"] for record in records(expected)]
    if lack == "files":
        records(start(images, METHODS[name], train, teacher=WIDE, keeping=keeping))
        for file in sorted(keeping.folder.rglob("*.targets"))[::2]:
            file.unlink()

    ours = start(images, METHODS[name], train, teacher=WIDE, keeping=keeping, replay=True)

    assert [record["loss"] for record in records(ours)] == told
    assert same(weights(ours), weights(expected))


def test_nothing_that_was_recorded_outlives_its_stage(images, recorder, monkeypatch):
    alive: list[weakref.ref[Any]] = []

    class Seen(Replayed):
        def __init__(self, function: Callable[..., Any]) -> None:
            super().__init__(function)
            alive.append(weakref.ref(self))

    for module in (targets, update):
        monkeypatch.setattr(module, "Replayed", Seen)
    training = start(images, METHODS["dfkt"], replace(TRAIN, epochs=8), replay=True)
    gc.disable()
    try:
        counts = [sum(one() is not None for one in alive) for _ in training.run()]
        assert max(counts) <= 2  # the teacher's pass and the student's gradients
        assert not any(one() for one in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("change", [lambda values: values[:2], lambda values: values.double()])
def test_tensors_of_another_shape_or_type_are_refused(recorder, change):
    replayed = Replayed(lambda values: values + 1)
    for _ in range(WARM_UP + 1):
        replayed(torch.zeros(3))
    with pytest.raises(GraphError, match="the same shapes and types"):
        replayed(change(torch.zeros(3)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_resumed_run_of_recorded_steps_goes_on_to_the_last_bit(images, recorder, count):
    train = replace(TRAIN, epochs=4.5)
    expected = start(images, METHODS["dfkt"], train)
    told = [record["loss"] for record in records(expected)]
    first = start(images, METHODS["dfkt"], train, replay=True)
    steps = first.run()
    found = [next(steps)["loss"] for _ in range(count)]
    state = first.state()
    second = start(images, METHODS["dfkt"], train, replay=True)
    second.load(state)
    found += [record["loss"] for record in second.run()]
    assert found == told
    assert same(weights(second), weights(expected))


def test_a_weight_may_change_from_step_to_step(images, recorder):
    train = replace(TRAIN, epochs=8)
    expected, ours = (start(images, METHODS["layerwise-hint"], train, replay=replayed) for replayed in (False, True))
    assert any(isinstance(term.weight, Ramp) for stage in ours.schedule for term in stage.terms)
    assert records(ours) == records(expected)


CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("choice", "device", "world", "ours", "expected"),
    [
        ("auto", CARD, 1, True, True), ("auto", CARD, 1, False, False), ("on", CARD, 1, False, True),
        ("off", CARD, 1, True, False), ("auto", CARD, 2, True, False), ("on", CARD, 2, True, False),
        ("auto", CPU, 1, True, False), ("on", CPU, 1, True, False),
    ],
)  # fmt: skip
def test_which_runs_record_their_steps(choice, device, world, ours, expected):
    assert replays(choice, device, world, ours=ours) is expected


def test_an_unknown_choice_is_refused():
    with pytest.raises(ConfigError, match="cuda_graphs"):
        Placement(cuda_graphs="maybe")  # type: ignore[arg-type]
