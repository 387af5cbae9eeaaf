"""``python -m dfkt``: its commands."""

from __future__ import annotations

from collections.abc import Sequence

from dfkt.cli.boundary import Parser, guarded
from dfkt.store.origin import package_version


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (:mod:`dfkt.cli.boundary`)."""
    return guarded(lambda: _run(argv), argv)


def _run(argv: Sequence[str] | None) -> int:
    from dfkt.cli import cost, distill, doctor, export, predict, report, resume, show, study, teacher

    parser = Parser(prog="python -m dfkt", description="Compress image classifiers by dense flow.")
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {"study": study, "resume": resume, "distill": distill, "teacher": teacher, "show": show, "cost": cost}
    modules |= {"export": export, "predict": predict, "report": report, "doctor": doctor}
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.HELP, description=f"{module.HELP}.")
        module.add_switches(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def versions() -> str:
    """Return on one line the versions that matter: this package's, Python's, and those of what it stands on."""
    return ", ".join(f"{name} {package_version(name)}" for name in ("dfkt", "python", "torch", "ray", "optuna"))
