"""What machines said is told as what is wrong, where, and what to do; what fails is told from what does not."""

from dataclasses import replace
from typing import Any

import pytest

from dfkt.study.findings import (
    Finding,
    Machine,
    find_all,
    find_data_faults,
    find_hardware_faults,
    find_marks,
    find_missing,
    find_name_faults,
    find_path_faults,
    find_versions,
    merged,
)
from dfkt.study.host import Data, Hardware, Health
from dfkt.study.machines import Unanswered

GIB = 2**30
HARDWARE = Hardware(2, "", 2, "10.0.0.2", "eth0", {"/tmp/ray": (50 * GIB, 100 * GIB)}, (8 * GIB, 8 * GIB))
HEALTH = Health(
    name="one",
    versions={"python": "3.11.7", "torch": "2.14.1+cu130", "ray": "2.60.0", "dfkt": "0.1.0"},
    code="abc",
    sees=True,
    storage="",
    left="",
    data={"digits": Data(), "/images": Data(classes=("cat", "dog"))},
    hardware=HARDWARE,
)


def of(said: Any, **more: Any) -> list[Finding]:
    """Return what is found of one machine."""
    return find_all([Machine("10.0.0.2", said, 2.0, **more)], HEALTH, "/results")


def of_hardware(counted: float | None = 2.0, **changed: Any) -> list[Finding]:
    return list(find_hardware_faults(replace(HARDWARE, **changed), counted, "one"))


def fails(found: list[Finding]) -> bool:
    """Whether the only thing that was found fails."""
    (finding,) = found
    assert finding.where
    return finding.fails


def test_nothing_is_found_of_a_machine_that_is_well() -> None:
    assert of(HEALTH) == []
    assert of(replace(HEALTH, name="two"), apart=4.9) == []


def test_a_machine_is_named_as_itself_and_as_the_cluster_knows_it() -> None:
    assert of(replace(HEALTH, sees=False))[0].where == "one (10.0.0.2)"
    assert of(Unanswered("no answer within 60 s"))[0].where == "(10.0.0.2)"


def test_a_machine_that_cannot_be_asked_fails_but_not_one_that_has_gone() -> None:
    assert fails(of(Unanswered("no answer within 60 s")))
    assert "ModuleNotFoundError: dfkt" in of(Unanswered("ModuleNotFoundError: dfkt"))[0].what
    assert not fails(of(Unanswered("its node died", gone=True)))


@pytest.mark.parametrize(
    ("name", "version", "failing"),
    [
        ("python", "3.12.7", [True]),
        ("python", "3.11.9", [False]),
        ("torch", "2.13.0+cu130", [True]),
        ("torch", "2.14.1+cpu", []),  # a head without GPUs
        ("torch", "2.14.1", []),
        ("torch", None, [True]),
        ("ray", "2.60.1", [True]),
        ("dfkt", "0.2.0", [True]),
    ],
)
def test_other_versions_fail_but_for_builds_and_small_steps(
    name: str, version: str | None, failing: list[bool]
) -> None:
    found = list(find_versions(replace(HEALTH, versions=HEALTH.versions | {name: version}), HEALTH, "one"))
    assert [finding.fails for finding in found] == failing
    assert all(
        f"{name} is {version or 'none'}, here it is {HEALTH.versions[name]}" in finding.what for finding in found
    )


def test_other_files_of_one_version_fail() -> None:
    assert fails(list(find_versions(replace(HEALTH, code="other"), HEALTH, "one")))
    other = replace(HEALTH, code="other", versions=HEALTH.versions | {"dfkt": "0.2.0"})
    assert [finding.what for finding in find_versions(other, HEALTH, "one")] == ["dfkt is 0.2.0, here it is 0.1.0"]


def test_what_another_version_says_is_not_read() -> None:
    other = replace(HEALTH, versions=HEALTH.versions | {"dfkt": "0.2.0"}, sees=False)
    object.__delattr__(other, "data")  # as if that version had no such thing
    assert fails(of(other))
    near = replace(HEALTH, versions=HEALTH.versions | {"python": "3.11.9"}, sees=False)
    assert [finding.fails for finding in of(near)] == [True, False]


def test_a_folder_that_is_another_one_there_fails_whichever_side_does_not_see_the_other() -> None:
    for found in (of(replace(HEALTH, sees=False)), of(HEALTH, unseen=True)):
        assert fails(found)
        assert "/results is another folder there" in found[0].what
    refused = of(replace(HEALTH, sees=True, storage="A study folder must be writable, but /results is not."))
    assert refused[0].describe() == "fails: one (10.0.0.2): A study folder must be writable, but /results is not."


def test_results_of_a_job_that_lie_in_its_working_folder_fail() -> None:
    assert fails(list(find_path_faults("/tmp/ray/s/runtime_resources/working_dir_files/_ray_pkg_1/results")))
    for fine in ("/mnt/results", "s3://bucket/dfkt", "/tmp/ray/results"):
        assert list(find_path_faults(fine)) == []


def test_images_that_are_not_the_same_everywhere_fail() -> None:
    ours = HEALTH.data["/images"]
    assert list(find_data_faults("/images", ours, ours, "one")) == []
    missing = list(find_data_faults("/images", Data(fault="No such file"), ours, "one"))
    assert fails(missing)
    assert "/images cannot be read (No such file)" in missing[0].what
    fewer = list(find_data_faults("/images", Data(classes=("cat",)), ours, "one"))
    more = list(find_data_faults("/images", Data(classes=("cat", "dog", "eel")), ours, "one"))
    assert fails(fewer)
    assert "dog only here" in fewer[0].what
    assert "eel only there" in more[0].what
    assert len(list(find_data_faults("/images", Data(fault="x"), Data(fault="x"), "one"))) == 1
    assert not fails(list(find_data_faults("mnist", Data(there=False), Data(), "one")))


