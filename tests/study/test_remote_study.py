"""A whole study in a bucket: killed, gone on with, and read there. The bucket is moto's, on this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from bucket import Bucket, one_in_ten, served
from conftest import RAY_MARKS

from dfkt.cli.main import main
from dfkt.store.files import Storage
from dfkt.store.study_store import read_study
from dfkt.students.package import load_student
from dfkt.study.search import JOURNAL

pytestmark = RAY_MARKS
TRIALS, SEEDS = 3, 1


@pytest.fixture(scope="module", autouse=True)
def bucket() -> Iterator[Bucket]:
    """The bucket; the cluster's processes, started after this, have its credentials."""
    with served() as server:
        yield server


def command(results: str, home: Path, address: str) -> list[str]:
    """Return the command of a small study of digits, whose trials come one after the other."""
    data = "--data digits --limit-train 300 --limit-test 60 --epochs 3 --batch-size 64 --precision float32"
    networks = "--teacher resnet8 --teacher-width 0.5 --teacher-epochs 1 --student resnet8 --student-width 0.25"
    search = (
        f"--name far --method kd --baselines scratch --trials {TRIALS} --seeds {SEEDS} --confirm 0 --no-early-stopping"
    )
    places = ["--results", results, "--teacher-root", str(home / "teachers"), "--target-root", str(home / "targets")]
    cluster = ["--address", address, "--at-once", "1"]
    return [sys.executable, "-m", "dfkt", "study", *data.split(), *networks.split(), *search.split(), *places, *cluster]


def test_a_killed_study_in_a_bucket_that_fails_at_times_goes_on_with_no_run_lost_or_doubled(
    bucket: Bucket, home: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.fault = one_in_ten(1, "PUT", "POST")
    argv = command(bucket.uri("results"), home, address)
    killed = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with killed:
        assert killed.stdout is not None
        assert killed.stderr is not None
        if not any(line.startswith("[2/") for line in killed.stdout):
            raise AssertionError(killed.stderr.read())
        os.killpg(killed.pid, signal.SIGKILL)
    folder = Storage(bucket.uri("results/far"))
    before = read_study(folder)
    assert list(before.trials.state)[:2] == ["COMPLETE", "COMPLETE"]

    again = subprocess.run(argv, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"the lock of {folder.path} is taken over from process {killed.pid} on " in again.stderr
    after = read_study(folder)
    assert list(after.trials.number) == [*range(TRIALS)]
    assert set(after.trials.state) | set(after.finals.state) == {"COMPLETE"}
    assert sorted(after.finals.arm) == ["kd", "scratch"]
    assert list(after.epochs[["number", "index"]].itertuples(index=False, name=None)) == [
        (number, index) for number in range(TRIALS) for index in range(3)
    ]
    pd.testing.assert_frame_equal(after.trials.head(2), before.trials.head(2))

    tables = {
        f"{kind}/arm={arm}/part-00000.parquet" for kind in ("finals", "final_epochs") for arm in ("kd", "scratch")
    }
    tables |= {f"{kind}/arm=kd/part-00000.parquet" for kind in ("trials", "epochs")}
    kept = {key.removeprefix("results/far/") for key in bucket.keys()}  # noqa: SIM118
    students = {key for key in kept if key.startswith("students/")}
    assert kept - students == {"study.json", "teacher.pt", JOURNAL, *tables}
    assert {key.split("/")[1] for key in students} == {"kd-seed1", "scratch-seed1"}
    assert not any(key.endswith("state.pt") for key in students)

    load_student(folder.sub("students", "kd-seed1"))
    capsys.readouterr()
    assert main(["show", folder.path]) == 0
    shown = capsys.readouterr().out
    assert "far: digits" in shown
    assert f"kd: {TRIALS} trials: {TRIALS} complete" in shown
    assert main(["resume", folder.path]) == 0
    assert read_study(folder).trials.equals(after.trials)
