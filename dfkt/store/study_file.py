"""``study.json``: what it says, read in one place and checked, so that nobody behind meets what is damaged.

An entry that is there has the type that is written here; which entries a study must have besides, those ask that need them
(:func:`check_entries`). Entries that are not listed are passed over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal, NoReturn, NotRequired, TypedDict

from dfkt.config import DataConfig, NetworkConfig, Placement, TeacherConfig, TrainConfig
from dfkt.errors import StudyError, clipped, one_line
from dfkt.store.columns import loss_without_column
from dfkt.store.files import Storage, readable

STUDY_FILE = "study.json"
FORMAT = 3
MOST_OF_VALUE = 60
"""Characters that are quoted of a value."""
NEEDED: dict[Any, tuple[str, ...]] = {
    DataConfig: ("name",),
    NetworkConfig: ("name",),
    TeacherConfig: ("network",),
    TrainConfig: ("epochs", "batch_size"),
}
"""Settings that have always been written; those that came later may be missing, and are what they are by default."""


class _Arm(TypedDict):
    name: str
    method: dict[str, Any]
    trials: int
    epochs: float | None
    parent: NotRequired[str | None]
    change: NotRequired[dict[str, Any]]


class _Config(TypedDict):
    name: str
    data: DataConfig
    teacher: TeacherConfig
    student: NetworkConfig
    train: TrainConfig
    arms: list[_Arm]


class _Named(TypedDict):
    name: str


class _Keyed(TypedDict):
    arms: list[_Named]


class _Best(TypedDict):
    trial: int | None


class _ArmState(TypedDict, total=False):
    best: _Best | None
    finals: list[str]
    present: list[int]
    skipped: str | None


class _Data(TypedDict, total=False):
    title: str
    train: int | None
    val: int | None


class _Teacher(TypedDict, total=False):
    key: str
    network: str
    val_accuracy: float
    test_accuracy: float | None
    seconds: float | None


class _Cost(TypedDict):
    parameters: int
    macs: int | None
    bytes: int


class _Costs(TypedDict, total=False):
    teacher: _Cost
    student: _Cost


class _Hardware(TypedDict):
    cpu: str
    cores: int | None
    memory_bytes: int
    gpus: list[str]


class _Workers(TypedDict, total=False):
    count: int
    cpus: float
    gpus: float | None
    up_to: int | None
    spread: bool


class _Demand(TypedDict, total=False):
    at_once: int | None
    wait: float
    silence: float


class _Session(TypedDict, total=False):
    started: datetime
    arms: list[str]
    placement: Placement
    workers: _Workers
    demand: _Demand
    versions: dict[str, str | None] | None
    commit: str | None
    dirty: bool | None
    hardware: _Hardware | None
    command: list[str] | None


class _StudyFile(TypedDict):
    format: int
    params: dict[str, Literal["float", "int", "bool", "str"]]  # as in PARAM_TYPES
    losses: list[str]
    columns: NotRequired[dict[str, str]]
    config: NotRequired[_Config]
    keyed: NotRequired[_Keyed]
    data: NotRequired[_Data]
    teacher: NotRequired[_Teacher]
    cost: NotRequired[_Costs]
    arms: NotRequired[dict[str, _ArmState]]
    sessions: NotRequired[list[_Session]]


def read_study_file(storage: Storage, *needed: str) -> dict[str, Any]:
    """Return what a folder's ``study.json`` says. Nothing is written.

    Args:
        storage: The folder.
        needed: Entries that must be there beside those that every study has.

    Raises:
        StudyError: If there is none, or it cannot be read, is damaged or of another format.
    """
    with readable(storage):
        data = storage.read(STUDY_FILE)
    if data is None:
        raise StudyError(f"A study's folder must have a {STUDY_FILE}, but {storage.path} has none.")
    try:
        meta = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _damaged(storage, f"it is no JSON ({one_line(error)})") from error
    if isinstance(meta, dict) and "format" in meta and meta["format"] != FORMAT:
        raise StudyError(
            f"{STUDY_FILE} must have format {FORMAT}, but {storage.path} has {clipped(repr(meta['format']), MOST_OF_VALUE)}. "
            "Finish or read that study with the version of dfkt that wrote it, or take another --name."
        )
    if found := next(_faults(_StudyFile, meta, ""), None):
        raise _damaged(storage, found)
    if wrong := loss_without_column(meta["losses"]):
        raise _damaged(storage, f"its loss {wrong} has no column of its own")
    check_entries(storage, meta, *needed)
    return typing.cast(dict[str, Any], meta)


def check_entries(storage: Storage, meta: Mapping[str, Any], *needed: str, of: str = "") -> None:
    """Refuse a study whose ``study.json``, or an entry of it, lacks entries.

    Raises:
        StudyError: If one is missing.
    """
    if missing := [f"{of}{name}" for name in needed if name not in meta]:
        raise _damaged(storage, f"it has no entry {', '.join(missing)}")


def _faults(hint: Any, value: Any, at: str) -> Iterator[str]:
    """Yield what of a JSON value is not of a type, named by its place."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if typing.is_typeddict(hint) or dataclasses.is_dataclass(hint):
        yield from _faults_in_entries(hint, value, at)
    elif origin in (typing.Union, types.UnionType):
        found = [next(_faults(one, value, at), None) for one in inner]
        if found[0] is not None and all(found):
            yield found[0]  # which says what is wrong inside
    elif origin is dict:
        yield from () if isinstance(value, dict) else (_wrong(at, value),)
        for name, entry in value.items() if isinstance(value, dict) else ():
            yield from _faults(inner[1], entry, f"{at}{name}.")
    elif origin in (list, tuple):
        yield from () if isinstance(value, list) else (_wrong(at, value),)
        for k, entry in enumerate(value if isinstance(value, list) else ()):
            yield from _faults(inner[0], entry, f"{at}{k}.")
    elif not _fits(hint, value):
        yield _wrong(at, value)


def _faults_in_entries(hint: Any, value: Any, at: str) -> Iterator[str]:
    """Yield what is not right in a mapping with known entries."""
    if not isinstance(value, dict):
        yield _wrong(at, value)
        return
    hints = typing.get_type_hints(hint, include_extras=True)
    optional = {name for name, inner in hints.items() if typing.get_origin(inner) is NotRequired}
    needed = (
        NEEDED.get(hint, ()) if dataclasses.is_dataclass(hint) else hints.keys() - optional if hint.__total__ else ()
    )
    for name in sorted(needed):
        if name not in value:
            yield f"it has no entry {at}{name}"
    for name, inner in typing.get_type_hints(hint).items():
        if name in value:
            yield from _faults(inner, value[name], f"{at}{name}.")


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint is datetime:
        return isinstance(value, str) and _is_time(value)
    return hint in (Any, object) or isinstance(value, hint)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more digits than a float takes
        return False


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _wrong(at: str, value: Any) -> str:
    return f"{at.removesuffix('.') or 'it'} is {clipped(repr(value), MOST_OF_VALUE)}"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _damaged(storage: Storage, reason: str) -> StudyError:
    return StudyError(
        f"{STUDY_FILE} in {storage.path} is damaged: {reason}. Put a copy of it back, or move the folder away and begin anew."
    )
