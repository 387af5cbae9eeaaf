"""What a setting must be, and the error that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dfkt.errors import ConfigError


def check_rule(holds: bool, rule: str, remedy: str = "", **values: Any) -> None:
    """Raise :class:`ConfigError` with rule, value and remedy unless the rule holds."""
    if not holds:
        got = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ConfigError(f"`{rule}` must hold, but got {got}." + (f" {remedy}" if remedy else ""))


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise :class:`ConfigError` unless a value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(map(str, choices))}, but got {value!r}.")


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number; truth values are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
