"""A user's own functions and classes, found by name: ``package.module:name``."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dfkt.errors import ConfigError, one_line


def import_name(text: str) -> Any:
    """Import what ``package.module:name`` names.

    The current folder is looked through first, as by ``python -m`` and by Ray's workers, whatever the script that runs.

    Raises:
        ConfigError: If the text is not of this form, the module cannot be imported, or it has no such name.

    Example:
        >>> import_name("collections:OrderedDict")
        <class 'collections.OrderedDict'>
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"`package.module:name` must hold, but got {text!r}.")
    try:
        with _current_folder_first():
            return getattr(importlib.import_module(module), name)
    except SystemExit as error:
        raise ConfigError(f"Cannot import {text!r}: it is a script that ends when imported.") from error
    except Exception as error:  # a module may raise anything while it is imported
        raise ConfigError(f"Cannot import {text!r}: {one_line(error)}.") from error
    finally:
        _keep_folder_of(sys.modules.get(module.partition(".")[0]))


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    """Put the current folder in front of the import path; a script's own folder stands there otherwise."""
    folder = _current_folder()
    if folder is None or sys.path[:1] in ([""], [folder]):
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the imported module may have tidied up itself
            sys.path.remove(folder)


def _keep_folder_of(module: ModuleType | None) -> None:
    """Leave the current folder at the end of the import path if a module lies in it.

    What is imported there may import its neighbours only when it is called, and what it returns is pickled by its
    module's name. At the end, nothing that a script finds without the folder is found elsewhere.
    """
    spec = getattr(module, "__spec__", None)
    places = [*((spec.submodule_search_locations or [spec.origin]) if spec else [])]
    folder = _current_folder()
    if folder is None or folder in sys.path or "" in sys.path:
        return
    if any(place and Path(place).parent == Path(folder) for place in places):
        sys.path.append(folder)


def _current_folder() -> str | None:
    try:
        return str(Path.cwd())
    except FileNotFoundError:  # it was deleted meanwhile
        return None
