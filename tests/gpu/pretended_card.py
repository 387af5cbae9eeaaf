"""A device that is none: tensors that say that they lie on a card, with values that the CPU computes.

Torch lets Python be the backend of a device. Here the CPU does every operation on what lies behind the tensors, so whole
trainings run with their backward passes, optimizers and checkpoints, and give the CPU's numbers to the last bit. What a
card would not bear is found on the way: tensors of two devices in one operation are refused, and what would wait for the
card is counted. The backend is the process's for good, so tests run this file in a process of its own.

    python pretended_card.py FILE      writes what was found, as JSON
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import load_script
from small_runs import METHODS, timeless, weights
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from dfkt.config import TrainConfig
from dfkt.methods.base import Features, Method, Term
from dfkt.networks.taps import StudentTaps
from dfkt.training.loop import Training

networks_on = load_script(Path(__file__).with_name("card_runs.py")).networks_on
NAME = "card"
aten = torch.ops.aten
MOVING = (aten._to_copy.default, aten.copy_.default)
"""Operations that may meet tensors of two devices."""
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Of operations that must know a value before they can return; indexing is one only where a mask indexes."""
INDEXING = (aten.index.Tensor, aten.index_put_.default)
IMAGES, BATCH = 96, 12
RUNG = 0.5
"""The share of the last stage at which an average of the weights is judged."""


class CardTensor(torch.Tensor):
    """A tensor that says that it lies on the card; its values are ``held``, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CardTensor:  # noqa: D102
        made: CardTensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0), requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"on the card: {self.held!r}"

    def tolist(self) -> Any:
        """Return the values, as torch does for its own tensors only."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of the card's tensors where there is no card")


class Card(TorchDispatchMode):
    """While it lasts, there is a card.

    Raises:
        RuntimeError: By an operation on tensors of two devices, unless it moves them or those of the CPU have no dimension.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """What would have waited for the card, by operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
        asked = kwargs.get("device")
        on_card = asked.type == NAME if asked is not None else bool(ours)
        self._check(func, tensors, ours, asked)
        if asked is not None and on_card:
            kwargs["device"] = torch.device("cpu")
        raw_args, raw_kwargs = tree_map_only(CardTensor, lambda tensor: tensor.held, (args, kwargs))
        result = func(*raw_args, **raw_kwargs)
        if not on_card:
            return result
        known = {id(tensor.held): tensor for tensor in ours}
        inference = ours[0].is_inference() if func.is_view and ours else torch.is_inference_mode_enabled()
        with torch.inference_mode(inference):  # a view of an ordinary tensor is one, wherever it is taken
            return tree_map_only(Tensor, lambda out: known[id(out)] if id(out) in known else CardTensor(out), result)

    def _check(self, func: Any, tensors: list[Tensor], ours: list[CardTensor], asked: torch.device | None) -> None:
        """Count what waits; refuse what a card refuses."""
        strangers = [tensor for tensor in tensors if not isinstance(tensor, CardTensor)]
        to_card = asked is not None and asked.type == NAME and bool(strangers)
        to_cpu = asked is not None and asked.type != NAME and bool(ours)
        moved = func is aten.copy_.default and bool(ours) and bool(strangers)
        looks = bool(ours) and bool(WAITING & {*func.tags})
        if func in INDEXING:
            looks = any(tensor.dtype == torch.bool for tensor in ours)
        if to_card or to_cpu or moved or looks:
            self.waits[str(func)] += 1
        if ours and func not in MOVING and any(tensor.dim() > 0 for tensor in strangers):
            raise RuntimeError(f"{func} of tensors on two devices")


class Backend:
    """What torch asks of a device's module: there is one card, the CPU draws for it, and it has no autocast."""

    def is_available(self) -> bool:
        """Return that there is a card."""
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        """Return how many there are."""
        return 1

    def current_device(self) -> int:
        """Return its number."""
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return nothing."""
        return []

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Return a state of nothing."""
        return torch.empty(0)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Do nothing."""

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing."""

    def _is_in_bad_fork(self) -> bool:
        return False


