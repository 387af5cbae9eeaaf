"""A search goes on where it was, whatever the store and Optuna's journal know of each trial."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pyarrow.fs
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from study.played import TAPS, Played, arm, toy

from dfkt.methods.base import Method
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.kd import Kd
from dfkt.methods.registry import METHODS
from dfkt.methods.space import Draw, Range, Space
from dfkt.networks.taps import StudentTaps
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore
from dfkt.study.config import ArmConfig
from dfkt.study.search import ArmSearch, Journal, mend_journal, random_draws

Asked = tuple[int, Method, dict[str, Any]]
Rows = list[dict[str, Any]]
ARM = arm("dfkt", 9)


def begin(folder: Path, rows: Rows = [], config: ArmConfig = ARM, seed: int = 0) -> ArmSearch:  # noqa: B006
    """Do what a study does when it is run, for the first time or again."""
    return ArmSearch(config, TAPS, Journal(Storage(folder)), rows, seed)


def row(asked: Asked | int, state: str, accuracy: float | None = None) -> dict[str, Any]:
    """Return a trial's row as the store gives it: every column there, ``None`` where nothing was measured."""
    number, params = (asked, {}) if isinstance(asked, int) else (asked[0], asked[2])
    every = {f"param_{name}": params.get(name) for name in ARM.method.columns(TAPS)}
    return {"number": number, "state": state, "last_val_accuracy": accuracy, **every}


def states(search: ArmSearch) -> list[TrialState]:
    return [trial.state for trial in search.optuna.trials]


def test_a_search_begins_with_the_methods_starts_and_numbers_from_0(tmp_path: Path) -> None:
    search = begin(tmp_path)
    (one, plain, first), (two, soft, second), (three, other, _) = (search.ask() for _ in range(3))
    assert [one, two, three] == [0, 1, 2]
    assert isinstance(plain, Dfkt)
    assert isinstance(soft, Dfkt)
    assert (plain.pattern, plain.weight, soft.weight, soft.temperature) == ("dense-3", 0, 0.9, 4)
    assert replace(soft, weight=0.0) == plain
    assert {n: v for n, v in second.items() if n in first and n != "soft_targets"} == {
        n: v for n, v in first.items() if n != "soft_targets"
    }
    assert other not in (plain, soft)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_starts_at_its_reference_settings_and_can_be_searched(name: str, tmp_path: Path) -> None:
    method = METHODS[name]()
    search = begin(tmp_path, [], ArmConfig(name=name, method=method, trials=3))
    reference = method.schedule(9, TAPS)
    asked = [search.ask() for _ in range(4)]
    assert asked[0][1].schedule(9, TAPS) == reference
    assert asked[3][1].schedule(9, TAPS) != reference
    columns = method.columns(TAPS)
    for _, drawn, params in asked:
        assert drawn.name == name
        assert {n: type(v) for n, v in params.items()} == {n: columns[n] for n in params}


def drawn_one_after_another(folder: Path, seed: int = 0, count: int = 6) -> list[dict[str, Any]]:
    search, params = begin(folder, seed=seed), []
    for number in range(count):
        params.append(search.ask()[2])
        search.tell(number, "COMPLETE", 1 / (1 + number))
    return params


