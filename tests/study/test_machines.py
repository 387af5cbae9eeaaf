"""Machines of a real cluster say what they are asked, or why they do not."""

import importlib
from pathlib import Path

import pytest
import ray
from conftest import RAY_MARKS

from dfkt.study.cluster import cluster
from dfkt.study.doctor import between, look
from dfkt.study.host import interface_of
from dfkt.study.machines import Unanswered, ask, living, nodes

pytestmark = RAY_MARKS


def test_what_goes_wrong_on_a_machine_is_its_answer(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "known_here_alone.py").write_text("def answer():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    absent = importlib.import_module("known_here_alone").answer
    with cluster(address):
        own, others = living()
        assert own is not None
        assert (others, [own["Resources"]]) == ([], nodes())
        assert ask([own], interface_of, "127.0.0.1", timeout=60) == ["lo"]
        (failed,) = ask([own], between, "a", 1, 2, timeout=60)
        assert failed.reason.startswith("TypeError: ")
        assert ask([own], absent, timeout=60) == [Unanswered("ModuleNotFoundError: No module named 'known_here_alone'")]
        (lost,) = ask([{"NodeID": 56 * "a"}], interface_of, "", timeout=60)
        assert lost.gone
        assert ask([], interface_of, "", timeout=0) == []


def test_the_doctor_asks_a_cluster_and_leaves_it(address: str, tmp_path: Path) -> None:
    report = look(str(tmp_path), "digits", data_root=None, address=address)
    assert (report.asked, report.findings) == (1, [])
    assert not ray.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_without_a_cluster_nobody_is_there() -> None:
    assert living() == (None, [])
    assert not ray.is_initialized()
