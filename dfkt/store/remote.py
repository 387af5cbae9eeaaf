"""What is special about folders that are reached over a network: their URIs, what fails there and may pass, what to do.

pyarrow's S3 client asks again by itself, every 0.2 s for 6 s, after a lost connection and most answers of the kind 5xx. Its
URIs take no other number. One failed request in ten is nothing to it; a store that is away for longer is waited for here.
"""

from __future__ import annotations

import errno
import functools
import random
import re
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from dfkt.errors import StudyError, one_line, tell

WITH_BUCKET = ("s3", "gs", "gcs", "abfs", "abfss")
SCHEMES = (*WITH_BUCKET, "file", "hdfs", "viewfs", "http", "https")
"""What begins like a URI and is not taken for a local path."""
SECONDS = 120.0
"""For how long a request that fails by something that may pass is made again; the last try may take pyarrow's own time."""
FIRST_DELAY, LONGEST_DELAY = 0.2, 10.0
"""Seconds between two tries, doubled each time; of each a random part is left out, so that not all come back at once."""
SAID_AFTER = 5.0
"""Seconds after which a wait is told on ``stderr``."""
PASSING_ERRORS = {errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN}
"""Of mounted network folders: a file that another host has just replaced, and a server that is away.

``EIO`` is not among them: it is what a broken disk says, and a network folder whose server is away for good.
"""
PASSING = re.compile(
    r"NETWORK_CONNECTION|SLOW_?DOWN|THROTTL|TOO_?MANY_?REQUESTS|INTERNAL_(FAILURE|ERROR)|SERVICE_?UNAVAILABLE|UNAVAILABLE:"
    r"|DEADLINE_EXCEEDED|REQUEST_?TIMEOUT|OPERATION_?ABORTED|HTTP status (408|409|429|5\d\d)|curlCode"
    r"|\b50[0234] (internal server|bad gateway|service|gateway|the server|server)"
    r"|connection (was )?(reset|refused|closed|aborted|timed out)|broken pipe",
    re.IGNORECASE,
)
"""What stores say in words (S3's are AWS SDK's names) when the same request may work later."""
UNTRUSTED = r"curlCode: (51|58|60|77|83|90|91)\b"
"""A certificate that is not accepted; the SDK calls it ``NETWORK_CONNECTION``, too."""
UNKNOWN_HOST = re.compile(r"curlCode: 6\b|resolve host", re.IGNORECASE)
REMEDIES = {
    r"NO_?SUCH_?BUCKET|bucket does not exist|ContainerNotFound": "Create the bucket, or correct its name in the URI",
    r"INVALID_?ACCESS_?KEY|SIGNATURE_?DOES_?NOT_?MATCH|UNRECOGNIZED_?CLIENT|INVALID_?CLIENT_?TOKEN": (
        "Correct your credentials (environment, profile or role)"
    ),
    r"EXPIRED_?TOKEN": "Renew your credentials, which have run out",
    UNTRUSTED: "Check the endpoint's certificate, and which ones this machine trusts",
    r"TIME_?TOO_?SKEWED": "Set this machine's clock",
    r"ACCESS_?DENIED|HTTP status (401|403)|PERMISSION_DENIED|Forbidden": (
        "Check the URI and your credentials: they must allow to list, read, write and delete there"
    ),
}
"""By what is said of an error that does not pass: what to do."""
OTHERWISE = "Check the URI and your credentials"
Given = ParamSpec("Given")
Answer = TypeVar("Answer")
_answered: set[str] = set()


class Place(Protocol):
    """What is asked: a folder."""

    path: str


Owner = TypeVar("Owner", bound=Place)


def patient(request: Callable[Concatenate[Owner, Given], Answer]) -> Callable[Concatenate[Owner, Given], Answer]:
    """Make a method of a folder ask again, for up to 120 s, while it fails by something that may pass.

    Requests must be such that a second one does no harm where the first was done and only its answer got lost: a file is
    written whole, what is deleted is gone.
    """

    @functools.wraps(request)
    def asked(self: Owner, /, *args: Given.args, **given: Given.kwargs) -> Answer:
        began, delay, said = time.monotonic(), FIRST_DELAY, False
        while True:
            try:
                answer = request(self, *args, **given)
            except OSError as error:
                waited, pause = time.monotonic() - began, delay * _part()
                if not may_pass(error, self.path) or waited + pause > SECONDS:
                    raise
                if waited >= SAID_AFTER and not said:
                    said = True
                    tell(f"waiting for {self.path}, for up to {SECONDS:.0f} s ({one_line(error)})")
                time.sleep(pause)
                delay = min(2 * delay, LONGEST_DELAY)
            else:
                _answered.add(_store(self.path))
                return answer

    return asked


def may_pass(error: OSError, place: str) -> bool:
    """Whether what failed may work later: a lost connection, an overloaded or restarting store, not a missing right.

    Args:
        error: What was raised.
        place: The folder. That its host has no address may pass if it has answered this process; else the URI is wrong.
    """
    if error.errno is not None:
        return error.errno in PASSING_ERRORS
    text = str(error)
    if UNKNOWN_HOST.search(text):
        return _store(place) in _answered
    return PASSING.search(text) is not None and re.search(UNTRUSTED, text) is None


def remedy(error: BaseException) -> str:
    """Return what a user may do about a remote folder that cannot be used."""
    text = str(error)
    return next((cure for words, cure in REMEDIES.items() if re.search(words, text, re.IGNORECASE)), OTHERWISE)


def check_place(text: str) -> None:
    """Refuse what is neither a path nor a URI; what is left of a variable that was not set is the usual reason.

    Raises:
        StudyError: If the text is empty, holds a zero byte, or looks like a URI but is none, or one without a bucket.
    """
    if not text:
        raise StudyError("A study folder must be a path or a URI, but got an empty text.")
    if "\0" in text:
        raise StudyError(f"A study folder's name must hold no zero byte, but got {text!r}.")
    scheme, mark, rest = text.partition(":")
    if scheme.lower() in SCHEMES and mark and not rest.startswith("//"):
        raise StudyError(
            f"A URI begins with {scheme.lower()}://, but got {text!r}. Write ./{text} for a local folder of that name."
        )
    if scheme in WITH_BUCKET and re.match(r"//($|[/?])", rest):
        raise StudyError(
            f"A URI names a bucket, {scheme}://BUCKET/FOLDER, but got {text!r}. Is a variable in it not set?"
        )


def _part() -> float:
    """Return a random number between a half and one; the generators that training draws from stay as they are."""
    return random.SystemRandom().uniform(0.5, 1)


def _store(place: str) -> str:
    """Return a URI without its folders: bucket and options."""
    head, _, options = place.partition("?")
    return "/".join(head.split("/")[:3]) + options
