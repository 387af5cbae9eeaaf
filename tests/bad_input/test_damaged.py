"""Every file that is read back is checked: what is damaged is said in one line, and what can be made again is made again."""

import copy
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import Arm, write_study
from study.played import ABOUT, TAPS, Played, arm, open_study, toy

from dfkt.cli import distill, resume
from dfkt.cli.main import main
from dfkt.config import Placement, to_dict
from dfkt.errors import InputError, StudyError
from dfkt.methods.scratch import Scratch
from dfkt.networks.build import build_network
from dfkt.store.files import Storage
from dfkt.store.study_store import StudyStore, claim, read_study
from dfkt.store.tables import PartTable
from dfkt.students.keep import keep_student
from dfkt.students.package import PACKAGE_FILES
from dfkt.study.config import StudyConfig
from dfkt.study.driver import Workers
from dfkt.study.opening import check_store, open_store
from dfkt.study.search import mend_journal
from dfkt.training.cached import images_for
from dfkt.training.config import RunConfig
from dfkt.training.run import Trained

TINY = toy("toy", arm("scratch"), arm("dfkt", 2), seeds=1)
REPORT = {"records": [], "val_accuracy": 0.5, "test_accuracy": 0.25, "complete": True}


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: None)
    ran = lambda configs, results, **given: SimpleNamespace(interrupted=True, failures=0)  # noqa: E731
    monkeypatch.setattr("dfkt.study.study.run_studies", ran)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that is over, with a teacher and a session as a real one notes them."""
    results = tmp_path_factory.mktemp("played")
    Played(results, TINY).run()
    store = open_store(
        TINY, Storage(results / "toy"), ABOUT, TAPS, placement=to_dict(Placement()), workers=to_dict(Workers())
    )
    store.update_meta(
        teacher={"key": "k", "network": "resnet26", "width": 1.0, "val_accuracy": 0.9, "test_accuracy": 0.9}
    )
    return results / "toy"


@pytest.fixture
def toys(played: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(played, tmp_path / "toy")
    return tmp_path / "toy"


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command that ends with a line; return the line."""
    assert main(list(argv)) == code, capsys.readouterr()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "not foreseen" not in err
    return err


STUDY_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is damaged: it is no JSON"),
    "cut": (b'{"format": 3, "par', "is damaged: it is no JSON"),
    "zeros": (bytes(50), "is damaged: it is no JSON"),
    "latin": (b'{"format": 3, "note": "\xff"}', "is damaged: it is no JSON"),
    "a list": (b"[]", "is damaged: it is []"),
    "null": (b"null", "is damaged: it is None"),
    "nothing in it": (b"{}", "is damaged: it has no entry format"),
    "nan": (b'{"format": 3, "params": {}, "losses": [], "x": NaN}', "NaN is no JSON value"),
    "nested": (b"[" * 100_000, "is damaged: it is no JSON"),
    "many digits": (b'{"format": ' + b"9" * 5000 + b"}", "is damaged: it is no JSON"),
    "future": (b'{"format": 4}', "must have format 3, but"),
    "past": (b'{"format": 2}', "must have format 3, but"),
    "a word": (b'{"format": "three"}', "must have format 3, but"),
    "no parameter": (b'{"format": 3, "params": {"a": "list"}, "losses": []}', "is damaged: params.a is 'list'"),
    "a loss twice": (b'{"format": 3, "params": {}, "losses": ["a", "a"]}', "its loss a has no column of its own"),
    "a taken loss": (b'{"format": 3, "params": {}, "losses": ["val"]}', "its loss val has no column of its own"),
    "no configuration": (b'{"format": 3, "params": {}, "losses": []}', "it has no entry config"),
}  # fmt: skip


