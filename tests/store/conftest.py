"""The same folder as a local path, as a ``file://`` URI, and behind the calls for remote folders."""

from pathlib import Path

import pytest
from pyarrow import fs

from dfkt.store import files
from dfkt.store.files import Storage


@pytest.fixture(params=["local", "file", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "local":
        return Storage(tmp_path / "study")
    if request.param == "file":
        return Storage((tmp_path / "study").as_uri())
    bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_from_uri", lambda uri: (bucket, uri.removeprefix("s3://")))
    return Storage("s3://study")
