"""Training from scratch."""

from dfkt.methods.registry import METHODS
from dfkt.methods.scratch import Scratch
from dfkt.networks.taps import StudentTaps


def test_scratch_is_one_task_stage_and_the_only_method_without_a_teacher():
    (stage,) = Scratch().schedule(30, StudentTaps.of(()))

    assert stage.describe() == "task stage: 30 epochs at 0.1: 1 task"
    assert not stage.reads_teacher
    assert [kind for kind in METHODS.values() if not kind.taught] == [Scratch]
    assert Scratch().describe() == "rate 0.1"
