"""How far the work is: one line on a terminal, a line a minute elsewhere."""

import pytest
from terminals import terminal

from dfkt.training.progress import ProgressLine, place

WIPED = "\r\x1b[K"


def test_a_terminals_line_is_written_over_cut_to_its_width_and_wiped() -> None:
    with terminal(columns=40) as written:
        line = ProgressLine()
        assert line.due
        for text in ("one", "one", "x" * 100):
            line.show(text)
        assert written() == f"{WIPED}one{WIPED}{'x' * 39}"
        line.clear()
        line.clear()
        line.show("one")
        assert written() == f"{WIPED}{WIPED}one"


def test_elsewhere_a_line_lasts_and_comes_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    line = ProgressLine(lambda: now)
    for now, due in ((0.0, False), (59.9, False), (60.0, True), (61.0, False), (119.0, False), (125.0, True)):
        assert line.due is due
        line.show(f"at {now}")
        line.clear()
    assert capsys.readouterr().err == "at 60.0\nat 125.0\n"


def test_a_look_within_an_epoch_has_no_loss() -> None:
    assert place({"epoch": 1.5, "phase": "task"}) == "epoch 1.5, task stage"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"phase": "flow", "stage": 2, "round": 1}, "epoch 1.5, flow stage 2 of round 1, loss 0.250"),
        ({"phase": "hint", "stage": 2, "round": None}, "epoch 1.5, hint stage 2, loss 0.250"),
        ({"phase": "task", "stage": None, "round": None}, "epoch 1.5, task stage, loss 0.250"),
    ],
)
def test_a_records_place_names_epoch_stage_and_loss(record: dict[str, object], text: str) -> None:
    assert place({"epoch": 1.5, "loss": 0.25} | record) == text
