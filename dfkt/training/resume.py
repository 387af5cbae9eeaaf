"""A training goes on from its checkpoint, or begins anew where that is damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dfkt.config import is_finite
from dfkt.errors import CheckpointError, one_line
from dfkt.store.files import Storage
from dfkt.training.average import WeightAverage
from dfkt.training.loop import Training
from dfkt.training.parallel import Group
from dfkt.training.stages import RunningStage
from dfkt.training.state import STATE_FILE, load_state, misfits

State = Mapping[str, Any]


def resumed(
    make: Callable[[], Training],
    storage: Storage,
    check: Callable[[State], None] = lambda state: None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Training, State | None]:
    """Return a training at the place of its checkpoint, with that; or a new one, if there is none or it is damaged.

    Args:
        make: Returns a new training.
        storage: Folder of the checkpoint.
        check: Raises if anything else that was saved with it cannot be used.
        log: Is told that a checkpoint is damaged.
    """
    training = make()
    try:
        state = load_state(storage)
        if state is None:
            return training, None
        check(state)
        _load(training, state)
        return training, state
    except (
        CheckpointError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        log(f"checkpoint {storage.path}/{STATE_FILE} is damaged, training begins anew ({one_line(error)})")
        return make(), None


def check_reported(state: State, key: str) -> None:
    """Raise unless a state is that of the run with a key, with the records and the times that it reported."""
    times, records = state["clock"], state["history"]
    ok = isinstance(times["started"], str) and _is_count(times["attempts"]) and is_finite(times["wall_seconds"])
    ok = ok and all(isinstance(record["phase"], str) for record in records)
    if state["key"] != key or not ok or [record["index"] for record in records] != [*range(state["index"])]:
        raise CheckpointError("it is another run's, or lacks what was reported")


def _is_count(value: Any) -> bool:
    """Whether a value is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _load(training: Training, state: State) -> None:
    """Let a training take the place of a state; what is missing or of another kind raises."""
    own = training.state()
    for what in ("student", "adapters"):
        if problems := misfits(own[what], state[what]):
            raise CheckpointError(f"{what}: {'; '.join(problems)}")
    counted = _is_count(state["step"]) and _is_count(state["index"]) and is_finite(state["device_seconds"])
    if not counted or state["step"] > training.ends[-1]:
        raise CheckpointError("its place is none of the training's")
    training.load(state)
    _check_average(training.average, state["average"])
    _check_optimizer(training, state["optimizer"])


def _check_average(average: WeightAverage | None, state: Any) -> None:
    if average is not None and (
        not _is_count(state["steps"])
        or [ours.shape for ours in average.ours] != [weights.shape for weights in state["weights"]]
    ):
        raise CheckpointError("the average is another network's")


def _check_optimizer(training: Training, state: Any) -> None:
    """Let an optimizer of the stage take a state: the training itself does so only when it is there."""
    starts = (0, *training.ends[:-1])
    number = next((k for k, end in enumerate(training.ends) if training.step < end), None)
    if (state is not None) != (number is not None and starts[number] < training.step):
        raise CheckpointError("the optimizer's state is another step's")
    if state is None or number is None:
        return
    stage, start, end = training.schedule[number], starts[number], training.ends[number]
    given = training.student, training.adapters, training.config, Group()
    optimizer = RunningStage.prepare(stage, start, end, *given).optimizer
    settings = _settings(optimizer)
    optimizer.load_state_dict(state)
    ok = settings == _settings(optimizer)
    for parameter, kept in optimizer.state.items():
        moment = kept.get("momentum_buffer")
        ok = ok and (moment is None or (isinstance(moment, torch.Tensor) and moment.shape == parameter.shape))
    if not ok:
        raise CheckpointError("the optimizer's state is another network's")


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what an optimizer was made with; its rate changes from step to step."""
    return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
