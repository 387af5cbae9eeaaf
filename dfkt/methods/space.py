"""Where a search's values come from: Optuna's trial, narrowed to what a study wants searched."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from dfkt.config import check_rule, is_finite
from dfkt.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Lowest and highest value, and whether they are drawn evenly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        ok = is_finite(self.low) and is_finite(self.high) and self.low <= self.high
        check_rule(ok, "low <= high, both finite", low=self.low, high=self.high)
        check_rule(not self.log or self.low > 0, "low > 0 where the logarithm is drawn", low=self.low)


@dataclass(frozen=True)
class Space:
    """What a study searches otherwise than its method does: by parameter, a range or the only choices.

    A parameter with a single choice is fixed, and Optuna is not asked for it.

    Example:
        >>> space = Space({"rounds": (1,), "flow_rate": Range(0.05, 0.2, log=True)})
        >>> Space.from_json(space.to_json()) == space
        True
    """

    changes: Mapping[str, Range | tuple[Any, ...]]

    def __post_init__(self) -> None:
        for name, given in self.changes.items():
            ok = isinstance(given, Range) or (isinstance(given, tuple) and len(given) > 0)
            check_rule(ok, f"{name} is searched in a Range or a tuple of choices", given=given)

    def to_json(self) -> dict[str, Any]:
        """Return the space as JSON values: a range as an object, choices as an array."""
        return {
            name: {"low": given.low, "high": given.high, "log": given.log} if isinstance(given, Range) else list(given)
            for name, given in self.changes.items()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Space:
        """Return the space that :meth:`to_json` gave."""
        return Space(
            {name: Range(**given) if isinstance(given, Mapping) else tuple(given) for name, given in values.items()}
        )

    def check(self, columns: Mapping[str, type]) -> None:
        """Raise :class:`ConfigError` if a parameter is not one that the method may draw."""
        if unknown := sorted(set(self.changes) - set(columns)):
            raise ConfigError(f"Unknown parameter {', '.join(unknown)} in a space; known: {', '.join(columns)}.")


class Sampler(Protocol):
    """What values are asked of: an Optuna trial, or anything with these three."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Return one of the choices."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Return a whole number, both ends included."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number, drawn evenly or evenly in its logarithm."""


class Draw:
    """One draw from a search space; :attr:`params` keeps all that was drawn.

    Args:
        trial: What is asked.
        space: What is narrowed.
    """

    def __init__(self, trial: Sampler, space: Space | None = None) -> None:
        self.trial, self.space = trial, space or Space({})
        self.params: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""
        given = self.space.changes.get(name)
        if isinstance(given, Range):
            raise ConfigError(f"Parameter {name} takes some of {', '.join(map(str, choices))}, but got a range.")
        if given is not None and (wrong := [choice for choice in given if choice not in choices]):
            raise ConfigError(f"Parameter {name} takes some of {', '.join(map(str, choices))}, but got {wrong[0]!r}.")
        own = (
            choices if given is None else [choices[choices.index(choice)] for choice in given]
        )  # True, where 1 is given
        return self._choose(name, tuple(own))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Return a whole number, both ends included."""
        given = self.space.changes.get(name)
        if isinstance(given, tuple):
            return int(self._choose(name, tuple(self._number(name, choice, int) for choice in given)))
        if given is not None:
            low, high = (self._number(name, end, int) for end in (given.low, given.high))
        log = given is not None and given.log
        return self.note(name, self.trial.suggest_int(name, low, high, log=log))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number, drawn evenly or evenly in its logarithm."""
        given = self.space.changes.get(name)
        if isinstance(given, tuple):
            return float(self._choose(name, tuple(self._number(name, choice, float) for choice in given)))
        if given is not None:
            low, high, log = given.low, given.high, given.log
        return self.note(name, self.trial.suggest_float(name, low, high, log=log))

    def narrows(self, name: str) -> bool:
        """Whether the study wants this parameter searched otherwise than the method does."""
        return name in self.space.changes

    def note(self, name: str, value: T) -> T:
        """Keep a value among the draw's parameters without asking for it; returns it."""
        self.params[name] = value
        return value

    def _choose(self, name: str, choices: tuple[Any, ...]) -> Any:
        if len(choices) == 1:
            return self.note(name, choices[0])
        return self.note(name, self.trial.suggest_categorical(name, choices))

    @staticmethod
    def _number(name: str, value: Any, kind: type) -> Any:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if not isinstance(value, bool) and kind(value) == value:
                return kind(value)
        raise ConfigError(f"Parameter {name} takes {'whole numbers' if kind is int else 'numbers'}, but got {value!r}.")
