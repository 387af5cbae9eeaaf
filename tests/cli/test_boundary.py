"""What the shell sees: exit codes, one line for every error, signals, and streams that are closed or full."""

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from dfkt.cli.boundary import Parser, guarded, say
from dfkt.errors import ConfigError, NonFiniteLossError

INTERRUPTED = "interrupted; what was finished is kept, and the same command goes on from there\n"


def raising(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("a rule"), 2, "error: a rule\n"),
        (ConfigError("a rule\nover two lines"), 2, "error: a rule over two lines\n"),
        (NonFiniteLossError("nan in stage 2"), 1, "failed: nan in stage 2\n"),
        (KeyboardInterrupt(), 130, INTERRUPTED),
    ],
)
def test_the_exit_code_says_what_happened(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(raising(error), []) == code
    assert capsys.readouterr().err == said
    assert guarded(lambda: 1, []) == 1


def test_what_was_not_foreseen_is_one_line_with_its_name_and_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(raising(ZeroDivisionError("by\nzero")), []) == 1
    line = capsys.readouterr().err
    assert line.startswith("failed: not foreseen: ZeroDivisionError: by zero (test_boundary.py:")
    assert line.endswith("; --debug shows the traceback\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), ConfigError("a rule")])
def test_debug_shows_the_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    guarded(raising(error), ["--debug"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_command_knows_debug_before_and_behind_its_name() -> None:
    parser = Parser(prog="x")
    parser.add_subparsers(dest="command").add_parser("run")
    assert parser.parse_args(["--debug", "run"]).debug
    assert parser.parse_args(["run", "--debug"]).debug
    assert not hasattr(parser.parse_args(["run"]), "debug")


@pytest.mark.parametrize("wrong", [["--size", "x" * 9000], ["--size", "a\nb"], ["--size", "\udcff"], ["--other"]])
def test_a_wrong_switch_is_one_short_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="x")
    parser.add_argument("--size", type=int)
    with pytest.raises(SystemExit) as raised:
        parser.parse_args(wrong)
    assert raised.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.endswith("(x --help lists the switches)\n")
    assert line.count("\n") == 1
    assert len(line) < 400


def test_sigterm_is_treated_like_ctrl_c_with_a_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # another thread may be told of it first
        raise AssertionError("it went on")

    assert guarded(action, []) == 143
    assert capsys.readouterr().err == INTERRUPTED
    assert guarded(raising(KeyboardInterrupt()), []) == 130  # the next one is not told of it


def test_sigterm_reaches_whoever_listens_for_ctrl_c_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune ends its runs in order when it hears of Ctrl-C."""
    heard = []

    def action() -> int:
        before = signal.signal(signal.SIGINT, lambda *given: heard.append(given[0]))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            signal.signal(signal.SIGINT, before)
        return 130  # as a study that was stopped in order

    assert guarded(action, []) == 143
    assert heard == [signal.SIGINT]


def test_sigterm_ends_a_command_in_the_background_where_ctrl_c_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> int:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            signal.signal(signal.SIGINT, before)
        raise AssertionError("it went on")

    assert guarded(action, []) == 143


def test_warnings_of_libraries_are_not_for_the_user_and_those_of_his_own_code_are() -> None:
    def action() -> int:
        for module in ("torch.nn", "torchvision", "mine"):
            warnings.warn_explicit(f"from {module}", UserWarning, "x.py", 1, module=module)
        return 0

    for argv, expected in (([], ["from mine"]), (["--debug"], ["from torch.nn", "from torchvision", "from mine"])):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert guarded(action, argv) == 0
        assert [str(warning.message) for warning in seen] == expected


def test_the_work_goes_on_when_nobody_reads_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def action() -> int:
        for _ in range(3):
            say("line")
        return 0

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert guarded(action, []) == 0


def test_lines_that_a_full_disk_swallowed_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert guarded(lambda: say("line") or 0, []) == 1
    assert capsys.readouterr().err == f"failed: lines could not be written: {os.strerror(errno.ENOSPC)}\n"


def test_a_line_is_out_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    say("now")
    os.write(1, b"behind\n")
    assert capfd.readouterr().out == "now\nbehind\n"


def test_what_a_stream_cannot_encode_is_written_in_other_letters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as narrow:
        monkeypatch.setattr(sys, "stdout", narrow)
        say("± 1 \udcff")
    assert (tmp_path / "out").read_bytes() == b"\\xb1 1 \\udcff\n"


SHELL = {
    "help into a pipe that nobody reads": ("{dfkt} --help | true", 0),
    "help without a buffer into a pipe that nobody reads": ("PYTHONUNBUFFERED=1 {dfkt} --help | true", 0),
    "show of nothing, everything closed": ("{dfkt} show /nowhere 0<&- 1>&- 2>&-", 2),
    "no stderr": ("{dfkt} show /nowhere 2>&-", 2),
    "a full stdout": ("{dfkt} --version >/dev/full", 1),
    "a full stderr": ("{dfkt} show /nowhere 2>/dev/full", 2),
}


@pytest.mark.parametrize(("line", "code"), SHELL.values(), ids=SHELL)
def test_closed_and_full_streams_end_as_a_shell_expects(line: str, code: int) -> None:
    command = line.format(dfkt=f"{sys.executable} -m dfkt")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
