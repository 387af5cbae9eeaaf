"""The switches ``--set`` and ``--search``: settings of a method, and what a study searches otherwise, as texts."""

from __future__ import annotations

import argparse
import contextlib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from dfkt.cli.numbers import number
from dfkt.config import build, to_dict
from dfkt.errors import ConfigError
from dfkt.methods.base import Method
from dfkt.methods.space import Range, Space


def add_settings(parser: argparse._ActionsContainer, what: str) -> None:
    """Add the switch that sets fields of a method."""
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", dest="settings",
        help=f"settings of {what}, such as rate=0.05 rounds=2 pattern=dense-2 (docs/methods.md lists them)",
    )  # fmt: skip


def add_search(parser: argparse._ActionsContainer, what: str = "the method") -> None:
    """Add the switch that narrows what is searched."""
    parser.add_argument(
        "--search", nargs="+", default=[], metavar="NAME=RANGE",
        help=f"search otherwise than {what} does: rate=0.05..0.2, flow_rate=log:0.01..0.1, pattern=dense-2,dense-3",
    )  # fmt: skip


def with_settings(method: Method, given: Iterable[str]) -> Method:
    """Return a method with settings given as ``NAME=VALUE``.

    Raises:
        ConfigError: If there is no such setting, or a value does not fit it.
    """
    return with_values(method, dict(parse_setting(type(method), text) for text in given))


def with_values(method: Method, values: dict[str, Any]) -> Method:
    """Return a method with some settings changed, their values as JSON has them."""
    settings = {name: value for name, value in to_dict(method).items() if name != "name"}
    return build(type(method), settings | values)


def parse_setting(kind: type[Method], text: str) -> tuple[str, Any]:
    """Return name and value of one of a method's settings.

    Raises:
        ConfigError: If there is no such setting, or the value is of another type.

    Example:
        >>> from dfkt.methods.dfkt import Dfkt
        >>> parse_setting(Dfkt, "rounds=2"), parse_setting(Dfkt, "pattern=dense-2"), parse_setting(Dfkt, "freeze_below=true")
        (('rounds', 2), ('pattern', 'dense-2'), ('freeze_below', True))
    """
    name, equals, value = text.partition("=")
    known = [f.name for f in fields(kind)]
    if not equals or name not in known:
        raise ConfigError(f"Settings of {kind.name} are given as NAME=VALUE with {', '.join(known)}; but got {text!r}.")
    hint = typing.get_type_hints(kind)[name]
    for read in (value, _parsed(value)):
        if fits(hint, read):
            return name, float(read) if hint is float else read
    raise ConfigError(f"`{name}` of {kind.name} must be {_described(hint)}, but got {value!r}.")


def fits(hint: Any, value: Any) -> bool:
    """Whether a value, as JSON has it, is of the type that a setting is annotated with.

    Example:
        >>> fits(float, 2), fits(int, True), fits(tuple[float, ...], [1, 0.5]), fits(float | None, None)
        (True, False, True, True)
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(fits(one, value) for one in inner)
    if origin is tuple:
        if not isinstance(value, list):
            return False
        hints = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(hints) == len(value) and all(map(fits, hints, value))
    if hint in (float, int):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) and hint is not Any else True


def _described(hint: Any) -> str:
    """Return in words what fits a type."""
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", types.NoneType: "none"}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, inner))
    if origin is tuple:
        return f"[…] of {' and '.join(_described(one) for one in inner if one is not Ellipsis)} each"
    return words.get(hint, str(hint))


def _parsed(word: str) -> Any:
    """Return a number, a truth value, none or a list, as JSON has it, or the word itself."""
    word = word.strip()
    for text in (word, {"none": "null"}.get(word.lower(), word.lower())):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return word


def parse_space(given: Iterable[str]) -> Space:
    """Return what is searched otherwise: ``NAME=LOW..HIGH``, ``NAME=log:LOW..HIGH`` or ``NAME=A,B,C``.

    Example:
        >>> parse_space(["rounds=1", "flow_rate=log:0.05..0.2"]).changes
        {'rounds': (1,), 'flow_rate': Range(low=0.05, high=0.2, log=True)}
    """
    return Space(dict(_parse_narrowed(text) for text in given))


def _parse_narrowed(text: str) -> tuple[str, Range | tuple[Any, ...]]:
    name, _, value = text.partition("=")
    log, dots = value.startswith("log:"), ".." in value
    if not name or not value or (log and not dots):
        raise ConfigError(
            f"A search is narrowed by NAME=LOW..HIGH, NAME=log:LOW..HIGH or NAME=A,B,…; but got {text!r}."
        )
    if not dots:
        return name, tuple(_parsed(word) for word in value.split(","))
    low, _, high = value.removeprefix("log:").partition("..")
    try:
        ends = number(low), number(high)
    except argparse.ArgumentTypeError:
        raise ConfigError(f"A range is LOW..HIGH in numbers, but got {text!r}.") from None
    return name, Range(*ends, log=log)
