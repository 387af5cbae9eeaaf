"""Whole trainings on a card that is pretended: the CPU's numbers to the last bit, and no step that waits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import METHODS

TESTS = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.xdist_group("pretended")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `pretended_card.py` finds, by name; its backend is the whole process's, so it has one of its own."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch lets no Python be a device's backend")
    file = tmp_path_factory.mktemp("pretended") / "found.json"
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("pretended_card.py")), str(file)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_card_has_the_records_and_weights_of_the_cpu_to_the_last_bit(found: Any, method: str) -> None:
    assert found[method][0]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_twice_the_steps_does_not_wait_for_the_card_more_often(found: Any, method: str) -> None:
    fewer, more = found[method][1]
    assert fewer == more > 0


def test_a_term_that_looks_at_a_value_is_seen_to_wait_at_every_step(found: Any) -> None:
    fewer, more = found["looking"][1]
    assert more - fewer == 4


def test_a_constant_that_was_left_on_the_cpu_is_refused(found: Any) -> None:
    assert found["constant"] == "aten.mul.Tensor of tensors on two devices"


@pytest.mark.parametrize("method", ["dfkt", "fitnets"])
@pytest.mark.parametrize("way", ["cpu to card", "card to cpu"])
def test_a_checkpoint_goes_on_on_the_other_device_to_the_last_bit(found: Any, way: str, method: str) -> None:
    assert found[f"{way} {method}"]