@pytest.mark.parametrize("command", [["show"], ["resume"], ["distill", "--trial"]])
@pytest.mark.parametrize("name", list(STUDY_FILES))
def test_a_damaged_study_file_is_one_line(
    name: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = STUDY_FILES[name]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.json").write_bytes(text)
    assert said in refused(capsys, *command, "s")


def test_a_study_file_that_is_gone_beside_its_tables_is_said(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toys / "study.json").unlink()
    before = sorted(toys.rglob("*"))
    assert "must hold a study" in refused(capsys, "show", "toy")
    assert "must hold a study.json" in refused(capsys, "resume", "toy")
    assert "must have a study.json" in refused(capsys, "distill", "--trial", "toy")
    with pytest.raises(StudyError, match=r"must be empty or hold a study\.json"):
        claim(Storage(toys))
    assert sorted(toys.rglob("*")) == before


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of everything in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        yield (*at, name)
        yield from places(entry, (*at, name))


VALUES = [None, 0, -1, 1.5, 1e300, 2**70, True, "", "x", "../x", [], {}, [None], {"x": None}, ["x"], [[1]]]


def changed(meta: dict[str, Any], at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return a study file with a value somewhere, or without what stands there."""
    meta = copy.deepcopy(meta)
    inside: Any = meta
    for name in at[:-1]:
        inside = inside[name]
    if value is DELETED:
        del inside[at[-1]]
    else:
        inside[at[-1]] = value
    return meta


DELETED = object()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_whatever_is_changed_in_a_study_file_works_or_is_one_line(
    data: st.DataObject, toys: Path, played: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = json.loads((played / "study.json").read_text())
    top = data.draw(st.sampled_from(list(meta)))
    inside = [(top, *at) for at in places(meta[top])]
    at = data.draw(st.sampled_from([(top,), *inside]))
    value = data.draw(st.sampled_from([DELETED, *VALUES]))
    (toys / "study.json").write_text(json.dumps(changed(meta, at, value)))
    for argv in (["show", "toy"], ["resume", "toy"]):
        code = main(argv)
        err = capsys.readouterr().err
        assert "not foreseen" not in err, (at, value, err)
        assert (code, err.count("\n")) in ((0, 0), (130, 0), (2, 1)), (at, value, err)
    said = []
    try:
        check_store(TINY, Storage(toys), ABOUT)
        open_store(TINY, Storage(toys), ABOUT, TAPS)
    except InputError as error:
        said.append(str(error))
    assert all("\n" not in text for text in said)


def write(table: Any) -> Callable[[bytes], bytes]:
    def harm(data: bytes) -> bytes:
        sink = io.BytesIO()
        pq.write_table(table(pq.read_table(io.BytesIO(data))), sink)
        return sink.getvalue()

    return harm


PARTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "zero bytes": (lambda data: b"", "cannot be read"),
    "cut": (lambda data: data[: len(data) // 2], "cannot be read"),
    "garbage": (lambda data: bytes(range(256)) * 8, "cannot be read"),
    "text": (lambda data: b"number,state\n0,COMPLETE\n", "cannot be read"),
    "another table": (write(lambda t: pa.table({"a": [1]})), "has a of type int64, where study.json implies no such column"),
    "a column more": (write(lambda t: t.append_column("x", pa.nulls(len(t), pa.int8()))), "has x of type int8"),
    "another type": (
        write(lambda t: t.set_column(t.schema.get_field_index("seed"), "seed", t["seed"].cast(pa.string()))),
        "has seed of type string",
    ),
    "no number": (write(lambda t: t.drop_columns(["number"])), "has no column number"),
    "a column twice": (write(lambda t: t.append_column(t.schema.field("seed"), t["seed"])), "cannot be read"),
    "rows twice": (write(lambda t: pa.concat_tables([t, t])), "is damaged: its runs are not there once each"),
    "another order": (write(lambda t: t.take([1, 0])), "is damaged: its runs are not there once each, by number"),
    "another part's": (
        write(lambda t: t.set_column(0, t.schema.field("number"), pa.array([640, 641]))),
        "must hold runs 0 to 63, but it holds some of part-00010.parquet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PARTS))
def test_a_damaged_part_is_named_with_what_to_do(name: str, toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = toys / "trials" / "arm=dfkt" / "part-00000.parquet"
    harm, said = PARTS[name]
    path.write_bytes(harm(path.read_bytes()))
    for line in (refused(capsys, "show", "toy"), refused(capsys, "distill", "--trial", "toy")):
        assert f"part-00000.parquet in {path.parent}" in line
        assert said in line
        assert "ove it away" in line
    with pytest.raises(StudyError, match=r"part-00000\.parquet"):
        Played(toys.parent, TINY)


@pytest.mark.parametrize("at", range(0, 4000, 160))
def test_a_part_cut_anywhere_is_never_taken_for_whole(at: int, played: Path, tmp_path: Path) -> None:
    part = played / "trials" / "arm=dfkt" / "part-00000.parquet"
    schema = pq.read_schema(part)
    (tmp_path / "arm=a").mkdir()
    (tmp_path / "arm=a" / "part-00000.parquet").write_bytes(part.read_bytes()[:at])
    with pytest.raises(StudyError, match=r"part-00000\.parquet in .* cannot be read"):
        PartTable(Storage(tmp_path), schema).read("a")


def test_a_bit_that_flipped_is_never_another_figure(played: Path, tmp_path: Path) -> None:
    part = played / "trials" / "arm=dfkt" / "part-00000.parquet"
    whole, schema = pq.read_table(part), pq.read_schema(part)
    data = part.read_bytes()
    pages = [whole_column(pq.read_metadata(part).row_group(0).column(k)) for k in range(len(schema))]
    (tmp_path / "arm=a").mkdir()
    refusals = 0
    for start, end in pages:
        for at in (start + (end - start) // 2, end - 1):
            (tmp_path / "arm=a" / "part-00000.parquet").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            try:
                assert PartTable(Storage(tmp_path), schema).read("a").equals(whole), at
            except StudyError:
                refusals += 1
    assert refusals > len(pages)


def whole_column(column: Any) -> tuple[int, int]:
    """Return where a column's bytes begin and end."""
    begin = column.dictionary_page_offset or column.data_page_offset
    return begin, begin + column.total_compressed_size


@pytest.mark.parametrize("copied", ["part-00000 (1).parquet", "part-000000.parquet", "part-00000 copy.parquet"])
@pytest.mark.parametrize("table", ["trials", "epochs", "finals", "final_epochs"])
def test_a_part_that_is_there_twice_is_refused_with_both_names(
    table: str, copied: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (toys / table).glob("arm=dfkt")
    shutil.copy(folder / "part-00000.parquet", folder / copied)
    line = refused(capsys, "show", "toy")
    assert f"{copied} looks like a copy of part-00000.parquet. Move one of them away" in line


@pytest.mark.parametrize("table", ["trials", "epochs", "finals", "final_epochs"])
def test_a_part_under_another_number_is_refused_with_both_names(
    table: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toys / table / "arm=dfkt"
    shutil.copy(folder / "part-00000.parquet", folder / "part-00007.parquet")
    line = refused(capsys, "show", "toy")
    assert "part-00007.parquet" in line
    assert "must hold runs 448 to 511, but it holds some of part-00000.parquet, of which it may be a copy" in line


@pytest.mark.parametrize("foreign", ["README", ".DS_Store", ".part-00000.parquet." + "a" * 32 + ".tmp", "notes.csv"])
def test_what_else_lies_beside_parts_is_passed_over(
    foreign: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "toy"]) == 0
    before = capsys.readouterr().out
    for folder in (toys, toys / "trials", toys / "trials" / "arm=dfkt"):
        (folder / foreign).write_bytes(b"PAR1")
    assert main(["show", "toy"]) == 0
    assert capsys.readouterr().out == before


def test_a_damaged_part_that_was_moved_away_is_made_again(toys: Path) -> None:
    path = toys / "trials" / "arm=dfkt" / "part-00000.parquet"
    path.rename(toys / "damaged")
    lines: list[str] = []
    store = open_study(TINY, toys.parent).store
    mend_journal(store.storage, lambda arm: store.rows("trial", arm), lines.append)
    assert len(lines) == 1
    again = Played(toys.parent, TINY).run()
    assert again.told()[:2] == ["dfkt trial 0", "dfkt trial 1"]
    assert read_study(toys).trials.number.tolist() == [0, 1]


RESULTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"records": [',
    "list": b"[]",
    "nothing": b"{}",
    "no accuracy": b'{"records": []}',
    "records": b'{"records": 1, "val_accuracy": 0.5}',
    "text": b'{"records": [], "val_accuracy": "high"}',
    "null": b'{"records": [], "val_accuracy": 0.5, "test_accuracy": null}',
    "nan": b'{"records": [], "val_accuracy": NaN}',
    "failure": b'{"records": [], "failure": 3}',
}


@pytest.mark.parametrize("name", list(RESULTS))
def test_a_damaged_result_redoes_its_run_and_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(distill, "run_job", lambda job, report: (runs.append(job), report(REPORT)))
    argv = ["distill", "--method", "scratch", "--out", "out"]
    assert main(argv) == main(argv) == 0
    assert len(runs) == 1
    (tmp_path / "out" / "result.json").write_bytes(RESULTS[name])
    capsys.readouterr()
    assert main(argv) == 0
    assert "result.json is damaged: the run is done again\n" in capsys.readouterr().out
    assert len(runs) == 2
    assert main(argv) == 0
    assert len(runs) == 2


def test_a_damaged_student_is_trained_again_when_it_shall_be_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "run_job", lambda job, report: report(REPORT))
    out = tmp_path / "out"
    argv = ["distill", "--method", "scratch", "--out", "out"]
    assert main(argv) == 0
    config, data = RunConfig(method=Scratch()), images_for(RunConfig().data, Placement())
    for weights in (b"", b"garbage", None):
        (out / "result.json").write_text(json.dumps({"records": [], "val_accuracy": 0.5}))
        network = build_network(config.student, num_classes=10, in_channels=1)
        keep_student(Storage(out), Trained(config, network, data, 0.5, None))
        file = out / "model.safetensors"
        file.write_bytes(weights) if weights is not None else file.unlink()
        assert main(argv) == 0
        assert "The run is done again\n" in capsys.readouterr().out


def test_the_checkpoint_goes_once_the_result_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Any, report: Any) -> None:
        Storage(job.storage).write("state.pt", b"where it is")
        report(REPORT)

    monkeypatch.setattr(distill, "run_job", run)
    assert main(["distill", "--method", "scratch", "--out", "out"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "run.json", "result.json"}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"key": 3}', b"\xff", b"[" * 100_000])
def test_a_damaged_description_of_a_run_is_one_line(
    text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_bytes(text)
    line = refused(capsys, "distill", "--method", "scratch", "--out", "out")
    assert f"run.json in {tmp_path / 'out'} is damaged" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["teacher.pt", *PACKAGE_FILES, "state.pt", "result.json"])
def test_a_file_of_such_a_name_that_no_run_wrote_is_not_overwritten(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    assert f"holds {name}, but no run.json" in refused(capsys, "distill", "--method", "scratch", "--out", "out")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [(name, b"mine")]


def test_a_trial_of_an_arm_that_the_study_does_not_list_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_study(tmp_path / "blobs", [Arm("scratch", {1: 0.5}, trials=[("COMPLETE", 0.5)], planned=1)])
    (tmp_path / "blobs" / "trials" / "arm=scratch").rename(tmp_path / "blobs" / "trials" / "arm=other")
    assert isinstance(store, StudyStore)
    assert "but trial 0 is of other" in refused(capsys, "distill", "--trial", "blobs")


GOOD = [Arm("scratch", {1: 0.7, 2: 0.8})]


def test_of_several_studies_the_good_ones_are_shown_and_the_damaged_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        write_study(tmp_path / "results" / name, GOOD, name=name)
    (tmp_path / "results" / "b" / "study.json").write_text("{")
    assert main(["show", "results"]) == 1
    out, err = capsys.readouterr()
    assert out.index("a: Blobs") < out.index("c: Blobs")
    assert "b: Blobs" not in out
    assert f"failed: 1 of 3 studies cannot be shown: study.json in {tmp_path}/results/b is damaged" in err
    assert err.count("\n") == 1


def test_of_several_studies_the_good_ones_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[StudyConfig] = []
    monkeypatch.setattr(resume, "run_all", lambda configs, results, a: ran.extend(configs) or 0)
    for name in ("a", "b", "c"):
        open_study(toy(name), tmp_path)
    (tmp_path / "b" / "study.json").write_text("{")
    (tmp_path / "c").rename(tmp_path / "d")
    assert main(["resume", "."]) == 1
    out = capsys.readouterr().out
    assert [config.name for config in ran] == ["a"]
    assert f"left out: study.json in {tmp_path}/b is damaged" in out
    assert "Rename d to c" in out
    (tmp_path / "a" / "study.json").write_text("{")
    assert "a is damaged" in refused(capsys, "resume", ".")


def test_the_page_at_the_end_is_that_of_the_studies_that_went_on(
    toys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = lambda configs, results, **given: SimpleNamespace(interrupted=False, failures=0)  # noqa: E731
    monkeypatch.setattr("dfkt.study.study.run_studies", ended)
    other = shutil.copytree(toys, toys.parent / "other") / "study.json"
    other.write_text(other.read_text().replace('"toy"', '"other"'))
    open_study(toy("bad"), toys.parent)
    (toys.parent / "bad" / "study.json").write_text("{")
    assert main(["resume", "."]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert "bad is damaged" in said.out
    assert "\ntoy: " in said.out
    assert "\nother: " in said.out