def test_the_same_seed_makes_the_same_proposals_and_another_one_others(tmp_path: Path) -> None:
    folders = [(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for folder, _ in folders:
        folder.mkdir()
    one, two, other = (drawn_one_after_another(*given) for given in folders)
    assert one == two
    assert one[:2] == other[:2]  # the starts
    assert not any(params in other for params in one[2:])


def test_a_resumed_search_proposes_other_points_than_the_ones_before(tmp_path: Path) -> None:
    search = begin(tmp_path)
    before = [search.ask() for _ in range(5)]
    rows = [row(asked, "FAIL") for asked in before]
    search = begin(tmp_path, rows)
    later = [search.ask() for _ in range(5)]
    assert [number for number, *_ in later] == [5, 6, 7, 8, 9]
    assert not any(params in [asked[2] for asked in before] for _, _, params in later)


@pytest.mark.parametrize("rows", ["no row", "a running row"])
def test_an_interrupted_trial_is_handed_out_again_with_number_and_parameters_before_new_ones(
    rows: str, tmp_path: Path
) -> None:
    search = begin(tmp_path)
    before = [search.ask() for _ in range(3)]
    search.tell(1, "COMPLETE", 0.5)
    stored = [row(before[1], "COMPLETE", 0.5)]
    stored += [row(before[n], "RUNNING") for n in (0, 2)] if rows == "a running row" else []

    again = begin(tmp_path, stored)
    assert [again.ask() for _ in range(2)] == [before[0], before[2]]
    assert again.ask()[0] == 3
    assert len(again.optuna.trials) == 4


def test_a_start_that_was_not_asked_for_before_a_kill_is_asked_for_after_it(tmp_path: Path) -> None:
    first = begin(tmp_path).ask()
    again = begin(tmp_path, [row(first, "COMPLETE", 0.5)])
    number, _, params = again.ask()
    assert (number, params["soft_targets"], params["weight"]) == (1, True, 0.9)


def test_a_kill_between_the_stores_write_and_optunas_is_made_good(tmp_path: Path) -> None:
    search = begin(tmp_path)
    asked = [search.ask() for _ in range(3)]
    ends = [("COMPLETE", 0.75), ("PRUNED", 0.25), ("FAIL", None)]
    again = begin(tmp_path, [row(a, *end) for a, end in zip(asked, ends, strict=True)])
    assert states(again) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert again.optuna.trials[0].value == 0.75
    assert again.ask()[0] == 3


def test_a_trial_that_only_optuna_knows_to_be_finished_is_done_again(tmp_path: Path) -> None:
    search = begin(tmp_path)
    before = search.ask()
    search.tell(0, "COMPLETE", 0.5)

    again = begin(tmp_path, [row(before, "RUNNING")])
    assert again.ask() == before
    again.report(0, 0.6, 3.0)
    again.tell(0, "COMPLETE", 0.7)
    assert again.optuna.trials[0].value == 0.5  # what Optuna knows stays


def test_optuna_learns_of_every_report_once_and_a_pruned_trial_ends_with_its_last_one(tmp_path: Path) -> None:
    search = begin(tmp_path)
    search.ask()
    for accuracy, clock in ((0.5, 1.0), (0.4, 1.0), (0.6, 2.0)):  # a restarted trial reports again
        search.report(0, accuracy, clock)
    search.tell(0, "PRUNED")
    (trial,) = search.optuna.trials[:1]
    assert trial.intermediate_values == {1: 0.5, 2: 0.6}
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.6)


def test_a_deleted_journal_is_rebuilt_from_the_store(tmp_path: Path) -> None:
    search = begin(tmp_path)
    asked = [search.ask() for _ in range(6)]
    ends = [("COMPLETE", 0.75), ("PRUNED", 0.2), ("FAIL", None), ("COMPLETE", 0.5), ("RUNNING", None)]
    rows = [row(a, *end) for a, end in zip(asked, ends, strict=False)]
    (tmp_path / "optuna.journal").unlink()

    again = begin(tmp_path, rows)
    assert states(again)[:4] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE]
    for number, trial in enumerate(again.optuna.trials):
        drawn = asked[number][2]
        assert {n: drawn[n] for n in trial.params} == trial.params
    assert again.optuna.best_trial.number == 0
    assert again.ask() == asked[4]  # the one that was running
    assert again.ask()[0] == 5


def test_a_rebuilt_journal_still_begins_with_the_starts_that_were_not_tried(tmp_path: Path) -> None:
    first = begin(tmp_path).ask()
    (tmp_path / "optuna.journal").unlink()
    number, _, params = begin(tmp_path, [row(first, "COMPLETE", 0.5)]).ask()
    assert (number, params["weight"]) == (1, 0.9)


def test_settings_outside_the_methods_own_range_are_a_start_that_a_rebuilt_journal_survives(tmp_path: Path) -> None:
    config = ArmConfig(name="a", method=Kd(rate=2.0), trials=3)
    first = begin(tmp_path, [], config).ask()
    assert first[1] == Kd(rate=2.0)
    (tmp_path / "optuna.journal").unlink()
    again = begin(tmp_path, [row(first, "COMPLETE", 0.5)], config)
    assert again.optuna.trials[0].value == 0.5
    assert again.ask()[0] == 1


