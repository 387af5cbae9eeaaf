"""What charts show is what was measured: by arm, with the teacher, by stage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made import Arm, write_study

from dfkt.analysis.charts import accuracy_curves, colour, cost_charts, finals_chart, spent_chart, stage_chart
from dfkt.analysis.estimates import mean_interval
from dfkt.analysis.figures import Figures, study_figures
from dfkt.analysis.pages import STATE_WORDS
from dfkt.analysis.verdict import device_seconds
from dfkt.store.study_store import Study, read_study
from dfkt.students.cost import Cost, Latency

FLOW = (("flow", None), ("flow", None), ("task", 0.7), ("task", 0.9))
SCRATCH = Arm("scratch", {1: 0.80, 2: 0.82})
OURS = Arm("dfkt", {1: 0.84, 2: 0.88}, FLOW, [("COMPLETE", 0.5), ("PRUNED", 0.7)], planned=2)
COSTS = (
    Cost("teacher resnet26", 366_000, latencies={1: Latency(2, 1, 3), 64: Latency(0.2, 0.1, 0.3)}),
    Cost("student resnet8", 75_000, latencies={1: Latency(1, 0.5, 2), 64: Latency(0.1, 0.1, 0.2)}),
)


def made(folder: Path, *arms: Arm, **meta: Any) -> tuple[Study, Figures]:
    write_study(folder / "made", arms, **meta)
    study = read_study(folder / "made")
    return study, study_figures({"blobs": study})


def points(figure: Any) -> dict[str, list[tuple[float, float]]]:
    """Return the points of the traces that a legend names."""
    found = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data if trace.name}
    return {name: both for name, both in found.items() if both != [(None, None)]}


def test_final_runs_are_dots_with_their_mean_and_its_interval(tmp_path: Path) -> None:
    figure = finals_chart(made(tmp_path, SCRATCH, OURS)[1], "blobs")
    assert figure is not None
    mean, runs = (trace for trace in figure.data if trace.name == "dfkt")
    assert list(runs.x) == pytest.approx([84, 88])
    assert list(mean.x) == pytest.approx([86])
    expected = mean_interval(pd.Series([84.0, 88.0]))
    assert mean.error_x.array[0] == pytest.approx(expected[0] - expected[1])
    assert list(figure.layout.yaxis.categoryarray) == ["scratch", "dfkt"]


def test_the_teacher_stands_among_the_final_runs_and_in_sight(tmp_path: Path) -> None:
    figure = finals_chart(made(tmp_path, SCRATCH, OURS)[1], "blobs")
    assert figure is not None
    (teacher,) = (trace for trace in figure.data if trace.name == "teacher")
    assert set(teacher.x) == {90.0}
    low, high = figure.layout.xaxis.range
    assert low < 80 < 90 < high


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    figure = finals_chart(made(tmp_path, Arm("scratch", {1: 0.8}), teacher={})[1], "blobs")
    assert figure is not None
    assert figure.data[0].error_x.array is None
    assert not [trace for trace in figure.data if trace.name == "teacher"]


def test_without_final_runs_there_are_no_charts_of_them(tmp_path: Path) -> None:
    study, figures = made(tmp_path, Arm("scratch"), Arm("kd", {1: None}))
    assert finals_chart(figures, "blobs") is None
    assert accuracy_curves(figures, "blobs") is None
    assert cost_charts(figures, "blobs", COSTS, device_seconds(study)) == {}


def test_accuracy_stands_against_every_cost_with_the_teacher_in_it(tmp_path: Path) -> None:
    study, figures = made(tmp_path, SCRATCH, OURS)
    charts = cost_charts(figures, "blobs", COSTS, device_seconds(study))
    assert list(charts) == [
        "parameters",
        "milliseconds an image, batch 1",
        "milliseconds an image, batch 64",
        "device seconds of search and final runs",
    ]
    assert points(charts["parameters"]) == {
        "scratch": [(75_000, pytest.approx(81))],
        "dfkt": [(75_000, pytest.approx(86))],
        "teacher": [(366_000, 90)],
    }
    assert points(charts["milliseconds an image, batch 64"])["teacher"] == [(0.2, 90)]
    spent = points(charts["device seconds of search and final runs"])
    assert spent["dfkt"] == [(pytest.approx(2 * 60.4 + 2 * 30), pytest.approx(86))]
    assert {y for _, y in spent["teacher (its training not counted)"]} == {90}


def test_a_teacher_whose_training_was_timed_is_a_point_there_too(tmp_path: Path) -> None:
    known = {"key": "k", "network": "resnet26", "val_accuracy": 0.91, "test_accuracy": 0.9, "seconds": 300.0}
    study, figures = made(tmp_path, SCRATCH, OURS, teacher=known)
    charts = cost_charts(figures, "blobs", COSTS, device_seconds(study))
    assert points(charts["device seconds of search and final runs"])["teacher"] == [(300, 90)]


def test_costs_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    figures = made(tmp_path, SCRATCH)[1]
    assert cost_charts(figures, "blobs", ()) == {}
    assert list(cost_charts(figures, "blobs", [Cost("student resnet8", 75_000)])) == ["parameters"]


def test_all_points_lie_within_the_axis(tmp_path: Path) -> None:
    study, figures = made(tmp_path, SCRATCH, OURS)
    for chart in cost_charts(figures, "blobs", COSTS, device_seconds(study)).values():
        low, high = (10**end for end in chart.layout.xaxis.range)
        assert all(low < x < high for both in points(chart).values() for x, _ in both)


def test_curves_are_means_over_seeds_and_flow_stages_count_as_steps(tmp_path: Path) -> None:
    figure = accuracy_curves(made(tmp_path, SCRATCH, OURS)[1], "blobs")
    assert figure is not None
    found = points(figure)
    assert found["dfkt"] == [(30, pytest.approx(70)), (40, pytest.approx(90))]
    assert [y for _, y in found["where scratch ends"]] == pytest.approx([80, 80])


def test_a_stage_is_shaded_where_it_was_trained_and_its_loss_drawn(tmp_path: Path) -> None:
    study, _ = made(tmp_path, OURS)
    figure = stage_chart(study.final_epochs[study.final_epochs.number == 0])
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(0, 2)]
    found = points(figure)
    assert [x for x, _ in found["loss of flow stages"]] == [1, 2]
    assert found["val accuracy"] == [(3, pytest.approx(70)), (4, pytest.approx(90))]


def test_stages_of_several_rounds_are_shaded_apart() -> None:
    stages = [(1, 1), (1, 2), (1, 2), (2, 1)]
    records = pd.DataFrame({"epoch": [1.0, 2.0, 3.0, 4.0, 5.0], "phase": ["flow"] * 4 + ["task"]})
    records["round"] = pd.array([r for r, _ in stages] + [None], "Int64")
    records["stage"] = pd.array([s for _, s in stages] + [None], "Int64")
    figure = stage_chart(records.assign(loss=0.5, val_accuracy=[None] * 4 + [0.9]))
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(0, 1), (1, 3), (3, 4)]
    assert figure.layout.shapes[0].opacity < figure.layout.shapes[1].opacity


def test_a_run_of_one_stage_shows_its_task_loss(tmp_path: Path) -> None:
    study, _ = made(tmp_path, SCRATCH)
    figure = stage_chart(study.final_epochs[study.final_epochs.number == 0])
    assert not figure.layout.shapes
    assert len(points(figure)["loss"]) == 4


def test_device_seconds_are_told_by_what_they_were_spent_on(tmp_path: Path) -> None:
    study, _ = made(tmp_path, SCRATCH, replace(OURS, tests={1: 0.9, 2: None}))
    tables = {"trials": study.trials, "final runs": study.finals}
    figure = spent_chart(tables, ["scratch", "dfkt"], STATE_WORDS)
    assert figure is not None
    assert {trace.name: list(trace.x) for trace in figure.data} == {
        "trials, complete": [0, pytest.approx(60.4)],
        "trials, stopped early": [0, pytest.approx(60.4)],
        "final runs, complete": [60, 30],
        "final runs, failed": [0, 30],
    }
    assert spent_chart({"trials": study.trials[:0]}, ["scratch"], STATE_WORDS) is None


def test_arms_keep_their_looks_and_no_two_share_one() -> None:
    arms = ["scratch", "dfkt", *(f"arm{k}" for k in range(19))]
    assert len({colour(arms, arm) for arm in arms}) == len(arms)
