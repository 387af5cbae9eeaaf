"""What may pass is told from what a run's own code raises, and both on one line."""

import errno
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray.exceptions
import torch
from ray import cloudpickle
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from dfkt.errors import MOST_CHARACTERS
from dfkt.store.files import Storage
from dfkt.study.failures import (
    DIED,
    ERRORS_FILE,
    KEPT_BYTES,
    PARTED,
    CodeError,
    code_error,
    keep,
    may_pass,
    reason,
    told_by,
)

GLOO = RuntimeError("[pair.cc:544] Gloo: Connection closed by peer [127.0.0.1]:1234")


def raised(error: Exception) -> Exception:
    """Return an exception that was raised here."""
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        ConnectionResetError("gone"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.distributed.DistNetworkError("no rendezvous"),
        GLOO,
        RuntimeError("NCCL communicator was aborted"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        pa.ArrowException("S3"),
        ray.exceptions.GetTimeoutError("late"),
    ],
)
def test_what_comes_from_around_a_run_may_pass(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [ValueError("gloo"), KeyError("x"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), AssertionError()],
)
def test_what_a_runs_own_code_raises_does_not(error: Exception) -> None:
    assert not may_pass(error)


def test_an_exception_of_code_is_told_with_the_line_that_raised_it_and_keeps_its_traceback() -> None:
    told = CodeError.of(raised(ValueError("too\nmany")))
    assert told.text == f"ValueError: too many ({__file__}:{raised.__code__.co_firstlineno + 3})"
    assert told.details.startswith("Traceback (most recent call last):\n")
    assert told.details.endswith("ValueError: too\nmany\n")
    assert told.payload == {"failure": told.text, "traceback": told.details}


def test_the_line_is_the_users_not_one_of_what_is_installed() -> None:
    try:
        torch.nn.Linear(3, 4)(torch.ones(2, 5))
    except RuntimeError as error:
        told = CodeError.of(error)
    assert told.text.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert f"({__file__}:" in told.text
    assert "torch/nn/modules/linear.py" in told.details


def test_it_travels_though_the_exception_itself_might_not() -> None:
    class LocalError(Exception):
        """Cannot be pickled."""

    told = CodeError.of(raised(LocalError("here")))
    again = pickle.loads(pickle.dumps(told))
    assert (str(again), again.payload) == (told.text, told.payload)


def test_a_long_text_is_cut() -> None:
    assert len(reason(ValueError("x" * 5000))) == MOST_CHARACTERS


LOST = ActorDiedErrorContext(actor_id=bytes(16), error_message="The actor died because its node has died. Node Id: 1")
CODE = CodeError("ValueError: no (m.py:3)", "Traceback")


@pytest.mark.parametrize(
    ("failures", "found"),
    [
        ({0: CODE}, CODE),
        ({0: GLOO, 1: CODE}, CODE),
        ({0: CODE, 1: ActorDiedError()}, None),  # it came of that
        ({0: GLOO}, None),
    ],
)
def test_a_group_fails_by_its_code_unless_a_process_died(failures: dict[int, Any], found: CodeError | None) -> None:
    assert code_error(WorkerGroupError("long", failures)) is found
    assert code_error(ControllerError(OSError("late"))) is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (None, "its process ended without a word"),
        (ActorDiedError(), DIED),
        (RayTaskError("train", "Traceback\nlong", OSError("full")), "OSError: full"),
        (RayTaskError("train", "…", WorkerGroupError("long", {0: GLOO, 1: ActorDiedError()})), DIED),
        (RayTaskError("train", "…", WorkerGroupError("long", {1: GLOO})), PARTED),
        (RuntimeError("[tcp/pair.cc:545] Read error [10.77.0.3]:12423: Connection reset by peer. GLHF!"), PARTED),
        (
            RayTaskError("train", "…", ControllerError(TimeoutError("no group\nin time"))),
            "TimeoutError: no group in time",
        ),
        (
            ActorDiedError(RayTaskError("__init__", "Traceback\nImportError: no mine", ImportError("no mine"))),
            "its process could not begin: ImportError: no mine",
        ),
        (ActorDiedError(LOST), "its machine was lost"),
        (OutOfMemoryError("a page"), "Ray ended its process, because its machine ran out of memory"),
    ],
)
def test_of_rays_errors_one_line_says_what_happened(error: Exception | None, text: str) -> None:
    assert reason(error) == text


def test_of_a_trial_the_last_error_counts_and_all_that_was_written_is_kept(tmp_path: Path) -> None:
    text, kept = tmp_path / "error.txt", tmp_path / "error.pkl"
    trial = SimpleNamespace(error_file=str(text), pickled_error_file=str(kept))
    assert told_by(trial, "s") == ("its process ended without a word", "")
    text.write_text("Failure # 1\nfirst\n\nFailure # 2\nsecond\n\n")
    assert told_by(trial, "s") == ("second", text.read_text())
    kept.write_bytes(cloudpickle.dumps(RayTaskError("train", "long", KeyError("x"))))
    assert told_by(trial, "s") == ("KeyError: 'x'", text.read_text())


def test_failures_are_kept_in_order_the_oldest_go_first_when_there_are_too_many(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "study")
    for number in range(3):
        file = keep(storage, f"kd trial {number}", f"Traceback {number}\n" + "x" * (KEPT_BYTES // 3) + "\n")
    assert file == os.path.join(storage.path, ERRORS_FILE)
    text = Path(file).read_text()
    assert [number for number in range(3) if f"===== kd trial {number}, 2" in text] == [1, 2]
    assert len(text) <= KEPT_BYTES
