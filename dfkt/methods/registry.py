"""From a method's name to its class."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import MISSING, fields

from dfkt.errors import ConfigError
from dfkt.imports import import_name
from dfkt.methods.attention import Attention
from dfkt.methods.base import Method
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.dkd import Dkd
from dfkt.methods.fsp import Fsp
from dfkt.methods.hints import FitNets, LayerwiseHint
from dfkt.methods.kd import Kd
from dfkt.methods.scratch import Scratch
from dfkt.methods.similarity import Similarity

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (Scratch, Kd, FitNets, Attention, LayerwiseHint, Similarity, Dkd, Fsp, Dfkt)
}
"""The built-in methods, in the order of tables."""
CLASS_WIDE = ("name", "losses", "taught", "tapped")


def find_method(name: str) -> type[Method]:
    """Return the class of a built-in method, or the one at ``package.module:Class``.

    Raises:
        ConfigError: If there is no such method, it cannot be imported or is no complete frozen dataclass of
            :class:`dfkt.methods.base.Method`.

    Example:
        >>> find_method("kd").__name__
        'Kd'
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, METHODS, n=2)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"Unknown method {name!r}.{meant} Known: {', '.join(METHODS)}, or package.module:Class.")
    kind = import_name(name)
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise ConfigError(f"{name} must be a class derived from dfkt.Method, but is {kind!r}.")
    if "__dataclass_fields__" not in vars(kind):  # it inherits them: its own settings would be none
        raise ConfigError(f"{name} must be a dataclass, but lacks @dataclass(frozen=True, kw_only=True).")
    if inspect.isabstract(kind) or not isinstance(getattr(kind, "name", None), str):
        raise ConfigError(f"{name} must have a name and a schedule, but lacks one of them.")
    if wrong := [f.name for f in fields(kind) if f.name in CLASS_WIDE]:
        raise ConfigError(f"{name} must give {', '.join(wrong)} without a type, as all its instances have it.")
    if bare := [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]:
        raise ConfigError(f"Every setting of {name} must have a default, but {', '.join(bare)} has none.")
    return kind