def test_a_start_within_the_studys_space_is_kept_and_one_outside_is_drawn(tmp_path: Path) -> None:
    space = Space({"weight": (0.5, 0.9), "temperature": Range(20, 30), "rate": Range(0.05, 0.2)})
    _, drawn, _ = begin(tmp_path, [], ArmConfig(name="a", method=Kd(), trials=3, space=space)).ask()
    assert isinstance(drawn, Kd)
    assert (drawn.weight, drawn.rate) == (0.9, 0.1)
    assert 20 <= drawn.temperature <= 30


def test_a_trial_that_no_row_knows_keeps_the_numbers_in_a_rebuilt_journal(tmp_path: Path) -> None:
    search = begin(tmp_path)
    asked = [search.ask() for _ in range(4)]
    (tmp_path / "optuna.journal").unlink()
    again = begin(tmp_path, [row(asked[n], "COMPLETE", 0.5) for n in (0, 1, 3)])
    assert [again.ask()[0] for _ in range(2)] == [2, 4]


def test_the_journal_reads_as_optunas_own_file_does_and_one_of_optunas_is_gone_on_with(tmp_path: Path) -> None:
    rows, path = searched(tmp_path), tmp_path / "optuna.journal"
    again = begin(tmp_path, rows)
    number = again.ask()[0]
    again.report(number, 0.5, 1.0)
    theirs = JournalStorage(JournalFileBackend(str(path)))
    (study,) = theirs.get_all_studies()
    assert theirs.get_all_trials(study._study_id) == again.optuna.get_trials()
    theirs.set_study_user_attr(study._study_id, "note", "of a dashboard's")
    assert begin(tmp_path, rows).optuna.user_attrs == {"note": "of a dashboard's"}


