"""What a run may take of a cluster, and the cluster file."""

import copy
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml

from dfkt.config import Placement
from dfkt.errors import ConfigError
from dfkt.study.cluster import cluster, count_groups, fit_workers
from dfkt.study.driver import Workers

FILE = Path(__file__).parents[2] / "cluster.yaml"
Nodes = list[dict[str, float]]


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """The machines that the cluster says it has; a dead one beside them."""
    machines: Nodes = [{"CPU": 8.0, "GPU": 2.0}]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in machines] + [dead])
    return machines


def test_gpus_are_taken_where_there_are_any(has: Nodes) -> None:
    assert fit_workers(Workers()).gpus == 1
    has[0]["GPU"] = 0
    assert fit_workers(Workers()).resources == {"CPU": 1}
    has.append({"CPU": 1.0, "GPU": 1.0})
    assert fit_workers(Workers()).resources == {"CPU": 1, "GPU": 1}


def test_what_was_asked_for_is_not_changed(has: Nodes) -> None:
    for wanted in (Workers(2, 3, 0), Workers(1, 1, 0.25), Workers(2, 1, 1)):
        assert fit_workers(wanted) == wanted


@pytest.mark.parametrize(
    ("workers", "machines", "groups"),
    [
        (Workers(1, 1, 1), [{"CPU": 8, "GPU": 2}], 2),
        (Workers(1, 1, 0.25), [{"CPU": 8, "GPU": 2}], 8),
        (Workers(1, 1, 0.1), [{"CPU": 64, "GPU": 3}], 30),  # 3 / 0.1 is a little less than 30
        (Workers(2, 2, 0), [{"CPU": 8}], 2),
        (Workers(2), [{"CPU": 3}, {"CPU": 3}], 3),  # the workers of a run may sit on different machines
        (Workers(1, 2), [{"CPU": 3}, {"CPU": 3}], 2),  # but each on one
        (Workers(2, 2), [{"CPU": 3}, {"CPU": 3}], 1),
        (Workers(3, 2), [{"CPU": 3}, {"CPU": 3}], 0),
        (Workers(1, 16), [{"CPU": 8}, {"CPU": 8}], 0),
        (Workers(1, 4, 1), [{"CPU": 8}, {"CPU": 2, "GPU": 4}], 0),  # CPUs here and GPUs there make no worker
        (Workers(1), [], 0),
    ],
)
def test_as_many_runs_fit_as_there_are_whole_workers_on_the_machines(
    workers: Workers, machines: Nodes, groups: int
) -> None:
    assert count_groups(workers, machines) == groups


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (Workers(3, 1, 1), "A run takes 3 workers of 1 CPU and 1 GPU, each on one machine, but .* 8 CPU, 2 GPU"),
        (Workers(9, 1, 0), "A run takes 9 workers of 1 CPU, each on one machine, but the cluster has 8 CPU"),
        (Workers(2, 1, 0.5), "`gpus_per_worker` must be whole for several workers per run, but got 0.5"),
    ],
)
def test_more_than_the_cluster_has_is_refused(has: Nodes, workers: Workers, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_workers(workers)


def test_a_worker_that_fits_on_no_machine_is_refused_with_what_each_has(has: Nodes) -> None:
    has[:] = [{"CPU": 8.0}, {"CPU": 8.0}]
    with pytest.raises(ConfigError, match="1 workers of 16 CPU, each on one machine, but the cluster has 8 CPU; 8 CPU"):
        fit_workers(Workers(1, 16))
    has.clear()
    with pytest.raises(ConfigError, match="but the cluster has none"):
        fit_workers(Workers())


@pytest.mark.parametrize("wrong", [{"count": 0}, {"cpus": 0}, {"gpus": -1}, {"gpus": float("nan")}])
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
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options) or SimpleNamespace(dashboard_url=""))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})
    with socket.create_server(("127.0.0.1", 0)) as server, cluster(f"127.0.0.1:{server.getsockname()[1]}"):
        pass
    assert len(asked) == 1


@pytest.mark.parametrize(("url", "lines"), [("127.0.0.1:8265", ["Ray's dashboard: http://127.0.0.1:8265"]), ("", [])])
def test_the_dashboards_address_is_said_once_where_there_is_one(
    url: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: SimpleNamespace(dashboard_url=url))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("dfkt.study.cluster.ENVIRONMENT", {})
    said: list[str] = []
    with cluster("somewhere", said.append):
        assert said == lines
    assert said == lines


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
