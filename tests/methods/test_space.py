"""Where a search's values come from."""

import json

import optuna
import pytest

from dfkt.config import from_dict, to_dict
from dfkt.errors import ConfigError
from dfkt.methods.space import Draw, Range, Space

COLUMNS = {"rounds": int, "rate": float, "order": str, "soft": bool}


class Asked:
    """A sampler that remembers what it was asked, and always answers with the first or lowest."""

    def __init__(self) -> None:
        self.questions: dict[str, tuple[object, ...]] = {}

    def suggest_categorical(self, name, choices):
        """Return the first choice."""
        self.questions[name] = tuple(choices)
        return choices[0]

    def suggest_int(self, name, low, high, *, log=False):
        """Return the lowest."""
        self.questions[name] = (low, high, log)
        return low

    def suggest_float(self, name, low, high, *, log=False):
        """Return the lowest."""
        self.questions[name] = (low, high, log)
        return low


def drawn(changes):
    """Draw a value of every kind, and return what was asked and what came out."""
    asked = Asked()
    draw = Draw(asked, Space(changes))
    draw.suggest_int("rounds", 1, 3)
    draw.suggest_float("rate", 0.1, 1.0, log=True)
    draw.suggest_categorical("order", ["local", "cumulative"])
    draw.suggest_categorical("soft", (False, True))
    return asked.questions, draw.params


def test_without_changes_everything_is_asked_as_the_method_wants_it():
    questions, params = drawn({})

    assert questions == {
        "rounds": (1, 3, False),
        "rate": (0.1, 1.0, True),
        "order": ("local", "cumulative"),
        "soft": (False, True),
    }
    assert params == {"rounds": 1, "rate": 0.1, "order": "local", "soft": False}


def test_a_single_choice_is_fixed_and_not_asked_for():
    questions, params = drawn({"rounds": (2,), "rate": (0.5,), "order": ("cumulative",), "soft": (True,)})

    assert questions == {}
    assert params == {"rounds": 2, "rate": 0.5, "order": "cumulative", "soft": True}


def test_a_range_replaces_the_methods_and_so_do_several_choices():
    questions, _ = drawn({"rounds": Range(2, 8, log=True), "rate": Range(0.01, 0.02), "order": ("cumulative", "local")})

    assert questions["rounds"] == (2, 8, True)
    assert questions["rate"] == (0.01, 0.02, False)
    assert questions["order"] == ("cumulative", "local")
    assert drawn({"rounds": (1, 3), "rate": (1, 0.5)})[0]["rate"] == (1.0, 0.5)


def test_values_come_out_in_the_type_of_their_column_whatever_a_study_wrote():
    _, params = drawn({"rounds": (2.0,), "rate": (1,), "soft": (1,)})

    assert {name: type(value) for name, value in params.items()} == COLUMNS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": (1.5,)}, "Parameter rounds takes whole numbers, but got 1.5."),
        ({"rounds": (True,)}, "Parameter rounds takes whole numbers, but got True."),
        ({"rounds": Range(1, 2.5)}, "Parameter rounds takes whole numbers, but got 2.5."),
        ({"rate": ("fast",)}, "Parameter rate takes numbers, but got 'fast'."),
        ({"rate": (None,)}, "Parameter rate takes numbers, but got None."),
        ({"order": ("sideways", "local")}, "Parameter order takes some of local, cumulative, but got 'sideways'."),
        ({"order": Range(1, 2)}, "Parameter order takes some of local, cumulative, but got a range."),
    ],
)
def test_values_of_another_type_are_refused_on_one_line(changes, message):
    with pytest.raises(ConfigError) as refused:
        drawn(changes)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.1}, "`rate is searched in a Range or a tuple of choices` must hold, but got given=0.1."),
        ({"rate": ()}, "`rate is searched in a Range or a tuple of choices` must hold, but got given=()."),
    ],
)
def test_a_space_holds_ranges_and_choices(changes, message):
    with pytest.raises(ConfigError) as refused:
        Space(changes)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ((2, 1), "`low <= high, both finite` must hold, but got low=2, high=1."),
        ((0, float("inf")), "`low <= high, both finite` must hold, but got low=0, high=inf."),
        ((0, 1, True), "`low > 0 where the logarithm is drawn` must hold, but got low=0."),
    ],
)
def test_a_range_that_nothing_can_be_drawn_from_is_refused(ends, message):
    with pytest.raises(ConfigError) as refused:
        Range(*ends)
    assert str(refused.value) == message


def test_a_parameter_that_the_method_does_not_have_is_named_with_those_it_has():
    Space({"rate": (0.1,)}).check(COLUMNS)
    with pytest.raises(ConfigError) as refused:
        Space({"rate": (0.1,), "round": (1,)}).check(COLUMNS)
    assert str(refused.value) == "Unknown parameter round in a space; known: rounds, rate, order, soft."


def test_a_space_comes_back_equal_from_json():
    space = Space({"rounds": (1, 2), "rate": Range(0.1, 0.5, log=True), "soft": (True,), "order": ("local",)})

    assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space
    assert from_dict(Space, json.loads(json.dumps(to_dict(space)))) == space


def test_a_draw_takes_optunas_own_trials():
    trial = optuna.trial.FixedTrial({"rounds": 2, "rate": 0.3, "order": "local"})
    draw = Draw(trial, Space({"soft": (True,)}))

    values = [
        draw.suggest_int("rounds", 1, 3),
        draw.suggest_float("rate", 0.1, 1.0, log=True),
        draw.suggest_categorical("order", ("local", "cumulative")),
        draw.suggest_categorical("soft", (False, True)),
    ]

    assert values == [2, 0.3, "local", True]
    assert draw.params == trial.params | {"soft": True}


def test_what_is_noted_is_kept_without_being_asked_for():
    asked = Asked()
    draw = Draw(asked, Space({"rate": (0.1,)}))

    assert draw.note("pattern", "dense-2") == "dense-2"
    assert (draw.params, asked.questions) == ({"pattern": "dense-2"}, {})
    assert (draw.narrows("rate"), draw.narrows("pattern")) == (True, False)
