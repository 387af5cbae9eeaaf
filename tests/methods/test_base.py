"""What a method is: settings with ranges, terms, stages."""

import json
from dataclasses import dataclass, replace
from typing import Any

import optuna
import pytest
import torch
import torch.nn.functional as F

from dfkt.config import config_key, from_dict, to_dict
from dfkt.errors import ConfigError
from dfkt.methods.base import Features, Method, Ramp, Stage, TaskTerm, Term, searched, task_stage
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.hints import HintTerm
from dfkt.methods.kd import Kd, SoftTerm
from dfkt.methods.registry import METHODS
from dfkt.methods.space import Draw, Range, Space
from dfkt.networks.taps import StudentTaps

optuna.logging.set_verbosity(optuna.logging.ERROR)
TAPS = StudentTaps(4, (0, 1, 3))
every_method = pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)


@dataclass(frozen=True, kw_only=True)
class Own(Method):
    """A method with a searched number, a searched whole number and a setting that is not searched."""

    name = "own"
    losses = ("task", "soft")
    rate: float = searched(0.1, 0.02, 0.5, log=True)
    times: int = searched(2, 1, 4)
    style: str = "plain"

    def schedule(self, epochs, taps):
        """Return as many task stages as ``times``."""
        return (task_stage(epochs / self.times, self.rate),) * self.times


def random_draws(method, count, taps=TAPS, space=None):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        draw = Draw(study.ask(), space)
        yield method.sample(draw, taps), draw.params


def test_what_is_marked_is_searched_in_its_range_and_all_else_stays():
    base = Own(style="fancy")
    drawn = list(random_draws(base, 200))

    assert Own.ranges() == {"rate": Range(0.02, 0.5, True), "times": Range(1, 4)}
    assert base.columns(TAPS) == {"rate": float, "times": int}
    assert {method.times for method, _ in drawn} == {1, 2, 3, 4}
    assert all(0.02 <= method.rate <= 0.5 for method, _ in drawn)
    assert min(method.rate for method, _ in drawn) < 0.04 < 0.25 < max(method.rate for method, _ in drawn)
    assert {method.style for method, _ in drawn} == {"fancy"}
    assert all(params == {"rate": method.rate, "times": method.times} for method, params in drawn)


def test_a_search_starts_from_the_settings_as_they_stand():
    assert Own(rate=0.3, times=4).starts(TAPS) == ({"rate": 0.3, "times": 4},)


def test_a_space_narrows_what_is_drawn():
    space = Space({"rate": (0.3,), "times": Range(2, 3)})

    assert {(method.rate, method.times) for method, _ in random_draws(Own(), 50, space=space)} == {(0.3, 2), (0.3, 3)}


@every_method
def test_a_method_comes_back_equal_from_json(kind):
    for method in (kind(), *(method for method, _ in random_draws(kind(), 10))):
        assert from_dict(Method, json.loads(json.dumps(to_dict(method)))) == method


def test_a_class_of_ones_own_is_named_by_its_module():
    method = Own(times=3)
    values = json.loads(json.dumps(to_dict(method)))

    assert values == {"name": f"{__name__}:Own", "rate": 0.1, "times": 3, "style": "plain"}
    assert from_dict(Method, values) == method


def test_a_class_that_no_other_process_could_import_is_refused_with_the_remedy():
    @dataclass(frozen=True, kw_only=True)
    class Hidden(Own):
        name = "hidden"

    with pytest.raises(ConfigError, match=r"a class of a module.*<locals>\.Hidden'\. Put it into a module\."):
        to_dict(Hidden())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.1}, r"A method must have a name, but got {'rate': 0\.1}\."),
        ({"name": "kd", "speed": 1}, r"Unknown setting speed in Kd; known: rate, temperature, weight\."),
        ({"name": "kd", "rate": -1.0}, "`rate is finite and >= 0` must hold, but got rate=-1.0"),
        ({"name": "dfkt", "temperature": "hot"}, "A setting of Dfkt has a value of another type"),
    ],
)
def test_json_that_is_no_method_is_refused_on_one_line(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Method, values)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rate": float("nan")}, "rate is finite and >= 0"),
        ({"rate": float("inf")}, "rate is finite and >= 0"),
        ({"rate": -0.1}, "rate is finite and >= 0"),
        ({"rate": 0.0}, "`rate > 0` must hold, but got rate=0.0"),
        ({"rate": "fast"}, "rate is a number"),
        ({"rate": None}, "rate is a number"),
        ({"times": 2.0}, "times is a whole number"),
        ({"times": True}, "times is a whole number"),
    ],
)
def test_settings_are_finite_numbers_of_their_kind(setting, message):
    with pytest.raises(ConfigError, match=message):
        Own(**setting)


