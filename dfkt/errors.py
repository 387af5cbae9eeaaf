"""Every error that dfkt raises on purpose.

::

    DfktError
    ├── InputError              what the user asked for cannot be done (exit code 2)
    │   ├── ConfigError         a setting is outside its rule
    │   ├── DataError           images or labels are missing, broken or inconsistent
    │   ├── NetworkError        a network is unknown or cannot be built
    │   ├── TapError            a tap is unknown, or teacher and student taps cannot be matched
    │   ├── PatternError        an overlap pattern is unknown or does not fit the taps
    │   ├── CheckpointError     a checkpoint cannot be read or does not fit
    │   └── StudyError          a study folder is not usable, or belongs to another configuration
    └── RunError                training began and could not go on (exit code 1)
        ├── FlowShapeError      two feature maps cannot be compared
        └── NonFiniteLossError  a loss became nan or inf

Messages give the rule, the value found and, where there is one, the remedy.
"""

from __future__ import annotations

import errno
import sys
from typing import TypeGuard

MOST_CHARACTERS = 300
"""Of what is quoted of an error."""
FULL = {
    errno.ENOSPC: ("storage full", "free space"),
    errno.EDQUOT: ("storage quota used up", "free space"),
    errno.EROFS: ("storage read-only", "make it writable"),
}
"""Errors of a storage that do not pass by themselves: every other run would meet them too."""


class DfktError(Exception):
    """Base of every error that dfkt raises on purpose."""


class InputError(DfktError):
    """What the user asked for cannot be done; raised before any work starts."""


class ConfigError(InputError):
    """A setting is outside its rule."""


class DataError(InputError):
    """Images or labels are missing, broken or inconsistent."""


class NetworkError(InputError):
    """A network is unknown or cannot be built."""


class TapError(InputError):
    """A tap is unknown, or teacher and student taps cannot be matched."""


class PatternError(InputError):
    """An overlap pattern is unknown or does not fit the taps."""


class CheckpointError(InputError):
    """A checkpoint cannot be read or does not fit the network."""


class StudyError(InputError):
    """A study folder is not usable, or belongs to another configuration."""


class RunError(DfktError):
    """Training began and could not go on."""


class FlowShapeError(RunError):
    """Two feature maps cannot be compared: images, channels or grids do not fit."""


class NonFiniteLossError(RunError):
    """A loss became nan or inf."""


class GraphError(RunError):
    """A step cannot be recorded as a CUDA graph."""


def tell(text: str) -> None:
    """Write a line to ``stderr`` at once: what a part of the program has to say that has no log."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def one_line(error: BaseException) -> str:
    """Return an exception's type and text on one line of at most 300 characters, for a message that quotes it."""
    text = " ".join(str(error).split()).rstrip(".")
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return clipped(shown)


def clipped(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text, or its beginning if it has more than so many characters.

    Example:
        >>> clipped("abcdef", 4)
        'abc…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error is one of a storage that takes nothing more, from now on."""
    return isinstance(error, OSError) and error.errno in FULL


def storage_error(error: OSError, folder: str) -> RunError:
    """Return what ends a study whose storage, in a folder, takes nothing more."""
    what, remedy = FULL.get(error.errno or 0, ("storage failed", "mend it"))
    place = folder if error.filename is None or str(error.filename).startswith(folder) else error.filename
    reason = error.strerror or one_line(error)
    return RunError(f"{what}: {place}: {reason}; {remedy}, then the same command goes on")
