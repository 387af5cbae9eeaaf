"""The Ray cluster: connect to one or start one on this machine, quietly."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from dfkt.errors import ConfigError, RunError, one_line, tell
from dfkt.study.driver import TRAIN_ENVIRONMENT
from dfkt.study.last_words import OVER, last_words

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # no boxes and tables of Tune's own
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trial store holds what those files would
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a flow stage reports no accuracy
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # how many wait for machines is decided in watch.py
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the study's folder is what a resumed run reads, not Tune's state
} | TRAIN_ENVIRONMENT
NETWORK_INTERFACE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Handed on to the workers where they are set: host names may resolve to the wrong interface."""
STARTED_HERE = Path("/tmp/ray/ray_current_cluster")
"""``ray start`` and ``ray up`` leave the address of the cluster around this machine here."""
ANSWERS_WITHIN = 10.0
"""Seconds until whoever listens at an address must have answered; Ray itself tries for minutes."""
TRIES = 3
"""To start Ray on this machine; its parts have 30 s each time."""
INTERRUPTED = "interrupted; what was finished is kept, and the same command goes on from there"
TERMINATED = 128 + signal.SIGTERM
"""Exit code, as shells have it."""
VITAL = ("gcs_server", "raylet")
"""Parts of a Ray that was started here without which it does nothing more."""
HEAD_ASKED_EVERY, HEAD_GONE_AFTER = 5.0, 30.0
"""Seconds between looks at the cluster's head, and without an answer until it counts as gone."""
OBJECT_STORE_BYTES = 200 * 2**20
"""No images travel through Ray, so a small object store will do."""


Log = Callable[[str], None]


