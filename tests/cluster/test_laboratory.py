"""The hosts of a laboratory are apart from one another and from this machine, and leave nothing behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster.laboratory import NAMESPACES, Laboratory, processes_in, wait_for, why_impossible

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
HELD = """
import os, sys
from pathlib import Path
from cluster.laboratory import NAMESPACES, Laboratory
lab = Laboratory(Path(sys.argv[1]), names=("one",)).__enter__()
lab.hosts["one"].start_command("sleep 1000", lab.folder / "sleep.txt")
print(*(os.readlink(f"/proc/{lab.hosts['one'].pid}/ns/{kind}") for kind in NAMESPACES), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if why := why_impossible():
        pytest.skip(why)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("laboratory"), names=("one", "two")) as found:
        yield found


def test_hosts_have_names_processes_and_files_of_their_own(lab: Laboratory) -> None:
    for name, host in lab.hosts.items():
        said = host.run("hostname; echo $$ > /tmp/mine; touch ~/mine /dev/shm/mine; ls /tmp /dev/shm; ls ~; ls /proc")
        words = said.split()
        assert words[0] == name
        assert words.count("mine") == 3
        assert len([word for word in words if word.isdigit()]) < 10
    assert not Path("/tmp/mine").exists()
    assert not Path("/dev/shm/mine").exists()


def test_what_is_shared_is_one_folder_for_all(lab: Laboratory) -> None:
    one, two = lab.hosts.values()
    one.run(f"echo hello > {lab.shared}/told")
    assert two.run(f"cat {lab.shared}/told") == (lab.shared / "told").read_text() == "hello\n"


def test_a_host_is_out_of_reach_while_its_network_is_cut(lab: Laboratory) -> None:
    one, two = lab.hosts.values()
    login = f"bash -c 'exec 3<>/dev/tcp/{two.address}/22'"
    assert one.succeeds(login)
    lab.cut(two)
    assert not one.succeeds(login, 2)
    lab.mend(two)
    wait_for(lambda: one.succeeds(login, 2), 30, "the mended network")


def test_a_command_that_takes_too_long_is_ended(lab: Laboratory) -> None:
    one = lab.hosts["one"]
    assert not one.succeeds("sleep 987", 0.5)
    wait_for(lambda: not one.find("sleep 987"), 10, "the end of the command")


def test_two_laboratories_do_not_meet(lab: Laboratory, tmp_path: Path) -> None:
    with Laboratory(tmp_path / "other", names=("one",)) as other:
        assert other.hosts["one"].address == lab.hosts["one"].address
        other.hosts["one"].run(f"touch {other.shared}/here")
        assert not (lab.shared / "here").exists()
    assert other.left() == []
    assert lab.hosts["one"].succeeds("true")


def test_a_process_that_is_killed_takes_its_laboratory_along(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HELD, str(tmp_path / "lab")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as holder:
        assert holder.stdout is not None
        namespaces = holder.stdout.readline().split()
        assert len(namespaces) == len(NAMESPACES)
        assert len(processes_in(namespaces)) >= 2
        psutil.Process(holder.pid).kill()
    wait_for(lambda: not processes_in(namespaces), 20, "the end of all processes")
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
