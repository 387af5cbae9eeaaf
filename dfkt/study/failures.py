"""Why a run did not come to its end: what may pass and is tried again, how the rest is told, where all of it is kept."""

from __future__ import annotations

import sysconfig
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray.cloudpickle
import ray.train
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from dfkt.errors import MOST_CHARACTERS, RunError, is_full, one_line, storage_error
from dfkt.store.files import Storage
from dfkt.training.run import Payload

ERRORS_FILE = "errors.txt"
"""In the study's folder: what is known of every run that failed, tracebacks included; the latest last."""
KEPT_BYTES = 2**20
DIED = "its process died (killed, or out of memory)"
LOST = "its machine was lost"
PARTED = "a worker of its group lost the connection to another one"
PASSING = tuple(
    kind
    for kind in (
        OSError,
        MemoryError,
        torch.OutOfMemoryError,
        getattr(torch, "AcceleratorError", None),
        getattr(torch.distributed, "DistError", None),
    )
    if kind is not None
)
PASSING_PACKAGES = {"ray", "pyarrow"}
PEER_WORDS = ("connection closed by peer", "connection reset by peer")
PASSING_WORDS = ("gloo", "nccl", "cuda error", *PEER_WORDS)
INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class CodeError(RunError):
    """The code of a run raised, in a worker of a group; the same would happen again.

    Args:
        text: What and where, on one line.
        details: The traceback.
    """

    def __init__(self, text: str, details: str) -> None:
        super().__init__(text, details)
        self.text, self.details = text, details

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, error: Exception) -> CodeError:
        """Return what is told of an exception: texts, which travel though the exception itself might not."""
        return cls(f"{one_line(error)} ({_place(error)})", "".join(traceback.format_exception(error)))

    @property
    def payload(self) -> Payload:
        """The last report of the run."""
        return {"failure": self.text, "traceback": self.details}


def may_pass(error: Exception) -> bool:
    """Return whether what a run raised came from around it (storage, network, device, another process), not from its code."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return isinstance(error, PASSING) or bool(packages & PASSING_PACKAGES) or any(w in text for w in PASSING_WORDS)


def code_error(error: ray.train.TrainingFailedError) -> CodeError | None:
    """Return what the code of a group's workers raised; ``None`` if the group failed by something that may pass."""
    failures = list(getattr(error, "worker_failures", {}).values())
    if any(isinstance(_inner(failure), RayActorError) for failure in failures):
        return None  # what the others raised came of that
    return next((failure for failure in failures if isinstance(failure, CodeError)), None)


def reason(error: BaseException | None) -> str:
    """Return on one line why Tune gave a run up, or starts it again."""
    error = None if error is None else _inner(error)
    if error is None:
        return "its process ended without a word"
    if isinstance(error, OutOfMemoryError):
        return "Ray ended its process, because its machine ran out of memory"
    if isinstance(error, RayActorError):
        return _death(error)
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in PEER_WORDS):
        return PARTED  # gloo says it in 300 characters, of which none helps a user
    return one_line(error)


def told_by(trial: Any, folder: str) -> tuple[str, str]:
    """Return why Tune's trial failed last, on one line, and all that Tune wrote down of it.

    Raises:
        RunError: If the storage of its study, in a folder, takes nothing more.
    """
    details = ""
    try:
        details = Path(trial.error_file).read_text(errors="replace")
        error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # no file, or an exception of a kind that cannot be made here
        return _last_line(details) or reason(None), details
    if is_full(found := _inner(error)):
        raise storage_error(found, folder) from None
    return reason(error), details


def keep(storage: Storage, title: str, details: str) -> str:
    """Write down all that is known of a failure in a study's folder; return the file, as a user would name it."""
    entry = f"===== {title}, {datetime.now(UTC).isoformat(timespec='seconds')}\n{details.strip()}\n\n"
    kept = (storage.read(ERRORS_FILE) or b"") + entry.encode(errors="replace")
    storage.write(ERRORS_FILE, kept[-KEPT_BYTES:])
    return storage.sub(ERRORS_FILE).path


def _death(error: RayActorError) -> str:
    if error.actor_init_failed:
        return f"its process could not begin: {_last_line(str(error))}"
    return LOST if "node has died" in str(error) else DIED


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:MOST_CHARACTERS] if lines else ""


def _inner(error: BaseException) -> BaseException:
    """Return what happened, out of what Ray wrapped around it; the first death where several workers failed."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return _inner(error.cause)
    for name in ("health_check_failure", "controller_failure"):
        if isinstance(found := getattr(error, name, None), BaseException):
            return _inner(found)
    failures = [_inner(failure) for failure in getattr(error, "worker_failures", {}).values()]
    return next((f for f in failures if isinstance(f, RayActorError)), failures[0] if failures else error)


def _place(error: Exception) -> str:
    """Return file and line of the innermost frame outside of installed packages; else of the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*INSTALLED, "<"))]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"
