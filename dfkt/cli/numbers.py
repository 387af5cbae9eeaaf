"""Numbers as switches take them: written in ASCII, finite, and not longer than any number that makes sense."""

from __future__ import annotations

import argparse
import math
import re

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
