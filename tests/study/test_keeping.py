"""What of the teacher's answers a study keeps for which runs, and what a user is told of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from study.played import arm, toy

from dfkt.cli.main import main
from dfkt.config import Placement
from dfkt.errors import StudyError
from dfkt.networks.taps import StudentTaps, Tap
from dfkt.study.keeping import check_root, describe, keeping_for
from dfkt.training.targets import MOST_NUMBERS

ADJACENT, DENSE = frozenset({(0, 1), (1, 2)}), frozenset({(0, 1), (0, 2), (1, 2)})
PAIRS = {"dfkt": DENSE, "fsp": ADJACENT, "scratch": frozenset[tuple[int, int]]()}
BOTH = toy("s", arm("scratch"), arm("fsp"), arm("dfkt", 3))
ALONE = toy("s", arm("scratch"), arm("dfkt", 3))
TAPS = StudentTaps(3, (0, 1, 2), (0, 2, 3))


def taps(*channels: int) -> tuple[Tap, ...]:
    return tuple(Tap(f"t{k}", c, 8, 8) for k, c in enumerate(channels))


def test_trials_and_confirmations_keep_the_pairs_of_all_searched_arms() -> None:
    for kind in ("trial", "confirmation"):
        assert keeping_for(BOTH, kind, Placement(), "s", PAIRS).pairs == tuple(sorted(DENSE))
        assert keeping_for(toy("s", arm("fsp", 3), arm("dfkt")), kind, Placement(), "s", PAIRS).pairs == tuple(
            sorted(ADJACENT)
        )


def test_final_runs_keep_pairs_where_another_arm_can_read_them() -> None:
    assert keeping_for(BOTH, "final", Placement(), "s", PAIRS).pairs == tuple(sorted(DENSE))
    assert keeping_for(ALONE, "final", Placement(), "s", PAIRS).pairs == ()


def test_studies_keep_theirs_apart_in_one_folder_under_one_budget() -> None:
    placement = Placement(target_root="/here", keep_targets=7)
    found = [
        keeping_for(replace(BOTH, name=name), "trial", placement, f"/results/{name}", PAIRS) for name in ("a", "b")
    ]
    assert [(keeping.root, keeping.budget) for keeping in found] == [("/here", 7)] * 2
    assert len({keeping.study for keeping in found}) == 2
    assert keeping_for(BOTH, "trial", replace(placement, keep_targets=0), "s", PAIRS) is None


def test_how_large_it_is_is_said_on_one_line() -> None:
    told = describe(BOTH, TAPS, taps(16, 99, 32, 64), PAIRS, 45_000)
    assert told.startswith(
        "the teacher's FSP matrices of 3 flow pairs are 3,584 numbers an image, 0.65 GB an epoch or less: kept"
    )
    told = describe(BOTH, TAPS, taps(64, 99, 128, 256), PAIRS, 45_000)
    assert f"57,344 numbers an image, more than the {MOST_NUMBERS:,} that are worth keeping: they are computed" in told
    assert describe(toy("s", arm("scratch")), TAPS, (), {}, 45_000) == ""


def test_a_folder_that_cannot_be_written_is_refused_unless_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    placement = Placement(target_root=str(tmp_path / "file" / "below"))
    with pytest.raises(StudyError, match=r"folder for kept targets must be writable, but .* --keep-targets 0"):
        check_root(placement)
    with pytest.raises(StudyError, match="each host's own disk"):
        check_root(Placement(target_root="s3://bucket/targets"))
    check_root(replace(placement, keep_targets=0))
    check_root(Placement(target_root=str(tmp_path / "a" / "b")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ["", "much", "-1", "20 gigs", "1e3GB", "٣GB", "GB"])
def test_a_budget_that_is_no_size_is_refused(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["study", f"--keep-targets={text}", "--results", str(tmp_path / "r")])
    assert "a size such as 20GB, 500MB or 0 is wanted" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
