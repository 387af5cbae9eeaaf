"""How far the work is: bars on a terminal, a line a minute elsewhere."""

import gc
import threading

import pytest
from terminals import terminal

from dfkt.training.progress import PARTS, Bar, Progress, run_bar


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        """Return them."""
        return self.now


def test_a_terminal_has_a_bar_for_the_whole_and_one_for_each_part_cut_to_its_width() -> None:
    clock = Clock()
    with terminal(columns=60) as written:
        progress = Progress(clock)
        assert progress.due
        progress.show(Bar("all", 1, 4, "runs done", "2 running"), [Bar("first", 1.5, 3, "epochs", "x" * 99)])
        lines = written().replace("\r", "\n").replace("\x1b[A", "\n").split("\n")
        assert "all  25% |█████               | 1/4 runs done, 2 running" in lines
        assert any(
            line.startswith("first  50% |██████████          | 1.5/3 epochs, xxx") and len(line) == 59 for line in lines
        )
        progress.show(Bar("all", 2, 4, "runs done"))
        assert written() == ""  # it is not due
        clock.now = 1
        progress.show(Bar("all", 2, 4, "runs done"))  # the part has ended
        shown = written()
        assert "all  50% |" in shown
        assert "first" not in shown
        progress.close()
        assert "%" not in written()


def test_names_and_texts_are_shown_as_they_are() -> None:
    with terminal(columns=80) as written:
        progress = Progress(Clock())
        progress.show(Bar("{bar}", 0, 0, "{n}", "a % of {total}"))
        assert "{bar}   0% |" in (shown := written())
        assert "| 0/0 {n}, a % of {total}" in shown
        progress.close()


def test_wiped_bars_leave_the_place_to_a_line_and_come_again() -> None:
    clock = Clock()
    with terminal(columns=40) as written:
        progress = Progress(clock)
        progress.show(Bar("all", 1, 4, "runs done"))
        written()
        progress.clear()
        assert written().split("\r")[-1] == ""
        clock.now = 1
        progress.show(Bar("all", 2, 4, "runs done"))
        assert "all  50%" in written()
        progress.close()


def test_there_are_not_more_bars_than_lines_and_no_thread_for_them() -> None:
    before = threading.active_count()
    with terminal(columns=60) as written:
        progress = Progress(Clock())
        progress.show(Bar("all", 0, 1, "runs done"), [Bar(f"run {k}", 0, 1, "epochs") for k in range(100)])
        assert written().count("epochs") == PARTS
        assert threading.active_count() == before
        progress.close()


def test_a_terminal_that_is_gone_changes_nothing() -> None:
    with terminal(columns=60):
        progress = Progress(Clock())
        progress.show(Bar("all", 0, 1, "runs done"))
    progress.clear()
    progress.close()


def test_bars_that_nobody_wiped_write_nothing_when_they_go(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal(columns=60):
        progress = Progress(Clock())
        progress.show(Bar("all", 0, 1, "runs done"), [Bar("part", 0, 1, "epochs")])
    del progress
    gc.collect()
    assert capsys.readouterr() == ("", "")


def test_elsewhere_a_line_lasts_and_comes_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(clock)
    for clock.now, due in ((0.0, False), (59.9, False), (60.0, True), (61.0, False), (119.0, False), (125.0, True)):
        assert progress.due is due
        progress.show(Bar("s", clock.now, 200, "runs done"), [Bar("a part", 0, 1, "epochs")])
        progress.clear()
    progress.close()
    assert capsys.readouterr().err == "s: 60/200 runs done\ns: 125/200 runs done\n"


def test_a_look_within_an_epoch_has_no_loss() -> None:
    assert str(run_bar("kd", {"epoch": 1.5, "phase": "task"}, 3)) == "kd: 1.5/3 epochs, task stage"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"phase": "flow", "stage": 2, "round": 1}, "flow stage 2 of round 1, loss 0.250"),
        ({"phase": "hint", "stage": 2, "round": None}, "hint stage 2, loss 0.250"),
        ({"phase": "task", "stage": None, "round": None}, "task stage, loss 0.250"),
    ],
)
def test_a_runs_bar_names_epochs_stage_and_loss(record: dict[str, object], text: str) -> None:
    assert str(run_bar("kd", {"epoch": 1.5, "loss": 0.25} | record, 12.0)) == f"kd: 1.5/12 epochs, {text}"
