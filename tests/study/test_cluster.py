"""What a run may take of a cluster, and the cluster file."""

import copy
from pathlib import Path

import pytest
import ray
import yaml

from dfkt.study.cluster import count_groups, fit_workers
from dfkt.errors import ConfigError
from dfkt.study.driver import Workers

FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The resources that the cluster says it has."""
    resources = {"CPU": 8.0, "GPU": 2.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    return resources


def test_gpus_are_taken_where_there_are_any(has):
    assert fit_workers(Workers()).gpus == 1
    has["GPU"] = 0
    assert fit_workers(Workers()).resources == {"CPU": 1}


def test_as_many_groups_fit_as_the_scarcest_resource_allows(has):
    assert count_groups(Workers(count=1, cpus=1, gpus=1)) == 2
    assert count_groups(Workers(count=1, cpus=1, gpus=0.25)) == 8
    assert count_groups(Workers(count=2, cpus=2, gpus=0)) == 2


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (Workers(count=3, gpus=1), "A run of 3 workers takes 3 GPU, but the cluster has 2"),
        (Workers(count=9, gpus=0), "A run of 9 workers takes 9 CPU, but the cluster has 8"),
        (Workers(count=2, gpus=0.5), "`gpus_per_worker` must be whole for several workers per run, but got 0.5"),
        (Workers(cpus=16), "A run of 1 workers takes 16 CPU, but the cluster has 8"),
    ],
)
def test_more_workers_than_the_cluster_has_are_refused(has, workers, message):
    with pytest.raises(ConfigError, match=message):
        fit_workers(workers)


def test_the_cluster_file_passes_rays_own_check():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(FILE.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))


def test_the_cluster_file_names_machines_and_commands_that_exist():
    config = yaml.safe_load(FILE.read_text())
    assert config["head_node_type"] in config["available_node_types"]
    mentioned = [word for line in FILE.read_text().splitlines() for word in line.split() if word.startswith("studies/")]
    assert mentioned
    assert all((FILE.parent / word).exists() for word in mentioned)
