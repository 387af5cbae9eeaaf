"""In which precision a study computes: decided once, by all hosts, and kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from study.played import arm, open_study, toy

from dfkt.config import TeacherConfig, TrainConfig
from dfkt.store.files import Storage
from dfkt.study import precision
from dfkt.study.config import StudyConfig
from dfkt.study.driver import Workers
from dfkt.study.machines import on_other_nodes
from dfkt.study.precision import decide_precision, stored_precision
from dfkt.training import optim
from dfkt.training.optim import computes_bfloat16, decided

CPUS = Workers(gpus=0)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What this machine and the others say; ``None`` of one that does not answer."""
    said: list[Any] = [True]
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: said[0])
    monkeypatch.setattr(precision, "on_other_nodes", lambda *call, timeout: said[1:])
    return said


def both(config: StudyConfig) -> tuple[str, str]:
    return config.train.precision, config.teacher.train.precision


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ([True], "bfloat16"),
        ([False], "float32"),
        ([True, True], "bfloat16"),
        ([True, False], "float32"),
        ([True, None], "float32"),
    ],
)
def test_bfloat16_is_taken_where_all_hosts_compute_it(
    hosts: list[Any], answers: list[Any], chosen: str, tmp_path: Path
) -> None:
    hosts[:] = answers
    lines: list[str] = []
    assert both(decide_precision(toy("s"), Storage(tmp_path), CPUS, lines.append)) == (chosen, chosen)
    assert [line.startswith("networks in bfloat16: the processors compute it") for line in lines] == [True] * (
        chosen == "bfloat16"
    )


def test_what_was_asked_for_stays(hosts: list[Any], tmp_path: Path) -> None:
    train = TrainConfig(precision="float32")
    config = replace(toy("s"), train=train)
    assert both(decide_precision(config, Storage(tmp_path), CPUS, print)) == ("float32", "bfloat16")
    config = replace(config, teacher=TeacherConfig(train=train))
    assert decide_precision(config, Storage(tmp_path), CPUS, pytest.fail) is config


@pytest.mark.parametrize("began", ["float32", "bfloat16", "auto"])
def test_a_study_keeps_the_precision_that_it_began_with_on_whatever_machine(
    hosts: list[Any], began: Any, tmp_path: Path
) -> None:
    train = TrainConfig(precision=began)
    config = replace(toy("s", arm("scratch")), train=train, teacher=TeacherConfig(train=train))
    study = open_study(config, tmp_path)
    study.note("scratch", present=[])

    asked = replace(config, train=TrainConfig(), teacher=TeacherConfig())
    for answer in (True, False):
        hosts[:] = [answer]
        lines: list[str] = []
        found = decide_precision(stored_precision(asked, study.store.storage), study.store.storage, CPUS, lines.append)
        assert both(found) == (began, began)
        assert [line.startswith("note: ") for line in lines] == [True] * (began == "bfloat16" and not answer)


def test_a_processors_flags_say_what_it_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optim, "CPU_FILE", tmp_path / "cpuinfo")
    assert not computes_bfloat16("cpu")
    for flags, computes in (("avx2 avx512f", False), ("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True)):
        optim.CPU_FILE.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n")
        assert computes_bfloat16("cpu") == computes
        assert decided("auto", "cpu") == ("bfloat16" if computes else "float32")
        assert decided("float64", "cpu") == "float64"


def test_asking_other_machines_starts_no_cluster() -> None:
    assert not ray.is_initialized()
    assert on_other_nodes(computes_bfloat16, "cpu", timeout=1.0) == []
    assert not ray.is_initialized()
