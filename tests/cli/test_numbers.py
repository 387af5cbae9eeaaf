"""Numbers on the command line: what is none is refused at once, in a short line."""

import argparse

import pytest

from dfkt.cli.numbers import number, whole


@pytest.mark.parametrize(("text", "value"), [("0", 0), (" 7 ", 7), ("-12", -12), ("+3", 3), ("9" * 18, 10**18 - 1)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole(text) == value


@pytest.mark.parametrize("text", ["", "1.0", "1e3", "1_000", "٣", "²", "9" * 5000, "nan", "0x10", "1 2", "--1"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole number") as raised:
        whole(text)
    assert len(str(raised.value)) < 100


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("-1.5", -1.5), (".5", 0.5), ("1.", 1), ("1e-3", 1e-3), ("1E308", 1e308), (" 2", 2)]
)
def test_numbers(text: str, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text", ["", "nan", "inf", "-Infinity", "1e309", "1e9999", "٣.٥", "1_0", "1,5", "0.1.2", "9" * 5000]
)
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="finite number") as raised:
        number(text)
    assert len(str(raised.value)) < 100
