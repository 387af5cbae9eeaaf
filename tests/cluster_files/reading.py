"""What is read in the files and on the page about clusters: marks, versions, commands."""

import re
import tomllib
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
CLUSTER_FILES = ["cluster.yaml", "clusters/gcp.yaml", "clusters/local.yaml", "clusters/kuberay-rayjob.yaml"]
RAY_VERSION = re.compile(r"(?:rayproject/ray:|dfkt:ray|ray==|rayVersion: )(\d+\.\d+\.\d+)")
PYTHON_VERSION = re.compile(r"-py3(\d+)")


def placeholders(text: str) -> set[str]:
    """Return what a file leaves to the user; comments do not count."""
    values = re.sub(r"(?:^|\s)#.*", "", text, flags=re.MULTILINE)
    return set(re.findall(r"CHANGE-ME-([A-Z]+)", values))


def filled(text: str) -> str:
    """Return a file as a user leaves it."""
    return re.sub(r"CHANGE-ME-([A-Z]+)", lambda found: f"changed-{found[1].lower()}", text)


def check_ray_versions(text: str) -> list[str]:
    """Return the versions of Ray that a text names; each, and Python's, must be one that ``pyproject.toml`` takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [each for each in map(Requirement, project["dependencies"]) if each.name == "ray"]
    versions = RAY_VERSION.findall(text)
    wrong = [each for each in versions if each not in wanted.specifier]
    assert not wrong, f"{wanted} must hold, but got ray {', '.join(wrong)}"
    pythons = [f"3.{minor}" for minor in PYTHON_VERSION.findall(text)]
    wrong = [each for each in pythons if each not in SpecifierSet(project["requires-python"])]
    assert not wrong, f"python {project['requires-python']} must hold, but got {', '.join(wrong)}"
    return versions


def ray_command_error(words: list[str]) -> str:
    """Return what Ray's command line has against these words behind ``ray``; nothing is run."""
    from ray.scripts.scripts import cli

    command: Any = cli
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(click.Context(command), name)
        if found is None:
            return f"`{name}` is no command"
        command = found
    try:
        command.make_parser(click.Context(command)).parse_args(list(words))
    except click.UsageError as error:
        return error.format_message()
    return ""
