"""Schedules in steps: every stage has one, whatever a search draws, however short the run."""

from itertools import accumulate, pairwise

import optuna
import pytest

from dfkt.errors import ConfigError
from dfkt.methods.base import task_stage
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.registry import METHODS
from dfkt.methods.space import Draw
from dfkt.networks.taps import StudentTaps
from dfkt.training.stages import stage_ends

optuna.logging.set_verbosity(optuna.logging.ERROR)
TAPS = StudentTaps(4, (0, 1, 2, 3))


def rounded(schedule, epoch_steps):
    return [round(epochs * epoch_steps) for epochs in accumulate(stage.epochs for stage in schedule)]


@pytest.mark.parametrize("count", [2, 4, 7])
@pytest.mark.parametrize("epochs", [1, 2, 3.6, 60])
@pytest.mark.parametrize("steps", [5, 20, 391])
def test_stages_of_every_sample_have_a_step_each_and_end_where_they_are_rounded_to(steps, epochs, count):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    taps = StudentTaps(count, (0, count - 1))
    for _ in range(40):
        schedule = Dfkt().sample(Draw(study.ask()), taps).schedule(epochs, taps)
        wanted = rounded(schedule, steps)
        if wanted[-1] < len(schedule):
            with pytest.raises(ConfigError, match=r"Every stage needs a step, but \d+ stages share \d+ steps"):
                stage_ends(schedule, steps)
            continue
        ends = stage_ends(schedule, steps)

        assert all(end > start for start, end in pairwise([0, *ends]))
        assert ends[-1] == wanted[-1] == round(epochs * steps)
        if all(end > start for start, end in pairwise([0, *wanted])):
            assert ends == wanted


def test_stages_shorter_than_a_step_no_longer_vanish():
    """Three rounds of a short and two long stages: 1, 4, 8, 8, 12, 16, 16, … were the ends, and two stages had no step."""
    method = Dfkt(pattern="dense", rounds=3, share=0.1, stage_lengths=(1 / 3, 3.0, 3.0))
    schedule = method.schedule(12, TAPS)
    short = rounded(schedule, 20)

    ends = stage_ends(schedule, 20)

    assert short[:7] == [0, 4, 8, 8, 12, 16, 16]
    assert all(end > start for start, end in pairwise([0, *ends]))
    assert ends[-1] == 240


def test_flow_stages_leave_the_task_a_step_where_they_take_nearly_all():
    schedule = Dfkt(share=0.98).schedule(1, TAPS)

    ends = stage_ends(schedule, 20)

    assert rounded(schedule, 20)[-2:] == [20, 20]  # the task stage had none
    assert ends[-1] == 20
    assert all(end > start for start, end in pairwise([0, *ends]))


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_every_method_fits_as_many_steps_as_it_has_stages_and_no_fewer(kind):
    schedule = kind().schedule(1, TAPS)

    assert stage_ends(schedule, len(schedule)) == list(range(1, len(schedule) + 1))
    if len(schedule) > 1:
        with pytest.raises(ConfigError, match="Take more epochs, a smaller batch, or fewer rounds or stages"):
            stage_ends(schedule, len(schedule) - 1)


def test_a_run_shorter_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="1 stages share 0 steps"):
        stage_ends((task_stage(0.01, 0.1),), 20)
