"""An S3 store on this machine, by moto's server, that can be told to fail."""

import logging
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Fault = tuple[int, str] | None
RESET = (0, "connection reset")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "MOTO_ALLOW_NONEXISTENT_REGION": "true",
}


class Bucket:
    """A server with one empty bucket, ``study``.

    Attributes:
        fault: Called with every request; what it returns, HTTP status and S3's code or ``RESET``, is answered instead.
        requests: Method and path of all requests since the list was last emptied.
    """

    def __init__(self) -> None:
        self.fault: Callable[[dict[str, Any]], Fault] = lambda request: None
        self.requests: list[str] = []
        self.store = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *connection: None  # those that were reset
        self.endpoint = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.client = boto3.client("s3", endpoint_url=f"http://{self.endpoint}", region_name="us-east-1")
        self.client.create_bucket(Bucket="study")
        for key in self.keys():  # moto keeps them as long as this process lasts, whoever's server wrote them
            self.client.delete_object(Bucket="study", Key=key)

    def answer(self, request: dict[str, Any], start: Any) -> Any:
        """Answer a request, or fail as told."""
        self.requests.append(f"{request['REQUEST_METHOD']} {request['PATH_INFO']}")
        fault = self.fault(request)
        if fault is None:
            return self.store(request, start)
        if fault == RESET:
            connection = request["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(connection.detach())
            return []
        status, code = fault
        body = b"" if request["REQUEST_METHOD"] == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
        request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        start(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def uri(self, folder: str, bucket: str = "study") -> str:
        """Return a folder's URI."""
        return f"s3://{bucket}/{folder}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def keys(self) -> list[str]:
        """Return the names of all objects, those left out that mark a folder."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="study")
        return [entry["Key"] for page in pages for entry in page.get("Contents", ()) if not entry["Key"].endswith("/")]

    def close(self) -> None:
        """Stop the server."""
        self.client.close()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextmanager
def served() -> Iterator[Bucket]:
    """Serve a bucket; this process and all it starts have credentials for it."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        bucket = Bucket()
        try:
            yield bucket
        finally:
            bucket.close()


def one_in_ten(seed: int, *methods: str) -> Callable[[dict[str, Any]], Fault]:
    """Return a fault for one in ten requests by some methods; which ones, and how they fail, is drawn."""
    draws, kinds = random.Random(seed), (RESET, (500, "InternalError"), (503, "SlowDown"), (502, "BadGateway"))

    def fault(request: dict[str, Any]) -> Fault:
        return draws.choice(kinds) if request["REQUEST_METHOD"] in methods and draws.random() < 0.1 else None

    return fault
