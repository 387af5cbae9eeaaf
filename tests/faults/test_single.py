"""Single faults on one machine lose nothing: what each is, ``tests/faults/single.py`` says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RAY_MARKS
from faults.single import FAULTS

pytestmark = [*RAY_MARKS, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to find all processes")]
TESTS = Path(__file__).parents[1]
# Minutes of starting and killing Ray: a busy machine runs into its limits. DFKT_FAULTS=1 runs it.
pytestmark = [*pytestmark, pytest.mark.skipif("DFKT_FAULTS" not in os.environ, reason="DFKT_FAULTS is not set")]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_loses_nothing(fault: str, tmp_path: Path) -> None:
    given = [sys.executable, "-m", "faults.single", "--only", fault, "--folder", str(tmp_path)]
    done = subprocess.run(given, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "left out" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.stdout.startswith(f"{fault}: ")
    assert done.stdout.endswith("; 0 faults\n")