def began(method: Method, device: str, count: int = IMAGES) -> Training:
    """Return a run on a device, of one epoch; weights and images are the same on every one."""
    data, student, teacher = networks_on(device, method, count=count)
    schedule = method.schedule(1, StudentTaps.of(student.taps))
    config = TrainConfig(epochs=1, batch_size=BATCH, precision="float32")
    return Training(schedule, student, teacher, data, config)


def on_cpu(values: Any) -> Any:
    """Return a state with its tensors on the CPU, copied."""
    moved = tree_map_only(CardTensor, lambda tensor: tensor.held, values)
    return tree_map_only(Tensor, lambda tensor: tensor.clone(), moved)


def finished(training: Training) -> tuple[list[Any], dict[str, Tensor]]:
    """Run to the end; return records and weights."""
    return [timeless(record) for record in training.run((RUNG,))], on_cpu(weights(training))


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether weights are equal to the last bit, on the CPU."""
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def same_run(card: Card, method: Method) -> tuple[bool, list[int]]:
    """Return whether a run on the card is the CPU's to the last bit, and how often it waited: half as long, and whole."""
    waited = []
    for count in (IMAGES // 2, IMAGES):
        before = card.waits.total()
        ours, our_weights = finished(began(method, NAME, count))
        waited.append(card.waits.total() - before)
    theirs, their_weights = finished(began(method, "cpu"))
    return ours == theirs and equal(our_weights, their_weights), waited


def moved_run(method: Method, first: str, second: str) -> bool:
    """Whether a run that begins on one device and goes on on another is the CPU's, to the last bit."""
    whole, their_weights = finished(began(method, "cpu"))
    start = began(method, first)
    found = [timeless(next(start.run((RUNG,))))]
    end = began(method, second)
    end.load(on_cpu(start.state()))
    rest, our_weights = finished(end)
    return found + rest == whole and equal(our_weights, their_weights)


class Wrong(Term):
    """A term as it must not be."""

    name = "wrong"
    student_logits = True

    def __init__(self, fault: str) -> None:
        object.__setattr__(self, "fault", fault)

    def __call__(self, teacher: Features, student: Features, labels: Tensor) -> Tensor:
        """Return a loss that leaves a constant on the CPU, or looks at a value."""
        assert student.logits is not None
        if self.fault == "constant":  # type: ignore[attr-defined]
            return (student.logits * torch.ones(student.logits.shape[1])).mean()
        return student.logits.mean() * (1 + 0 * student.logits.sum().item())


class Faulty(type(METHODS["scratch"])):  # type: ignore[misc]
    """Labels, and a wrong term beside them."""

    fault = "constant"

    def schedule(self, epochs: float, taps: StudentTaps) -> Any:
        """Return the task stage with the wrong term."""
        (stage,) = super().schedule(epochs, taps)
        return (replace(stage, terms=(*stage.terms, Wrong(self.fault))),)


class Looking(Faulty):
    """Labels, and a term that looks at a value at every step."""

    fault = "look"


def constant_refused() -> str:
    """Return what is said of a constant on the CPU."""
    with contextlib.suppress(StopIteration):
        try:
            finished(began(Faulty(), NAME))
        except RuntimeError as error:
            return str(error)
    return ""


def found() -> Iterator[tuple[str, Any]]:
    """Yield what was found, by name."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    with Card() as card:
        for name, method in METHODS.items():
            yield name, same_run(card, method)
        yield "looking", same_run(card, Looking())
        for name in ("dfkt", "fitnets"):
            yield f"cpu to card {name}", moved_run(METHODS[name], "cpu", NAME)
            yield f"card to cpu {name}", moved_run(METHODS[name], NAME, "cpu")
        yield "constant", constant_refused()


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(dict(found())))
