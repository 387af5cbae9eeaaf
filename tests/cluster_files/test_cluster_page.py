"""The page on clusters names commands that exist, with options that they take, and says what each file leaves to the user."""

import importlib
import json
import re
import shlex
import subprocess

import pytest
from cli.switches import parsed
from cluster_files.reading import CLUSTER_FILES, ROOT, check_ray_versions, placeholders, ray_command_error

from dfkt.errors import ConfigError

PAGE = (ROOT / "docs" / "cluster.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
INLINE = re.findall(r"`((?:ray|python) [^`]+)`", PAGE)
LINES = [line for line in BLOCKS.splitlines() if line.startswith(("ray ", "python "))] + INLINE
RAY_LINES = [line for line in LINES if line.startswith("ray ")]
STUDY_LINES = sorted({found for line in LINES for found in re.findall(r"python (?:-m dfkt|studies/\S+) [^']*", line)})


@pytest.mark.parametrize("line", RAY_LINES)
def test_ray_has_the_command_and_its_options(line: str) -> None:
    assert ray_command_error(shlex.split(line)[1:]) == ""


@pytest.mark.parametrize("line", STUDY_LINES)
def test_the_package_has_the_command_and_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "-m":
        command, switches = words[2], words[3:]
    else:
        assert (ROOT / words[0]).exists()
        command, switches = "study", words[1:]
    parsed(importlib.import_module(f"dfkt.cli.{command}"), *switches)


@pytest.mark.parametrize("switch", re.findall(r"`(--(?!gpus=|submission-id)[^`]+)`", PAGE))
def test_a_study_has_every_switch_of_the_text(switch: str) -> None:
    with_value = {"--batch-size": "64", "--wait": "30", "--data": "digits", "--checkpoint-every": "2"}
    words = shlex.split(switch)
    parsed(
        importlib.import_module("dfkt.cli.study"), *words, *[with_value[word] for word in words if word in with_value]
    )


def test_an_option_that_a_study_does_not_have_is_found() -> None:
    with pytest.raises((ConfigError, SystemExit)):
        parsed(importlib.import_module("dfkt.cli.study"), "--at-twice", "8")


def test_the_page_has_commands_of_every_kind() -> None:
    assert {"up", "dashboard", "job", "submit", "down"} <= {line.split()[1] for line in RAY_LINES}
    assert {"show", "resume"} <= {line.split()[3] for line in STUDY_LINES if "-m dfkt" in line}


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_the_page_says_what_each_file_leaves_to_the_user(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f"| `{name}` |" in line]
    assert placeholders(row) == placeholders((ROOT / name).read_text())


def test_the_edits_of_the_page_leave_no_mark() -> None:
    edits = re.findall(r"^sed -i (\S.*) (\S+\.yaml)$", BLOCKS, re.MULTILINE)
    assert len(edits) == 3
    for script, name in edits:
        edited = subprocess.run(
            ["sed", *shlex.split(script), name], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert placeholders(edited.stdout) == set()


def test_what_the_page_builds_has_the_ray_of_the_package() -> None:
    assert len(check_ray_versions(PAGE)) >= 3


def test_the_role_of_the_page_may_start_workers_that_open_the_bucket() -> None:
    policies = [json.loads(text) for text in re.findall(r"-policy-document '(.*?)'", BLOCKS, re.DOTALL)]
    actions = {statement["Action"] for policy in policies for statement in policy["Statement"]}
    assert actions == {"sts:AssumeRole", "iam:PassRole", "ssm:GetParameters"}
    assert {"AmazonEC2FullAccess", "AmazonS3FullAccess"} <= set(re.findall(r"policy/(\w+)", BLOCKS))


def test_the_names_by_which_machines_are_found_are_rays() -> None:
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

    assert f"Name=tag:{TAG_RAY_CLUSTER_NAME},Values=dfkt" in PAGE
    assert f"labels.{TAG_RAY_CLUSTER_NAME}=dfkt" in PAGE