@contextlib.contextmanager
def cluster(address: str | None, log: Log | None = None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine; shut down what was started.

    Inside another such context it does nothing.

    Args:
        address: As ``ray.init`` takes it; ``None`` takes ``RAY_ADDRESS``, the cluster that ``ray start`` made this machine
            a part of, or starts one.
        log: Receives a line with the address of Ray's dashboard, where there is one.

    Raises:
        ConfigError: If no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, level in (("ray", logging.ERROR), ("ray.train", logging.ERROR), ("ray.tune", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)
    forwarded = {name: os.environ[name] for name in (*ENVIRONMENT, *NETWORK_INTERFACE) if name in os.environ}
    address = find_address(address)
    _check_listening(address)
    options: dict[str, Any] = {}
    if not address:  # the dashboard must be on: it frees the placement groups of stopped trials
        options = {"include_dashboard": True, "object_store_memory": OBJECT_STORE_BYTES}
    options |= {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": {"env_vars": forwarded}}
    with last_words(_gone("Ray's raylet on this machine")) as told:
        yield from _joined(address, options, told, log)


def find_address(address: str | None) -> str | None:
    """Return the address of the cluster that :func:`cluster` connects to; ``None`` if it starts one on this machine."""
    return address or os.environ.get("RAY_ADDRESS") or ("auto" if STARTED_HERE.exists() else None)


def _joined(
    address: str | None, options: dict[str, Any], told: Callable[[str], None], log: Log | None
) -> Iterator[None]:
    """Connect, watch the head meanwhile, and shut down.

    Args:
        address: As for :func:`cluster`, or ``None`` to start one.
        options: For ``ray.init``.
        told: Hands on what :func:`dfkt.study.last_words.last_words` wants to know.
        log: As for :func:`cluster`.
    """
    terminate = signal.getsignal(signal.SIGTERM)
    context = _connected(address, options, log)
    if (node := ray._private.worker._global_node) is not None:
        told(node.raylet_socket_name)
    asked = threading.Event()

    def end(number: int, frame: Any) -> None:
        asked.set()
        if callable(terminate):
            terminate(number, frame)
        else:
            os._exit(TERMINATED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)  # Ray's own ends the process at once
    ray._private.worker._worker_logs_enabled = False  # else lines of the raylet come though `log_to_driver` is off
    if log is not None and context.dashboard_url:
        log(f"Ray's dashboard: http://{context.dashboard_url}")
    over = threading.Event()
    if head := getattr(context, "address_info", {}).get("gcs_address"):
        threading.Thread(target=_watch_head, args=(head, over, asked, told), name="head watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        ray.shutdown()


def _connected(address: str | None, options: dict[str, Any], log: Log | None) -> Any:
    """Return what ``ray.init`` returns; a Ray that is started here gets more than one try, since a busy machine is slow.

    Raises:
        ConfigError: If no cluster answers.
        RunError: If Ray does not start here.
    """
    for left in reversed(range(TRIES)):
        before = psutil.Process().children(recursive=True)
        try:
            with native_errors_unseen():
                return ray.init(address=address, **options)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"No Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error
        except Exception as error:  # Ray says of its parts that they timed out by a plain one
            ray.shutdown()
            for part in psutil.Process().children(recursive=True):  # else they would be in the next try's way
                if part not in before:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        part.kill()
            if address or not left:
                where = f"to the Ray cluster at {address}" if address else f"Ray on this machine in {TRIES} tries"
                raise RunError(f"could not {'connect' if address else 'start'} {where}: {one_line(error)}") from error
            if log is not None:
                log(f"Ray did not start ({one_line(error)}); it is tried again")
    raise AssertionError("the last try returned or raised")


def _gone(what: str) -> str:
    return f"failed: {what} is gone; what was finished is kept, and the same command goes on from there"


def _watch_head(address: str, over: threading.Event, asked: threading.Event, told: Callable[[str], None]) -> None:
    """End this process with one line once the cluster's head is gone: Ray would, a minute later and with a page of its own.

    Args:
        address: ``HOST:PORT`` of its control store.
        over: Set when nothing is asked of it any more.
        asked: Set when this process was to end: who ends all processes of a job ends Ray's too.
        told: Told that nothing is left to be said.
    """
    heard = time.monotonic()
    while not over.wait(HEAD_ASKED_EVERY):
        dead = _dead_parts()
        if not dead and _refusal(address, HEAD_ASKED_EVERY) is None:
            heard = time.monotonic()
        elif dead or time.monotonic() - heard >= HEAD_GONE_AFTER:
            gone = _gone(f"Ray's {dead[0]} on this machine" if dead else f"the Ray cluster's head at {address}")
            told(OVER)
            tell(INTERRUPTED if asked.is_set() else gone)
            os._exit(TERMINATED if asked.is_set() else 1)  # the main thread may wait for the head for ever


def _dead_parts() -> list[str]:
    """Return which vital parts of a Ray that was started here have died: Ray's own C++ ends this process then, without a word."""
    node = ray._private.worker._global_node
    return [] if node is None else [kind for kind, _ in node.dead_processes() if kind in VITAL]


def _refusal(address: str, seconds: float) -> Exception | None:
    """Return why nobody answers at an address ``HOST:PORT``; ``None`` if somebody does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return error
    return None


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Put the handlers of Ctrl-C and SIGUSR1 back at the end: Tune leaves its own, and the next Ctrl-C would be lost."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGUSR1)]
    try:
        yield
    finally:
        for number, handler in before if threading.current_thread() is threading.main_thread() else ():
            signal.signal(number, handler)


@contextlib.contextmanager
def native_errors_unseen() -> Iterator[None]:
    """Let Ray's C++ parts, and processes that are started, write their errors to nowhere; ``sys.stderr`` is seen as before.

    They write to the file descriptor itself, and processes keep what they were started with.
    """
    python = sys.stderr
    python.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # a stream of Python's own has no number
        if python.fileno() == 2:
            sys.stderr = open(  # noqa: SIM115
                kept, "w", buffering=1, encoding=python.encoding, errors="backslashreplace", closefd=False
            )
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os.dup2(kept, 2)
        sys.stderr = python
        os.close(kept)
        os.close(nothing)


def _check_listening(address: str | None) -> None:
    """Refuse an address ``HOST:PORT`` at which nobody listens."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()):
        return
    if (error := _refusal(f"{host}:{port}", ANSWERS_WITHIN)) is not None:
        raise ConfigError(f"No Ray cluster answers at {address}: {one_line(error)}") from error
