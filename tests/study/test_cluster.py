"""What a run may take of a cluster, and the cluster file."""

import copy
import os
import socket
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from conftest import RAY_MARKS

from dfkt.config import Placement
from dfkt.errors import ConfigError, RunError
from dfkt.study.cluster import cluster
from dfkt.study.driver import Workers


def context(dashboard: str = "") -> SimpleNamespace:
    """Return what ``ray.init`` does, of a head that nobody can ask before the test is over."""
    return SimpleNamespace(dashboard_url=dashboard, address_info={"gcs_address": "127.0.0.1:1"})


def with_ray(test: Any) -> Any:
    """Mark a test that starts Ray."""
    return reduce(lambda marked, mark: mark(marked), RAY_MARKS, test)


FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"cpus": 0}, {"gpus": -1}, {"gpus": float("nan")}, {"count": 3, "up_to": 2}]
)
def test_a_run_spans_something(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Workers(**wrong)


def test_a_worker_without_gpus_trains_on_the_cpu_whatever_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    given = Placement(device="cuda", threads=7, teacher_root="teachers")
    assert Workers(cpus=2, gpus=0).place(given) == Placement(device="cpu", threads=2, teacher_root="teachers")
    assert Workers(cpus=2, gpus=0.5).place(given) == Placement(device="cuda", threads=2, teacher_root="teachers")


def test_where_no_cluster_answers_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("could not connect\nand a page more")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})  # so that none of it stays for other tests
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    for address, named in (("nonsense", "nonsense"), (None, "elsewhere")):
        with (
            pytest.raises(ConfigError, match=f"No Ray cluster answers at {named}: could not connect$"),
            cluster(address),
        ):
            pass


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}", "127.0.0.1:99999{}", "\udcff:{}"])
def test_where_nobody_listens_ray_is_not_asked(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("it was asked"))
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and not listened at
        address = form.format(free.getsockname()[1])
        with pytest.raises(ConfigError, match="No Ray cluster answers at "), cluster(address):
            pass


def test_where_somebody_listens_ray_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options) or context())
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})
    with socket.create_server(("127.0.0.1", 0)) as server, cluster(f"127.0.0.1:{server.getsockname()[1]}"):
        pass
    assert len(asked) == 1


@pytest.mark.parametrize(("url", "lines"), [("127.0.0.1:8265", ["Ray's dashboard: http://127.0.0.1:8265"]), ("", [])])
def test_the_dashboards_address_is_said_once_where_there_is_one(
    url: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: context(url))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})
    said: list[str] = []
    with cluster("somewhere", said.append):
        assert said == lines
    assert said == lines


def test_a_ray_that_times_out_at_its_start_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries, said = list[dict[str, Any]](), list[str]()

    def init(**options: Any) -> Any:
        tries.append(options)
        if len(tries) < fails:
            raise Exception("The current node timed out during startup.\nA page more")
        return context()

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})
    monkeypatch.setattr("dfkt.study.cluster.STARTED_HERE", Path("/nowhere"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fails = 3
    with cluster(None, said.append):
        assert len(tries) == 3
    assert (
        said
        == ["Ray did not start (Exception: The current node timed out during startup. A page more); it is tried again"]
        * 2
    )
    fails = 99
    with (
        pytest.raises(RunError, match="could not start Ray on this machine in 3 tries: Exception: The current node"),
        cluster(None),
    ):
        pass
    tries.clear()
    with pytest.raises(RunError, match="could not connect to the Ray cluster at auto: "), cluster("auto"):
        pass
    assert len(tries) == 1


def test_a_head_that_is_gone_ends_the_process_with_one_line() -> None:
    code = """
import os, socket, sys, threading
from dfkt.study import cluster
cluster.HEAD_ASKED_EVERY, cluster.HEAD_GONE_AFTER = 0.05, 0.3
server = socket.create_server(("127.0.0.1", 0))
address = f"127.0.0.1:{server.getsockname()[1]}"
over = threading.Event()
watch = threading.Thread(target=cluster._watch_head, args=(address, over, threading.Event(), str))
with cluster.native_errors_unseen():
    watch.start()
    watch.join(1)
    print("goes on", flush=True)
    os.write(2, b"a page of C++")
    server.close()
    over.wait(20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stdout) == (1, "goes on\n")
    assert done.stderr.startswith("failed: the Ray cluster's head at 127.0.0.1:")
    assert done.stderr.endswith(" is gone; what was finished is kept, and the same command goes on from there\n")


@with_ray
@pytest.mark.parametrize("asked", [True, False])
def test_a_raylet_that_is_gone_ends_the_process_with_one_line_whatever_is_asked_of_it(asked: bool) -> None:
    """Ray's C++ part would end the process, without a word, when something is asked of a raylet that is gone."""
    code = f"""
import psutil, ray, time
from dfkt.study.cluster import cluster
with cluster(None):
    task = ray.remote(lambda: 1)
    ray.get(task.remote())
    (raylet,) = [part for part in psutil.Process().children(recursive=True) if part.name() == "raylet"]
    raylet.kill()
    if {asked}:
        ray.put(b"x" * 1_000_000)
        ray.get(task.remote())
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    gone = "failed: Ray's raylet on this machine is gone; what was finished is kept, and the same command goes on from there\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", gone)


def test_inside_a_cluster_nothing_is_started_or_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, lambda **options: pytest.fail("the cluster is another's"))
    with cluster(None):
        pass


def test_the_cluster_file_passes_rays_own_check() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(FILE.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))


def test_the_cluster_file_names_machines_and_commands_that_exist() -> None:
    config = yaml.safe_load(FILE.read_text())
    assert config["head_node_type"] in config["available_node_types"]
    mentioned = [word for line in FILE.read_text().splitlines() for word in line.split() if word.startswith("studies/")]
    assert mentioned
    assert all((FILE.parent / word).exists() for word in mentioned)


def test_what_ray_writes_to_the_terminal_while_it_connects_is_not_seen(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def init(**options: object) -> None:
        os.write(2, b"W gcs_client.cc: failed\n")
        raise ConnectionError("nobody")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})
    os.write(2, b"before\n")
    with pytest.raises(ConfigError), cluster("somewhere"):
        pass
    os.write(2, b"behind\n")
    assert capfd.readouterr().err == "before\nbehind\n"
