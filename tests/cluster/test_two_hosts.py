"""A cluster of two hosts, from ``ray up`` to ``ray down``, in the order of a user's day."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.laboratory import Laboratory, why_impossible
from cluster.own_hosts import PROFILE, OwnHosts, folder_of, study_command
from conftest import RAY_MARKS

from dfkt.store.study_store import read_study

BOTH = {"head", "worker"}
pytestmark = [*RAY_MARKS, pytest.mark.timeout(600)]
# Minutes of starting and killing Ray: a busy machine runs into its limits. DFKT_FAULTS=1 runs it.
pytestmark = [*pytestmark, pytest.mark.skipif("DFKT_FAULTS" not in os.environ, reason="DFKT_FAULTS is not set")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnHosts]:
    """A cluster that ``ray up`` made; afterwards nothing of its hosts may be left."""
    if why := why_impossible():
        pytest.skip(why)
    with Laboratory(tmp_path_factory.mktemp("laboratory"), profile=PROFILE) as lab:
        cluster = OwnHosts(lab)
        cluster.up()
        yield cluster


def runs(folder: Path) -> list[tuple[str, int, float]]:
    """Return state, workers and epochs of a study's final runs, as the store has them."""
    finals = read_study(folder).finals
    return list(zip(finals.state, finals.workers, finals.epochs, strict=True))


def epochs(folder: Path) -> list[list[float]]:
    """Return the whole epochs that each final run has records of."""
    table = read_study(folder).final_epochs
    return [[epoch for epoch in rows.epoch if epoch == int(epoch)] for _, rows in table.groupby("number")]


def test_every_host_has_an_address_that_its_own_name_does_not_lead_to(hosts: OwnHosts) -> None:
    for host in hosts.lab.hosts.values():
        code = "import socket; print(socket.gethostbyname(socket.gethostname()))"
        assert host.run(f"python -c '{code}'").split() == ["127.0.1.1"]


def test_the_doctor_asks_both_hosts_and_a_name_that_leads_nowhere_is_all_there_is(hosts: OwnHosts) -> None:
    said = hosts.run_job(f"python -m dfkt doctor --results {hosts.lab.shared} --data digits", 120)
    assert re.search(r"2 machines asked in \d+ s: 1 finding to know of", said)
    assert "leads to 127.0.1.1. Nothing to do: runs on several workers use the interface eth0" in said
    assert not list(hosts.lab.shared.iterdir())


def test_the_doctor_finds_results_that_each_host_has_for_itself_and_a_study_refuses_them(hosts: OwnHosts) -> None:
    said = hosts.head.run(
        "python -m dfkt doctor --results /tmp/own/deep; test $? = 1; ls -A /tmp/own || echo gone", 120
    )
    assert f"fails: worker ({hosts.others[0].address}): /tmp/own/deep is another folder there" in said
    assert said.endswith("gone\n")
    said = hosts.head.run(study_command(hosts.lab, "own", "--method kd --results /tmp/own") + "; test $? = 2", 120)
    assert f"error: worker ({hosts.others[0].address}): /tmp/own/own is another folder there" in said
    assert "runs to do" not in said
    assert hosts.others[0].run("ls -A /tmp/own || echo gone").endswith("gone\n")


def test_a_study_refuses_results_in_the_working_folder_of_its_job(hosts: OwnHosts) -> None:
    folder = "/tmp/ray/session_x/runtime_resources/working_dir_files/y"
    said = hosts.head.run(study_command(hosts.lab, "own", f"--method kd --results {folder}") + "; test $? = 2", 120)
    assert re.search(r"error: --results: results in \S+ are deleted when the job ends", said)


def test_runs_of_one_worker_use_both_hosts(hosts: OwnHosts) -> None:
    said = hosts.head.run(study_command(hosts.lab, "alone", "--method kd --seeds 2 --epochs 40"), 240)
    assert "2 runs to do, 2 at a time" in said
    assert hosts.hosts_of("ImplicitFunc") == BOTH
    assert runs(folder_of(hosts.lab, "alone")) == [("COMPLETE", 1, 40.0)] * 2
    assert epochs(folder_of(hosts.lab, "alone")) == [[*range(1, 41)]] * 2


def test_a_job_with_a_run_of_two_workers_uses_both_hosts(hosts: OwnHosts) -> None:
    command = study_command(hosts.lab, "group", "--method dfkt --seeds 1 --epochs 4 --workers-per-run 2")
    said = hosts.run_job(command, 240)
    assert re.search(r"Job '\w+' succeeded", said)
    assert "Traceback" not in said
    assert hosts.hosts_of("RayTrainWorker") == BOTH
    assert runs(folder_of(hosts.lab, "group")) == [("COMPLETE", 2, 4.0)]
    assert epochs(folder_of(hosts.lab, "group")) == [[1, 2, 3, 4]]


def test_ray_down_and_ray_stop_leave_nothing_running(hosts: OwnHosts) -> None:
    """On hosts of one's own, ``ray down`` stops Ray on the head alone; the others need a ``ray stop`` of their own."""
    assert hosts.ray_processes()
    hosts.down()
    assert [left for left in hosts.ray_processes() if left.startswith(hosts.head.name)] == []
    for host in hosts.others:
        hosts.lab.user.run(hosts.lab.ssh(host, "ray stop"), 90)
    assert hosts.ray_processes() == []
