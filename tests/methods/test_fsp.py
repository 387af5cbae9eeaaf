"""FSP: one flow stage of the group ends."""

from dataclasses import replace

import pytest

from dfkt.errors import ConfigError
from dfkt.methods.dfkt import Dfkt, left_out
from dfkt.methods.fsp import Fsp
from dfkt.networks.taps import StudentTaps

TAPS = StudentTaps(7, (0, 2, 4, 6))


def test_fsp_is_one_stage_of_the_group_ends_then_the_task():
    assert [stage.describe() for stage in Fsp().schedule(30, TAPS)] == [
        "round 1, stage 6: 10 epochs at 0.1: 1 flow[relative] (0,2)x1 (2,4)x1 (4,6)x1",
        "task stage: 20 epochs at 0.1: 1 task",
    ]


def test_group_ends_are_all_kept_by_a_student_deeper_than_its_teacher():
    deep = replace(TAPS, matched=(0, 1, 1, 2, 2, 3, 3))

    assert Fsp().schedule(30, deep) == Fsp().schedule(30, TAPS)
    assert left_out(Fsp(), 30, deep) == set()


def test_fsp_is_dfkt_of_the_group_ends_in_one_joint_stage():
    settings = {"share": 0.2, "flow_rate": 0.03, "rate": 0.2, "norm": "mean", "clip_norm": None}

    assert Fsp(**settings).schedule(30, TAPS) == Dfkt(pattern="group-ends", order="joint", **settings).schedule(
        30, TAPS
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"share": 0.0}, "`0 < share < 1`"),
        ({"norm": "literal"}, "`norm` must be one of relative, unit, mean, sum"),
        ({"clip_norm": 0.0}, "`clip_norm > 0`"),
    ],
)
def test_settings_outside_their_rules_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        Fsp(**setting)


def test_fsp_is_described_by_what_is_searched():
    assert Fsp().describe() == "share 0.3333, flow_rate 0.1, rate 0.1"
