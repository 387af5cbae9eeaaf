"""Ten kills at random instants lose nothing; a hundred take an hour or more: ``tests/faults/kills.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RAY_MARKS
from faults.kills import CHANCES

pytestmark = [*RAY_MARKS, pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to find all processes")]
TESTS = Path(__file__).parents[1]
SEED = 35
"""By which each thing that can be killed is killed at least once."""
# Minutes of starting and killing Ray: a busy machine runs into its limits. DFKT_FAULTS=1 runs it.
pytestmark = [*pytestmark, pytest.mark.skipif("DFKT_FAULTS" not in os.environ, reason="DFKT_FAULTS is not set")]


@pytest.mark.timeout(1800)
def test_ten_kills_at_random_instants_lose_nothing(tmp_path: Path) -> None:
    given = ["--seed", str(SEED), "--count", "10", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "faults.kills", *given], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f": {kind} killed " in done.stdout for kind in CHANCES)
    assert "10 kills of " in done.stdout
    assert done.stdout.endswith("0 faults\n")
