"""Settings and ranges given as texts become values of the right type, or one line that says what fits."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from dfkt.cli.settings import fits, parse_setting, parse_space, with_settings
from dfkt.errors import ConfigError
from dfkt.methods.base import Method
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.fsp import Fsp
from dfkt.methods.kd import Kd
from dfkt.methods.space import Range


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("rate=0.05", 0.05),
        ("rate=1", 1.0),
        ("rate=1e-3", 0.001),
        ("rounds=2", 2),
        ("pattern=dense-2", "dense-2"),
        ("order=local", "local"),
        ("freeze_below=true", True),
        ("freeze_below=False", False),
        ("clip_norm=none", None),
        ("clip_norm=2", 2),
        ("span_weights=[1, 0.5]", [1, 0.5]),
        ("span_weights=[]", []),
        ("pair_weights=[[0, 1, 2.5]]", [[0, 1, 2.5]]),
    ],
)
def test_a_value_has_the_type_of_its_setting(text: str, value: Any) -> None:
    name, read = parse_setting(Dfkt, text)
    assert name == text.partition("=")[0]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense=1", "NAME=VALUE with share, flow_rate.* got 'nonsense=1'"),
        ("rate", "NAME=VALUE .* got 'rate'"),
        ("=1", "NAME=VALUE .* got '=1'"),
        ("name=kd", "NAME=VALUE .* got 'name=kd'"),
        ("rate=", "`rate` of dfkt must be a number, but got ''"),
        ("rate=fast", "`rate` of dfkt must be a number, but got 'fast'"),
        ("rate=true", "`rate` of dfkt must be a number"),
        ("rate=none", "`rate` of dfkt must be a number"),
        ("rounds=1.5", "`rounds` of dfkt must be a whole number, but got '1.5'"),
        ("rounds=x", "`rounds` of dfkt must be a whole number"),
        ("freeze_below=1", "`freeze_below` of dfkt must be true or false"),
        ("order=sideways", "`order` of dfkt must be one of cumulative, local, joint, but got 'sideways'"),
        ("norm=odd", "`norm` of dfkt must be one of .*relative"),
        ("clip_norm=much", "`clip_norm` of dfkt must be a number or none"),
        ("span_weights=5", r"`span_weights` of dfkt must be \[…\] of a number each, but got '5'"),
        ('span_weights=["a"]', "`span_weights` of dfkt must be"),
        (
            "pair_weights=[[0, 1]]",
            r"`pair_weights` .* \[…\] of \[…\] of a whole number and a whole number and a number",
        ),
        ("rate=0", "rate > 0"),
        ("rate=NaN", "rate is finite"),
        ("rate=1e999", "rate is finite"),
        ("share=1", "0 < share < 1"),
        ("rounds=-1", "rounds"),
    ],
)
def test_a_name_a_type_or_a_value_that_does_not_fit_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        with_settings(Dfkt(), [text])
    assert "\n" not in str(raised.value)


def test_settings_that_are_not_given_stay() -> None:
    method = Dfkt(span_weights=(1.0, 2.0), pair_weights=((0, 1, 3.0),), weight=0.5, norm="unit", weights="pair")
    changed = with_settings(method, ["rounds=2", "pattern=dense-2"])
    assert changed == Dfkt(
        span_weights=(1.0, 2.0), pair_weights=((0, 1, 3.0),), weight=0.5, norm="unit", weights="pair",
        rounds=2, pattern="dense-2",
    )  # fmt: skip
    assert with_settings(Kd(weight=0.3), []) == Kd(weight=0.3)


@dataclass(frozen=True, kw_only=True)
class Own(Method):
    """A user's method, with types that no built-in one has."""

    name = "own"
    title: str | None = None
    levels: tuple[Literal["low", "high"], ...] = ()
    extra: object = None

    def schedule(self, epochs: float, taps: Any) -> Any:
        """Return none."""
        return ()


def test_a_users_own_types_are_read_as_well() -> None:
    changed = with_settings(Own(), ["title=Not none", 'levels=["low", "high"]', "extra=3"])
    assert changed == Own(title="Not none", levels=("low", "high"), extra="3")
    with pytest.raises(ConfigError, match="one of low, high each"):
        with_settings(Own(), ['levels=["middle"]'])


def test_truth_values_are_no_numbers() -> None:
    assert not fits(float, True)
    assert not fits(int, False)
    assert not fits(bool, 1)
    assert not fits(tuple[float, ...], [True])


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("rate=0.05..0.2", Range(0.05, 0.2)),
        ("rate=log:1e-3..1", Range(0.001, 1.0, log=True)),
        ("rate=-1..1", Range(-1, 1)),
        ("pattern=dense-2,sliding-3", ("dense-2", "sliding-3")),
        ("rounds=1, 3", (1, 3)),
        ("rounds=2", (2,)),
        ("freeze_below=True,false", (True, False)),
        ("order=local", ("local",)),
    ],
)
def test_a_range_or_choices_are_read(text: str, given: Any) -> None:
    assert parse_space([text]).changes == {text.partition("=")[0]: given}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate", "NAME=LOW..HIGH.* got 'rate'"),
        ("rate=", "NAME=LOW..HIGH.* got 'rate='"),
        ("=1..2", "NAME=LOW..HIGH.* got '=1..2'"),
        ("rate=log:1,2", "NAME=LOW..HIGH.* got 'rate=log:1,2'"),
        ("rate=0.1..", "in numbers, but got 'rate=0.1..'"),
        ("rate=a..b", "in numbers"),
        ("rate=0.5..0.1", "low <= high"),
        ("rate=nan..1", "LOW..HIGH in numbers"),
        ("rate=log:0..1", "low > 0"),
    ],
)
def test_a_range_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_space([text])
    assert "\n" not in str(raised.value)


def test_the_methods_name_is_in_the_message() -> None:
    with pytest.raises(ConfigError, match=r"Settings of fsp are given as NAME=VALUE with .*; but got 'rounds=1'"):
        parse_setting(Fsp, "rounds=1")