@every_method
def test_every_number_of_a_built_in_method_is_checked(kind):
    for name in kind.ranges():
        for wrong in (float("nan"), -1.0, "1"):
            with pytest.raises(ConfigError, match=name):
                kind(**{name: wrong})


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        ((2.0, 0.1, 1.0), "`low <= default <= high` must hold, but got low=0.1, default=2.0, high=1.0"),
        ((1, 0.5, 2.0), "both ends of a whole number are whole.*Write 1.0 for a fraction"),
        ((1.0, 2.0, 0.5), "low <= default <= high"),
    ],
)
def test_a_range_that_does_not_fit_its_default_is_refused_where_it_stands(marked, message):
    with pytest.raises(ConfigError, match=message):
        searched(*marked)


@every_method
def test_every_searched_setting_changes_the_schedule_or_the_rate(kind):
    start = kind().schedule(30, TAPS)
    for name, drawn in kind.ranges().items():
        assert replace(kind(), **{name: drawn.low}).schedule(30, TAPS) != start, name


@every_method
def test_every_method_spends_the_same_epochs_and_names_its_losses(kind):
    method = kind()
    schedule = method.schedule(30, TAPS)

    assert sum(stage.epochs for stage in schedule) == pytest.approx(30)
    assert schedule[-1].phase == "task"
    assert {term.name for stage in schedule for term in stage.terms} <= set(kind.losses)
    assert any(stage.reads_teacher for stage in schedule) == kind.taught
    assert any(stage.taps for stage in schedule) == kind.tapped


@every_method
def test_only_flow_and_hints_need_channels_to_agree(kind):
    for stage in kind().schedule(30, TAPS):
        assert stage.adapted_taps == (stage.taps if stage.phase in ("flow", "hint") else ())


@every_method
def test_every_draw_is_described_on_one_short_line(kind):
    for method, params in random_draws(kind(), 20):
        text = method.describe()
        assert 0 < len(text) < 130
        assert "\n" not in text
        assert kind is Dfkt or text == ", ".join(f"{name} {value:.4g}" for name, value in params.items())


def test_what_a_result_does_not_depend_on_is_not_in_the_key():
    assert config_key(Dfkt(weights="pair")) == config_key(Dfkt())
    assert config_key(Dfkt(rounds=2)) != config_key(Dfkt())
    assert config_key(Kd(rate=0.2)) != config_key(Kd())


def test_a_ramp_goes_from_its_start_to_its_end_and_stays():
    assert [Ramp(0, 1, 0.25).at(done) for done in (0, 0.125, 0.25, 0.9)] == [0, 0.5, 1, 1]
    assert Ramp(0, 1, 0.0).at(0) == 1  # no first part: the end from the start
    assert [TaskTerm(weight=weight).weight_at(0.5) for weight in (3.0, Ramp(4, 1))] == [3.0, 2.5]
    assert [str(Ramp(4, 1)), str(Ramp(0, 1, 0.25))] == ["4->1", "0->1 in 0.25 of it"]


def features(**values: Any) -> Features:
    return Features({}, **values)


def test_the_task_is_cross_entropy_of_the_student_in_at_least_float32():
    labels, logits = torch.tensor([1, 0]), torch.tensor([[0.5, 2.0], [1.0, -1.0]])

    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        found = TaskTerm()(features(), features(logits=logits.to(dtype)), labels)
        assert found.dtype == wide
        torch.testing.assert_close(found, F.cross_entropy(logits.to(wide), labels))


def test_a_stage_says_what_its_terms_read():
    stage = Stage(
        phase="hint",
        epochs=1,
        terms=(HintTerm(taps=(3, 1), norm="mean"), SoftTerm(temperature=2.0), HintTerm(taps=(2,), norm="sum")),
        rate=0.1,
        tap=3,
        frozen_below=1,
    )

    assert stage.taps == stage.adapted_taps == (1, 2, 3)
    assert (stage.needs("student_logits"), stage.needs("teacher_logits"), stage.reads_teacher) == (True, True, True)
    assert stage.describe() == (
        "hint stage 3: 1 epochs at 0.1, frozen below tap 1: 1 hint[mean] at 3 1 + 1 soft[T=2] + 1 hint[sum] at 2"
    )


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ({"phase": "task"}, "task stage"),
        ({"phase": "hint", "tap": 3}, "hint stage 3"),
        ({"phase": "flow", "round": 2, "tap": 1}, "round 2, stage 1"),
        ({"phase": "relation", "tap": 2}, "relation stage 2"),
    ],
)
def test_a_stage_has_a_name_for_messages(place, name):
    assert Stage(epochs=1, terms=(TaskTerm(),), rate=0.1, **place).name == name


def test_a_term_and_a_method_without_their_functions_cannot_be_made():
    for kind in (Term, Method):
        with pytest.raises(TypeError, match="abstract"):
            kind()