@pytest.mark.parametrize(("apart", "failing"), [(4.0, []), (5.0, [False]), (899.0, [False]), (901.0, [True])])
def test_clocks_apart_are_told_and_fail_where_a_bucket_refuses_them(apart: float, failing: list[bool]) -> None:
    assert [finding.fails for finding in of(HEALTH, apart=apart)] == failing


def test_gpus_that_ray_counts_must_be_there_for_torch() -> None:
    old = "UserWarning: The NVIDIA driver on your system is too old"
    found = of_hardware(gpus=0, gpu_fault=old)
    assert fails(found)
    assert f"Ray counts 2 GPUs, torch can use 0 ({old})" in found[0].what
    assert fails(of_hardware(gpus=1))
    assert not fails(of_hardware(counted=1.0))
    assert of_hardware(counted=2.0) == []


def test_gpus_that_nobody_uses_are_told() -> None:
    assert not fails(of_hardware(counted=0.0, gpus=0))
    assert not fails(of_hardware(counted=None, gpus=0))
    assert of_hardware(counted=0.0, gpus=0, built_in=0) == []
    assert of_hardware(counted=None) == []  # without a cluster nobody counts


@pytest.mark.parametrize("resolves", ["127.0.0.1", "127.0.1.1", ""])
def test_a_name_that_leads_to_the_host_itself_is_told_with_the_interface_that_is_used(resolves: str) -> None:
    found = list(find_name_faults(replace(HARDWARE, resolves=resolves), "one"))
    assert not fails(found)
    assert "use the interface eth0" in found[0].remedy
    (bare,) = find_name_faults(replace(HARDWARE, resolves=resolves, interface=""), "one")
    assert "GLOO_SOCKET_IFNAME" in bare.remedy
    assert list(find_name_faults(HARDWARE, "one")) == []


def test_a_hosts_own_name_matters_where_there_are_others() -> None:
    machine = Machine("10.0.0.2", replace(HEALTH, hardware=replace(HARDWARE, resolves="127.0.0.1")), 2.0)
    assert find_all([machine], HEALTH, "/results") == []
    assert len(find_all([machine, Machine("10.0.0.3", HEALTH, 2.0)], HEALTH, "/results")) == 1


@pytest.mark.parametrize(
    ("free", "total", "failing"),
    [(50, 100, []), (9, 100, [False]), (0.5, 100, [True]), (40, 1000, [False]), (60, 1000, [])],
)
def test_little_disk_is_told_and_hardly_any_fails(free: float, total: float, failing: list[bool]) -> None:
    found = of_hardware(disks={"/tmp/ray": (int(free * GIB), int(total * GIB))})
    assert [finding.fails for finding in found] == failing
    elsewhere = of_hardware(disks={"/cache": (40 * GIB, 1000 * GIB)})
    assert elsewhere == []  # only Ray minds shares


def test_little_shared_memory_is_told() -> None:
    assert not fails(of_hardware(memory=(2**26, 2**26)))
    assert not fails(of_hardware(memory=(2**20, 8 * GIB)))
    assert of_hardware(memory=None) == []


def test_machines_of_the_file_that_are_not_there_are_told_and_lost_ones() -> None:
    described = {"provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3", "name"]}}
    assert [f.where for f in find_missing(described, [], ["10.0.0.1", "10.0.0.2"])] == ["10.0.0.3"]
    states = {"10.0.0.7": 2, "10.0.0.8": 1, "10.0.0.9": 3, "10.0.0.1": 2}
    nodes = [
        {"NodeManagerAddress": at, "DeathReason": why, "DeathReasonMessage": "silent"} for at, why in states.items()
    ]
    found = list(find_missing(None, nodes, ["10.0.0.1"]))
    assert [(f.where, f.what, f.fails) for f in found] == [("10.0.0.7", "was lost (silent)", False)]


@pytest.mark.parametrize("described", [None, [], {}, {"provider": None}, {"provider": {"worker_ips": None}}, "x"])
def test_a_file_that_describes_no_hosts_misses_none(described: Any) -> None:
    assert list(find_missing(described, [], [])) == []


def test_one_line_is_for_all_machines_of_which_the_same_is_said_and_what_fails_comes_first() -> None:
    towns = [Finding(False, "dull", town, "Wait") for town in "ab"]
    found = merged([*towns, *(Finding(True, "wet", town, "Hide") for town in "aabcde"), *towns])
    assert [finding.describe() for finding in found] == [
        "fails: a, b, c and 2 more: wet. Hide.",
        "warning: a, b: dull. Wait.",
    ]


def test_marks_are_found_where_they_stand_but_not_in_comments() -> None:
    text = "a: 1\nkey: [CHANGE-ME-KEY, CHANGE-ME-USER]\n# CHANGE-ME-NOT\nb: x#CHANGE-ME-HERE  # CHANGE-ME-NOT\n"
    found = find_marks("f.yaml", text)
    assert [(finding.what.split()[0], finding.where) for finding in found] == [
        ("CHANGE-ME-KEY", "f.yaml, line 2"),
        ("CHANGE-ME-USER", "f.yaml, line 2"),
        ("CHANGE-ME-HERE", "f.yaml, line 4"),
    ]
    assert all(finding.fails for finding in found)
