"""The tolerances of the card's tests are what the CPU's own roundings make, and would not hide a narrower type."""

from pathlib import Path

import pytest
from conftest import load_script

from dfkt.methods.registry import METHODS

runs = load_script(Path(__file__).with_name("card_runs.py"))


def test_every_method_is_tried() -> None:
    assert {*runs.METHODS_SEEN} == {*METHODS}


@pytest.mark.parametrize("name", runs.METHODS_SEEN)
def test_a_run_in_bfloat16_would_be_refused_as_float32(name: str) -> None:
    assert runs.apart(runs.on_cpu(name, "bfloat16"), runs.on_cpu(name)) > runs.carries(name, "float32")


@pytest.mark.parametrize("name", runs.METHODS_SEEN)
def test_a_run_that_learns_nothing_would_be_refused(name: str) -> None:
    idle = runs.losses(runs.begin(name, "cpu", rate=0.0).run())
    assert runs.apart(idle, runs.on_cpu(name)) > 10 * runs.carries(name, "float32")


@pytest.mark.parametrize("name", runs.METHODS_SEEN)
def test_tolerances_are_small(name: str) -> None:
    assert runs.carries(name, "float32") < 1e-4
    assert runs.carries(name, "bfloat16") < 0.1
