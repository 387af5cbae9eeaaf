"""Optuna's plots of a search, from a journal that is only read; what cannot be drawn says why."""

from pathlib import Path

import optuna
import pytest
from made import write_journal

from dfkt.analysis.searches import MOST_TRIALS, _thinned, describe_range, read_searches, search_plots, space_cells
from dfkt.errors import StudyError
from dfkt.store.files import Storage

VALUES = [0.5, 0.7, 0.6, None, 0.8, 0.55]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_journal(tmp_path, "dfkt", VALUES)
    return tmp_path


def drawn(search: optuna.Study) -> dict[str, bool]:
    return {plot.title: plot.figure is not None for plot in search_plots(search)}


def search_of(values: list[float | None], folder: Path) -> optuna.Study:
    write_journal(folder, "dfkt", values)
    return read_searches(Storage(folder))["dfkt"]


def test_a_journal_is_read_and_left_as_it_was(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = read_searches(Storage(folder))
    assert [trial.value for trial in found["dfkt"].trials] == VALUES
    search_plots(found["dfkt"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_line_that_is_being_written_is_left_out(folder: Path) -> None:
    with open(folder / "optuna.journal", "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    assert len(read_searches(Storage(folder))["dfkt"].trials) == len(VALUES)


@pytest.mark.parametrize("data", [b"nonsense\n", b'{"op_code": 99}\n', b"[]\n", b"\xff\n"])
def test_a_damaged_journal_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "optuna.journal").write_bytes(data)
    with pytest.raises(StudyError, match=r"optuna\.journal in .* is damaged: ") as raised:
        read_searches(Storage(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_missing_journal_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"need optuna\.journal, but .* has none"):
        read_searches(Storage(tmp_path))


def test_all_plots_are_drawn_where_there_is_something_to_see(folder: Path) -> None:
    plots = {plot.title: plot for plot in search_plots(read_searches(Storage(folder))["dfkt"])}
    assert list(plots) == ["Importance", "Slices", "Parallel coordinates", "Timeline"]
    assert all(plot.figure is not None and plot.figure.data for plot in plots.values())
    assert "Only 5 trials are complete: a hint at most." in plots["Importance"].text
    assert {"complete", "stopped early"} <= {trace.name for trace in plots["Timeline"].figure.data}  # type: ignore[union-attr]


def test_an_importance_that_cannot_be_told_says_why(tmp_path: Path) -> None:
    for k, values in enumerate(([0.5], [0.5, 0.5, 0.5])):
        (tmp_path / str(k)).mkdir()
        plots = {plot.title: plot for plot in search_plots(search_of(list(values), tmp_path / str(k)))}
        assert plots["Importance"].figure is None
        assert plots["Importance"].text.startswith("Not drawn: all complete trials are equally good")
        assert plots["Slices"].figure is not None


def test_without_complete_trials_only_the_timeline_is_drawn(tmp_path: Path) -> None:
    search = search_of([None, None], tmp_path)
    assert drawn(search) == {"Importance": False, "Slices": False, "Parallel coordinates": False, "Timeline": True}
    assert search_plots(search)[1].text == "Not drawn: no trial that has a parameter is complete."


def test_a_search_that_has_only_been_planned_has_no_plots() -> None:
    search = optuna.create_study(direction="maximize")
    search.enqueue_trial({"rate": 0.1})
    assert not any(drawn(search).values())
    assert search_plots(search)[-1].text == "Not drawn: no trial has begun."


def test_a_plot_that_optuna_cannot_draw_says_what_it_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise RuntimeError("no such axis")

    monkeypatch.setattr("optuna.visualization.plot_slice", refuse)
    plots = {plot.title: plot for plot in search_plots(read_searches(Storage(folder))["dfkt"])}
    assert plots["Slices"].text == "Not drawn: Optuna could not draw it: RuntimeError: no such axis."
    assert plots["Timeline"].figure is not None


def test_of_many_trials_the_best_are_shown_and_an_even_share_of_the_others() -> None:
    search = optuna.create_study(direction="maximize")
    search.add_trials([optuna.trial.create_trial(value=k / 1000) for k in range(1000)])
    values = [trial.value for trial in _thinned(search).trials]
    assert len(values) == MOST_TRIALS
    assert set(values) >= {k / 1000 for k in range(1000 - MOST_TRIALS // 2, 1000)}
    assert min(v for v in values if v is not None) < 0.01


def test_what_was_searched_is_every_parameter_with_its_range_and_the_winners_value(folder: Path) -> None:
    search = read_searches(Storage(folder))["dfkt"]
    cells = space_cells(search, 4).set_index("parameter")
    assert cells.searched.to_dict() == {
        "rate": "0.01 to 1, logarithmic",
        "pattern": "dense, adjacent",
        "rounds": "1 to 3 (whole)",
    }
    assert cells.trials.to_dict() == {"rate": "6", "pattern": "6", "rounds": "3"}
    assert cells.winner["rounds"] == ""
    assert "winner" not in space_cells(search)


def test_a_range_with_one_end_is_told() -> None:
    assert describe_range(optuna.distributions.IntDistribution(2, 8, log=True)) == "2 to 8 (whole), logarithmic"
