"""A Ray cluster on the hosts of a laboratory: up, asked, down."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from cluster.laboratory import REPOSITORY, Host, Laboratory, LaboratoryError, end, wait_for

LOCAL = REPOSITORY / "clusters" / "local.yaml"
SIZE = "--num-cpus=1 --object-store-memory=100000000"
"""Of a host, for ``ray start``: two runs of one worker fill both hosts, and so does one run of two."""
PROFILE = f"export PYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 RAY_UP_enable_autoscaler_v2=0"
"""Of every login; the package is the one beside these tests, wherever it is installed from."""
RAY_PARTS = ("raylet", "gcs_server", "ray::", "/ray/")
"""By which a process of Ray's is known."""
PORT = 8265


def adapted(lab: Laboratory, cluster: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a cluster of one's own hosts, with the laboratory's instead.

    Hosts, user, key and how much of a host Ray takes are replaced; what installs packages is left out, for the hosts find
    this process's environment in its place.
    """
    head, *workers = lab.hosts.values()
    found = copy.deepcopy(cluster)
    found["provider"] |= {"head_ip": head.address, "worker_ips": [host.address for host in workers]}
    found["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
    found["setup_commands"] = [text for text in found["setup_commands"] if "pip install" not in text]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        plain = [re.sub(r"--object-store-memory=\d+", "", text) for text in found[name]]
        found[name] = [text.replace("ray start", f"ray start {SIZE}") for text in plain]
    for host in lab.hosts.values():
        (lab.folder / host.name / "home" / "dfkt-venv").symlink_to(sys.prefix)
    return found


class OwnHosts:
    """A Ray cluster on all hosts of a laboratory, the first one its head.

    Args:
        lab: The laboratory.
    """

    def __init__(self, lab: Laboratory) -> None:
        self.lab, self.file = lab, lab.folder / "cluster.yaml"
        self.head, *self.others = lab.hosts.values()

    def up(self, seconds: float = 150.0) -> None:
        """Bring it up by ``ray up``, as a user does, and wait for all hosts.

        Raises:
            LaboratoryError: If it does not come in so many seconds.
        """
        self.file.write_text(yaml.safe_dump(adapted(self.lab, yaml.safe_load(LOCAL.read_text()))))
        self.lab.user.run(f"cd {REPOSITORY}; ray up -y --no-config-cache {self.file}", seconds)
        self.await_hosts(seconds)

    def down(self, seconds: float = 90.0) -> None:
        """End it by ``ray down``, as a user does.

        Raises:
            LaboratoryError: If that fails.
        """
        self.lab.user.run(f"ray down -y {self.file}", seconds)

    def start(self, hosts: Sequence[Host] = (), seconds: float = 120.0) -> None:
        """Start Ray on some hosts, or on all, by ``ray start``: faster than ``ray up``, without an autoscaler.

        Raises:
            LaboratoryError: If it does not start in so many seconds.
        """
        for host in hosts or self.lab.hosts.values():
            place = "--head --port=6379" if host is self.head else f"--address={self.head.address}:6379"
            host.run(f"ray start {place} {SIZE}", seconds)
        self.await_hosts(seconds)

    def stop(self) -> None:
        """End Ray on all hosts, however it stands there; links are mended first."""
        for host in self.lab.hosts.values():
            self.lab.mend(host)
            for process in host.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            host.run("rm -rf /tmp/ray /dev/shm/*")

    def await_hosts(self, seconds: float) -> None:
        """Wait until Ray knows all hosts.

        Raises:
            LaboratoryError: If it does not in so many seconds.
        """
        wait_for(lambda: len(self.alive()) == len(self.lab.hosts), seconds, "a node of Ray on every host")

    def alive(self) -> dict[str, str]:
        """Return the hosts that Ray holds for alive, by its name for each; none while Ray does not answer."""
        names = {host.address: name for name, host in self.lab.hosts.items()}
        nodes = self._list("nodes")
        return {node["node_id"]: names[node["node_ip"]] for node in nodes if node["state"] == "ALIVE"}

    def hosts_of(self, kind: str) -> set[str]:
        """Return the hosts on which actors of a class were, dead ones included."""
        names = self.alive()
        return {names[actor["node_id"]] for actor in self._list("actors") if actor["class_name"] == kind}

    def _list(self, what: str) -> list[dict[str, Any]]:
        """Ask Ray's State API."""
        url = f"http://localhost:{PORT}/api/v0/{what}?detail=1&limit=10000"
        code = f"import urllib.request as web; print(web.urlopen({url!r}, timeout=10).read().decode())"
        try:
            said = self.head.run(f"python -c {shlex.quote(code)}", 20)
            found: list[dict[str, Any]] = json.loads(said)["data"]["result"]["result"]
        except (LaboratoryError, ValueError, KeyError, TypeError):
            return []
        return found

    def ray_processes(self) -> list[str]:
        """Return what is left of Ray on any host, in words."""
        return [
            f"{host.name}: {' '.join(process.cmdline())}"
            for host in self.lab.hosts.values()
            for part in RAY_PARTS
            for process in host.find(part)
        ]

    def run_job(self, command: str, seconds: float) -> str:
        """Submit a command from the user's machine through the dashboard's port there; return what was said until its end.

        Raises:
            LaboratoryError: If it fails, or takes longer than so many seconds.
        """
        forwarding = self.lab.user.start_command(f"ray dashboard {self.file}", self.lab.folder / "dashboard.log")
        try:
            ask = f"python -c 'import urllib.request as web; web.urlopen(\"http://localhost:{PORT}/api/version\")'"
            wait_for(lambda: self.lab.user.succeeds(ask), 30, "the dashboard on the user's machine")
            return self.lab.user.run(f"ray job submit --address http://localhost:{PORT} -- {command}", seconds)
        finally:
            end(forwarding)


def study_command(lab: Laboratory, name: str, *more: str) -> str:
    """Return the command of a small study of digits whose folder all hosts share; ``more`` switches win."""
    data = "--data digits --limit-train 200 --limit-test 60 --batch-size 64 --precision float32"
    networks = "--teacher resnet8 --teacher-width 0.5 --student-width 0.25 --teacher-epochs 1"
    places = f"--results {lab.shared} --teacher-root {lab.shared}/teachers --name {name}"
    return f"python -m dfkt study {places} {data} {networks} --trials 0 --baselines '' {' '.join(more)}"


def folder_of(lab: Laboratory, name: str) -> Path:
    """Return the folder of a study, as every host and this process see it."""
    return lab.shared / name
