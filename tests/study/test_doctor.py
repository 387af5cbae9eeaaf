"""All machines are asked and compared; each says what it sees, and nothing stays where they looked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from study.played import toy

from dfkt.config import DataConfig, Placement
from dfkt.errors import ConfigError
from dfkt.store.files import Storage
from dfkt.study import doctor, host
from dfkt.study.doctor import check_machines, look
from dfkt.study.host import Health, Question
from dfkt.study.machines import Unanswered


@dataclass
class Played:
    """A cluster without Ray: this machine and others, each with a folder of its own or the shared one.

    Attributes:
        folders: By address, where the results lie there; a machine that is missing here has the shared folder.
        silent: Machines that do not answer.
        changed: By address, what it says otherwise.
        offset: By address, seconds that its clock is ahead.
        resources: Of the others.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    silent: dict[str, Unanswered] = field(default_factory=dict)
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)
    offset: dict[str, float] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 4.0})
    others: tuple[str, ...] = ("10.0.0.2", "10.0.0.3")
    asked: list[str] = field(default_factory=list)

    def living(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Return this machine and the others."""
        own, *others = [
            {"NodeID": at, "NodeManagerAddress": at, "Resources": {"CPU": 1.0} if at == "10.0.0.1" else self.resources}
            for at in ("10.0.0.1", *self.others)
        ]
        return own, others

    def ask(self, nodes: Sequence[Any], call: Callable[..., Any], *given: Any, timeout: float) -> list[Any]:
        """Return what each says."""
        return [self._answer(node["NodeID"], call, given) for node in nodes]

    def _answer(self, at: str, call: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        if at in self.silent:
            return self.silent[at]
        if call is host.clock:
            return 1000.0 + self.offset.get(at, 0.0)
        if call is host.forget:
            return call(str(self.folders.get(at, given[0])), given[1])
        self.asked.append(at)
        question: Question = given[0]
        if at in self.folders and question.results is not None:
            question = replace(question, results=str(self.folders[at]))
        said: Health = call(question)
        return replace(said, name=f"host-{at[-1]}", **self.changed.get(at, {}))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Two machines beside this one."""
    cluster = Played()
    monkeypatch.setattr(doctor, "living", cluster.living)
    monkeypatch.setattr(doctor, "ask", cluster.ask)
    monkeypatch.setattr(doctor, "clock", host.clock)
    monkeypatch.setattr(doctor, "find_address", lambda address: None)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(doctor._compare_clocks, "__defaults__", (lambda: 1000.0,))
    monkeypatch.setattr(host.read_soon, "__defaults__", (0.05,))
    monkeypatch.setattr(doctor, "SEEN_WITHIN", 0.05)
    return cluster


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is to be said of the machine that the tests run on."""
    hardware = host.Hardware(0, "", 0, "10.0.0.1", "eth0", {}, None)
    monkeypatch.setattr(host, "_hardware", lambda addresses: hardware)


def told(folder: Path, data: str | None = None) -> list[tuple[bool, str, str]]:
    report = look(str(folder), data, data_root=None, address=None)
    assert report.asked == 3
    return [(finding.fails, finding.where, finding.what) for finding in report.findings]


def studied(folder: Path, data: str = "digits") -> list[str]:
    """Return what a study says before it starts."""
    lines: list[str] = []
    config = replace(toy(), data=DataConfig(name=data))
    check_machines([config], Storage(str(folder)), Placement(), lines.append)
    return lines


def test_nothing_is_found_where_all_is_well_and_nothing_stays(played: Played, tmp_path: Path) -> None:
    assert told(tmp_path / "new" / "results", "digits") == []
    assert studied(tmp_path / "new" / "results") == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_machines_own_is_found_by_command_and_study(played: Played, tmp_path: Path) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir()
    (own / "kept").write_text("")
    played.folders["10.0.0.3"] = own
    what = f"{shared} is another folder there: what is written on one machine cannot be read on the other"
    assert told(shared) == [(True, "host-3 (10.0.0.3)", what)]
    with pytest.raises(ConfigError, match=r"^host-3 \(10.0.0.3\): .*another folder there.*Mount one folder"):
        studied(shared)
    assert [path.name for path in tmp_path.rglob("*")] == ["own", "kept"]


def test_what_a_machine_writes_must_be_seen_here_and_is_deleted_there(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    played.folders["10.0.0.2"] = own
    found = host.read_soon

    def sees(storage: Storage, probe: str, seconds: float = 0.0) -> bool:
        return storage.path == str(own) or found(storage, probe, seconds)  # a mount that only shows the other's files

    monkeypatch.setattr(host, "read_soon", sees)
    assert [(fails, where) for fails, where, _ in told(shared)] == [(True, "host-2 (10.0.0.2)")]
    assert list(tmp_path.rglob("*.probe*")) == list(tmp_path.rglob(".probe*")) == []


def test_results_that_cannot_be_written_here_are_one_finding(played: Played, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ((fails, where, what),) = told(tmp_path / "file" / "results")
    assert (fails, where) == (True, "this machine")
    assert "must be writable" in what


def test_a_machine_of_other_versions_is_refused_by_a_study(played: Played, tmp_path: Path) -> None:
    played.changed["10.0.0.2"] = played.changed["10.0.0.3"] = {"versions": {"torch": "1.0"}}
    with pytest.raises(ConfigError, match=r"host-2 \(10.0.0.2\), host-3 \(10.0.0.3\): torch is 1.0, here it is"):
        studied(tmp_path)
    played.changed["10.0.0.3"] = {"code": "x"}
    with pytest.raises(ConfigError, match=r"1 more: `python -m dfkt doctor` lists them"):
        studied(tmp_path)


def test_images_that_a_machine_lacks_are_refused_by_a_study(played: Played, tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    name = str(tmp_path / "images")
    assert studied(tmp_path / "results", name) == []
    played.changed["10.0.0.3"] = {"data": {name: host.Data(fault="gone")}}
    assert [fails for fails, *_ in told(tmp_path / "results", name)] == [True]
    with pytest.raises(ConfigError, match=r"images in .* cannot be read \(gone\)"):
        studied(tmp_path / "results", name)


def test_a_machine_that_leaves_meanwhile_does_not_stop_a_study(played: Played, tmp_path: Path) -> None:
    played.silent["10.0.0.2"] = Unanswered("its node died", gone=True)
    (line,) = studied(tmp_path)
    assert line.startswith("warning: (10.0.0.2): left the cluster")
    played.silent["10.0.0.2"] = Unanswered("no answer within 60 s")
    with pytest.raises(ConfigError, match="no answer within 60 s"):
        studied(tmp_path)


def test_clocks_are_compared(played: Played, tmp_path: Path) -> None:
    played.offset["10.0.0.2"] = -8.0
    assert told(tmp_path) == [(False, "host-2 (10.0.0.2)", "its clock is 8 s from this machine's")]


def test_machines_that_hold_no_run_are_not_asked(played: Played, tmp_path: Path) -> None:
    played.resources = {"memory": 1.0}
    report = look(str(tmp_path), None, data_root=None, address=None)
    assert (report.asked, played.asked) == (1, ["10.0.0.1"])
    studied(tmp_path)
    assert played.asked == ["10.0.0.1"]


def test_a_study_alone_asks_nobody_but_refuses_a_jobs_own_folder(played: Played, tmp_path: Path) -> None:
    played.others = ()
    assert studied(tmp_path) == []
    with pytest.raises(ConfigError, match="deleted when the job ends"):
        studied(tmp_path / "runtime_resources" / "working_dir_files" / "x")
    assert played.asked == []


def test_hosts_of_the_file_that_are_missing_are_told(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "growth.yaml").write_text("provider: {head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.9]}")
    monkeypatch.setattr(doctor, "GROWTH_FILE", tmp_path / "growth.yaml")
    assert [(fails, where) for fails, where, _ in told(tmp_path / "results")] == [(False, "10.0.0.9")]
    (tmp_path / "growth.yaml").write_text("{")
    assert told(tmp_path / "results") == []


def test_without_a_cluster_this_machine_alone_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_address", lambda address: None)
    report = look(str(tmp_path / "results"), "digits", data_root=None, address=None)
    assert (report.asked, report.findings) == (1, [])
    assert not ray.is_initialized()
    assert list(tmp_path.iterdir()) == []
