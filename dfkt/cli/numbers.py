"""Numbers as switches take them: written in ASCII, finite, and not longer than any number that makes sense."""

from __future__ import annotations

import argparse
import math
import re

_UNITS = {"": 1, "B": 1} | {f"{letter}B": 10 ** (3 * k) for k, letter in enumerate("KMGT", 1)}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?) ?([KMGT]?B|)", re.ASCII | re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?", re.ASCII)


def whole(text: str) -> int:
    """Return a whole number.

    Raises:
        argparse.ArgumentTypeError: If the text is none, or has more than 18 digits.

    Example:
        >>> whole("-12")
        -12
    """
    if not _WHOLE.fullmatch(text.strip()):
        raise argparse.ArgumentTypeError(f"a whole number is wanted, but got {text[:40]!r}")
    return int(text)


def number(text: str) -> float:
    """Return a finite number.

    Raises:
        argparse.ArgumentTypeError: If the text is none.

    Example:
        >>> number("1e-3")
        0.001
    """
    value = float(text) if _NUMBER.fullmatch(text.strip()) else math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a finite number is wanted, but got {text[:40]!r}")
    return value


def size(text: str) -> int:
    """Return bytes.

    Raises:
        argparse.ArgumentTypeError: If the text is no size.

    Example:
        >>> size("20GB"), size("1.5 mb"), size("0")
        (20000000000, 1500000, 0)
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"a size such as 20GB, 500MB or 0 is wanted, but got {text[:40]!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])
