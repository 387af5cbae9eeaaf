"""A second process has the last word of one that Ray ends; one that comes to its end leaves it at once."""

import multiprocessing
import socket
from pathlib import Path

import pytest

from dfkt.study.last_words import last_words


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12 on
def test_it_is_left_though_a_child_that_was_forked_lives_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fork = multiprocessing.get_context("fork")
    end = fork.Event()
    with socket.socket(socket.AF_UNIX) as raylet, last_words("gone") as tell:
        raylet.bind(str(tmp_path / "raylet"))
        tell(str(tmp_path / "raylet"))  # nobody listens there
        child = fork.Process(target=end.wait)
        child.start()
    end.set()
    child.join()
    assert capfd.readouterr().err == ""