def test_a_full_disk_is_told_by_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = begin(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
    with pytest.raises(OSError, match=r"No space left on device.*optuna\.journal"):
        search.ask()
    monkeypatch.undo()
    (line,) = mended(tmp_path, [])
    assert "is cut" in line


def test_a_lock_that_a_killed_process_left_on_the_journal_is_not_waited_for(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "optuna.journal.lock").symlink_to(tmp_path / "optuna.journal")
    assert begin(tmp_path).ask()[0] == 0


def test_arms_do_not_learn_from_one_another(tmp_path: Path) -> None:
    journal = Journal(Storage(tmp_path))
    one, two = (ArmSearch(replace(ARM, name=name), TAPS, journal, [], 0) for name in ("one", "two"))
    one.ask()
    one.tell(0, "COMPLETE", 0.5)
    assert two.ask()[0] == 0
    assert two.optuna.trials[0].state == TrialState.RUNNING


SPACES: list[tuple[Method, dict[str, Range | tuple[Any, ...]]]] = [
    (Dfkt(), {"rounds": (1,), "rate": Range(0.2, 0.3), "order": ("local",)}),
    (Dfkt(), {"pattern": ("adjacent", "sliding-2"), "flow_rate": (0.05, 0.1), "soft_targets": (True,)}),
    (Dfkt(), {"rounds": Range(2, 3), "share": (0.5,), "temperature": Range(2, 3, log=True)}),
    (Kd(), {"weight": (0.5,), "rate": (0.01, 0.9), "temperature": Range(20, 30)}),
]


def within(value: Any, given: Range | tuple[Any, ...]) -> bool:
    return given.low <= value <= given.high if isinstance(given, Range) else value in given


@pytest.mark.parametrize(("method", "changes"), SPACES)
def test_what_a_study_searches_holds_for_every_trial_the_starts_included(
    method: Method, changes: Mapping[str, Any], tmp_path: Path
) -> None:
    config = ArmConfig(name="a", method=method, trials=12, space=Space(changes))
    search = begin(tmp_path, [], config)
    for number in range(12):
        _, drawn, params = search.ask()
        search.tell(number, "COMPLETE", 0.5)
        for name, given in changes.items():
            if name in params:
                assert within(params[name], given), (name, params[name])
            if name in params and hasattr(drawn, name):
                assert getattr(drawn, name) == params[name]
        assert set(changes) <= set(params) | {"rounds", "order", "temperature"}  # they have no meaning in every trial
    for drawn in random_draws(config, TAPS, 12):
        assert all(within(getattr(drawn, name), given) for name, given in changes.items() if name == "rate")


def test_random_draws_are_the_same_at_every_call_and_leave_no_trace(tmp_path: Path) -> None:
    draws = random_draws(ARM, TAPS, 20)
    assert draws == random_draws(ARM, TAPS, 20)
    assert len(set(map(repr, draws))) == 20
    assert not list(tmp_path.iterdir())


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A remote folder, which a local one plays."""
    system = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr("dfkt.store.files._from_uri", lambda uri: (system, uri.partition("://")[2]))
    return Storage("far://study")


def test_a_remote_studys_journal_is_worked_on_here_and_sent_there(remote: Storage, tmp_path: Path) -> None:
    journal = Journal(remote)
    search = ArmSearch(ARM, TAPS, journal, [], 0)
    before = search.ask()
    assert not (tmp_path / "study" / "optuna.journal").exists()
    journal.publish()
    sent = (tmp_path / "study" / "optuna.journal").read_bytes()
    assert sent == journal.path.read_bytes()

    journal.path.write_text("of another study at that address")  # the folder is the truth
    again = ArmSearch(ARM, TAPS, Journal(remote), [row(before, "RUNNING")], 0)
    assert again.ask() == before


def test_a_remote_journal_is_sent_in_a_tenth_of_the_time_and_after_the_last_trial(
    remote: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("dfkt.study.search.time.monotonic", lambda: now)
    journal, sent = Journal(remote), list[float]()

    def write(name: str, data: bytes) -> None:
        nonlocal now
        sent.append(now)
        now += 2

    monkeypatch.setattr(remote, "write", write)
    for _ in range(50):
        journal.publish(last=False)
        now += 1
    assert sent == [100, 120, 140]
    journal.publish()
    assert len(sent) == 4


@dataclass(frozen=True, kw_only=True)
class Restless(Kd):
    """A method whose second parameter has a meaning for one value of the first only."""

    def sample(self, trial: Draw, taps: StudentTaps) -> "Restless":
        """Draw the temperature where it is warm."""
        warm = trial.suggest_categorical("warm", (False, True))
        return replace(self, temperature=trial.suggest_float("temperature", 2, 9) if warm else 1.0)

    def columns(self, taps: StudentTaps) -> dict[str, type]:
        """Return both."""
        return {"warm": bool, "temperature": float}

    def starts(self, taps: StudentTaps) -> tuple[dict[str, Any], ...]:
        """Return one of them twice."""
        return ({"warm": False}, {"warm": False}, {"warm": True, "temperature": 2.0})


def test_a_start_that_is_listed_twice_is_tried_once(tmp_path: Path) -> None:
    search = begin(tmp_path, [], ArmConfig(name="a", method=Restless(), trials=3))
    assert [search.ask()[2] for _ in range(2)] == [{"warm": False}, {"warm": True, "temperature": 2.0}]


def test_optuna_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path).ask()
    random_draws(ARM, TAPS, 2)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR


def searched(folder: Path, seed: int = 0) -> Rows:
    """Leave a search of five trials, of which four have ended; return the store's rows."""
    folder.mkdir(exist_ok=True)
    search = begin(folder, seed=seed)
    asked = [search.ask() for _ in range(5)]
    ends = [("COMPLETE", 0.75), ("PRUNED", 0.25), ("FAIL", None), ("COMPLETE", 0.5), ("RUNNING", None)]
    for (number, *_), (state, value) in zip(asked, ends[:4], strict=False):
        search.report(number, 0.25, 1.0)
        search.tell(number, state, value)
    return [row(a, *end) for a, end in zip(asked, ends, strict=True)]


def mended(folder: Path, rows: Rows) -> list[str]:
    lines: list[str] = []
    mend_journal(Storage(folder), lambda arm: rows if arm == "dfkt" else [], lines.append)
    return lines


def assert_rebuilt(folder: Path, rows: Rows) -> None:
    """The search knows what the store knows, by its numbers, hands out the unfinished trial, then a new one."""
    again = begin(folder, rows)
    known = [trial for trial in again.optuna.trials if trial.number < len(rows)]
    assert [trial.state.name for trial in known] == [row["state"] for row in rows]
    for trial, stored in zip(known, rows, strict=True):
        assert {f"param_{n}": v for n, v in trial.params.items()}.items() <= stored.items()
        assert trial.value == (stored["last_val_accuracy"] if trial.state == TrialState.COMPLETE else trial.value)
    assert [again.ask()[0] for _ in range(2)] == [4, 5]


def whole_lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


DAMAGE = {
    "half a last line": (lambda data: data[:-7], "is cut"),
    "half a last line, then another": (lambda data: data[:-7] + whole_lines(data)[-1], "is damaged"),
    "a line cut in the middle": (lambda data: data.replace(whole_lines(data)[3], whole_lines(data)[3][:9]), "is damaged"),
    "garbage": (lambda data: bytes(range(256)) + b"\n", "is damaged"),
    "text": (lambda data: b"hello\n", "is damaged"),
    "other JSON": (lambda data: b"[]\n3\n", "is damaged"),
    "no log of Optuna's": (lambda data: b"{}\n", "is damaged"),
    "an unknown entry": (lambda data: data + b'{"op_code": 99, "worker_id": "x"}\n', "is damaged"),
    "zeros": (lambda data: data + bytes(100) + b"\n", "is damaged"),
    "deeply nested": (lambda data: b"[" * 100_000 + b"\n", "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_journal_is_put_aside_and_made_anew_from_the_store(name: str, tmp_path: Path) -> None:
    rows, path = searched(tmp_path), tmp_path / "optuna.journal"
    harm, said = DAMAGE[name]
    path.write_bytes(broken := harm(path.read_bytes()))
    (line,) = mended(tmp_path, rows)
    assert line.startswith(f"optuna.journal {said}")
    assert "it is made anew from the study's tables, and kept as optuna.journal.old" in line
    assert "\n" not in line
    assert (tmp_path / "optuna.journal.old").read_bytes() == broken
    assert_rebuilt(tmp_path, rows)
    assert mended(tmp_path, rows) == []


@pytest.mark.parametrize("lost", ["all", "the end", "the begin"])
def test_a_journal_that_is_older_than_the_store_is_made_good_whatever_it_lacks(lost: str, tmp_path: Path) -> None:
    rows, path = searched(tmp_path), tmp_path / "optuna.journal"
    lines = whole_lines(path.read_bytes())
    for k in {"all": [0], "the begin": [1], "the end": range(1, len(lines), 4)}[lost]:
        path.write_bytes(b"".join(lines[k:] if lost == "the begin" else lines[:k]))
        mended(tmp_path, rows)
        assert_rebuilt(tmp_path, rows)


def test_a_sound_journal_is_left_alone_also_after_a_kill_between_both_writes(tmp_path: Path) -> None:
    rows, path = searched(tmp_path), tmp_path / "optuna.journal"
    before = path.read_bytes()
    later = [{**rows[4], "state": "COMPLETE", "last_val_accuracy": 0.9}]  # the store has it, Optuna was not told
    for stored in (rows, rows[:4], rows[:4] + later):
        assert mended(tmp_path, stored) == []
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["optuna.journal"]


def test_a_journal_of_another_study_is_put_aside(tmp_path: Path) -> None:
    rows = searched(tmp_path / "mine")
    searched(tmp_path / "other", seed=1)
    (tmp_path / "mine" / "optuna.journal").write_bytes((tmp_path / "other" / "optuna.journal").read_bytes())
    for stored in (rows, []):
        (line,) = mended(tmp_path / "mine", stored)
        assert "the study's tables do not say the same of trial" in line
        assert_rebuilt(tmp_path / "mine", stored) if stored else None
        (tmp_path / "mine" / "optuna.journal").write_bytes((tmp_path / "other" / "optuna.journal").read_bytes())


def test_a_remote_journal_is_mended_where_it_lies(remote: Storage, tmp_path: Path) -> None:
    remote.write("optuna.journal", b"garbage")
    lines: list[str] = []
    mend_journal(remote, lambda arm: [], lines.append)
    assert len(lines) == 1
    assert remote.names() == ["optuna.journal.old"]


@pytest.mark.parametrize("at", [0.2, 0.5, 0.9, 0.999])
def test_a_study_whose_journal_was_cut_ends_as_without(at: float, tmp_path: Path) -> None:
    config = toy("s", arm("dfkt", 6), seeds=1)
    Played(tmp_path, config).run(limit=3)
    path = tmp_path / "s" / "optuna.journal"
    path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * at)])
    store = StudyStore.open(Storage(tmp_path / "s"))
    mend_journal(store.storage, lambda arm: store.rows("trial", arm), print)
    study = Played(tmp_path, config).run().study()
    assert study.trials.number.tolist() == list(range(6))
    assert study.trials.settings.nunique() == 6
    assert len(study.finals) == 1
