"""Any value of any switch: a command would run, or it refuses in one line with exit code 2, and leaves no file behind."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfkt.cli import distill, study
from dfkt.cli.boundary import Parser
from dfkt.cli.main import main

SMALL = ["--teacher=resnet8", "--teacher-width=0.25", "--student-width=0.25", "--dry-run"]
MODULES = {"study": study, "distill": distill}


def parser_of(command: str) -> Parser:
    parser = Parser(prog=command)
    MODULES[command].add_switches(parser)
    return parser


def switches_of(command: str) -> list[str]:
    """Return the switches that take a value, but for ``--address``, which is not looked at before Ray is started."""
    return sorted(
        action.option_strings[-1]
        for action in parser_of(command)._actions
        if action.option_strings and action.nargs != 0 and action.dest not in ("help", "address")
    )


WORDS = st.sampled_from(
    [
        *(
            "",
            " ",
            "0",
            "1",
            "2",
            "3",
            "-1",
            "0.5",
            "1e308",
            "-1e308",
            "1e-308",
            "nan",
            "inf",
            "9" * 18,
            "9" * 5000,
            "1e999",
        ),
        *(
            "٣",
            "²",
            "1_000",
            "0x10",
            "true",
            "none",
            "null",
            "[]",
            "{}",
            "''",
            "a,b",
            ",",
            ":",
            "=",
            "..",
            "/",
            "~",
            "\x00",
        ),
        *(
            "resnet8",
            "resnet9",
            "resnet0",
            "resnet2",
            "resnet" + "9" * 30,
            "torchvision:",
            "torchvision:nothing",
            "a:b",
            ":a",
        ),
        *(
            "stem,layer1.0",
            "stem,stem",
            "fc,stem",
            "layer3.0,layer1.0",
            "digits",
            "dense-99999999",
            "sliding-0",
            "scratch",
        ),
        *(
            "rate=1e308",
            "rate=0",
            "rate=1..0",
            "rate=log:0..1",
            "rounds=999999999",
            "rounds=1..9",
            "rounds=1.5",
            "share=1e-9",
        ),
        *("pattern=dense", "pattern=" + "9" * 400, "stage_lengths=[1e308,1e308]", "span_weights=[1e308]", "norm=sum"),
        *(
            "pair_weights=[[0,9,1]]",
            "pair_weights=[[0,1]]",
            "temperature=1e-308",
            "weight=1e-308..1e308",
            "clip_norm=none",
        ),
        *("rate=", "=1", "rate", "order=joint", "weights=pair", "s3://", "file://", "\udcff", "x" * 300, "ü", "a\nb"),
    ]
)


def refuses_or_plans(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command dry; it may say what it would do, or refuse in one line."""
    try:
        code = main([command, *SMALL, *words])
    except SystemExit as ending:
        code = int(ending.code or 0)
    err = capsys.readouterr().err
    assert code in (0, 2), (words, err)
    assert (code == 0) == (err == ""), err
    if code == 2:
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert len(err) < 2000, err


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("command", MODULES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_switch_runs_or_is_refused_in_one_line(
    command: str, data: st.DataObject, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = st.tuples(st.sampled_from(switches_of(command)), WORDS | st.text(max_size=8))
    chosen = data.draw(st.lists(pairs, min_size=1, max_size=3))
    refuses_or_plans(command, [f"{switch}={value}" for switch, value in chosen], capsys)
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("command", MODULES)
@pytest.mark.parametrize(
    "switch", ["data", "data-root", "results", "teacher-root", "target-root", "teacher-checkpoint"]
)
def test_the_home_of_a_user_who_is_not_there_is_a_folder_like_others(
    command: str, switch: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if f"--{switch}" in switches_of(command):
        refuses_or_plans(command, [f"--{switch}=~nobody-of-that-name/x"], capsys)


def test_a_dry_run_says_what_would_be_trained_and_leaves_nothing(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *SMALL, "--trials=7", "--seeds=2", "--epochs=9", "--name=s"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits: 1293 train and 145 val images")
    assert lines[-1] == (
        "s: search of dfkt (7 trials, the best 3 again); final runs of scratch, kd, fsp, dfkt over 2 seeds; 9 epochs each"
    )
    assert main(["distill", *SMALL, "--method=kd", "--epochs=9"]) == 0
    assert "task stage: 9 epochs" in capsys.readouterr().out
    assert os.listdir(empty) == []
