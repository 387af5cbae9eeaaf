"""The entry points: commands, study scripts, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from dfkt.errors import DfktError, InputError
from dfkt.store.origin import package_version

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 something failed, 2 bad input, 130 interrupted."""
    from dfkt.cli import distill, resume, show, study, teacher

    parser = argparse.ArgumentParser(prog="python -m dfkt", description="Compress image classifiers by dense flow.")
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {"study": study, "resume": resume, "distill": distill, "teacher": teacher, "show": show}
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.HELP, description=f"{module.HELP}.")
        module.add_switches(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def versions() -> str:
    """Return on one line the versions that matter: this package's, Python's, and those of what it stands on."""
    return ", ".join(f"{name} {package_version(name)}" for name in ("dfkt", "python", "torch", "ray", "optuna"))


def guarded(action: Callable[[], int]) -> int:
    """Call an action; turn what the user can mend into one line and exit code 2, Ctrl-C into 130."""
    try:
        return action()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except DfktError as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED


def say(line: str) -> None:
    """Print a line at once."""
    try:
        print(line, flush=True)
    except BrokenPipeError:  # the reader is gone (`… | head`); the work goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
