"""From a method's name to its class."""

from dataclasses import dataclass

import pytest

from dfkt.errors import ConfigError
from dfkt.methods.base import Method, searched, task_stage
from dfkt.methods.kd import Kd
from dfkt.methods.registry import METHODS, find_method


@dataclass(frozen=True, kw_only=True)
class Own(Method):
    """A user's method."""

    name = "own"
    rate: float = searched(0.2, 0.1, 0.5)

    def schedule(self, epochs, taps):
        """Return one task stage."""
        return (task_stage(epochs, self.rate),)


class Plain(Own):
    """Lacks the decorator: what it names is no setting."""

    name = "plain"
    weight: float = searched(1.0, 0.1, 10.0)


@dataclass(frozen=True, kw_only=True)
class Nameless(Method):
    """Has no name."""

    def schedule(self, epochs, taps):
        """Return nothing."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Abstract(Method):
    """Has no schedule."""

    name = "abstract"


@dataclass(frozen=True, kw_only=True)
class Typed(Own):
    """Its name and losses are settings by mistake."""

    name: str = "typed"
    losses: tuple[str, ...] = ("task",)


@dataclass(frozen=True, kw_only=True)
class Bare(Own):
    """A setting without a default."""

    name = "bare"
    temperature: float


HERE = __name__


def test_every_built_in_method_is_found_by_its_name():
    assert {name: kind.name for name, kind in METHODS.items()} == {name: name for name in METHODS}
    assert all(find_method(name) is kind for name, kind in METHODS.items())
    assert list(METHODS) == [
        "scratch", "kd", "fitnets", "attention", "layerwise-hint", "similarity", "dkd", "fsp", "dfkt",
    ]  # fmt: skip


def test_a_class_of_ones_own_is_found_by_module_and_name():
    assert find_method(f"{HERE}:Own") is Own
    assert find_method("dfkt.methods.kd:Kd") is Kd


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fitnet", "Unknown method 'fitnet'. Did you mean fitnets? Known: scratch, kd, "),
        ("xyz", "Unknown method 'xyz'. Known: scratch, kd, "),
        ("no_such_module:Own", "Cannot import 'no_such_module:Own': "),
        (f"{HERE}:Missing", f"Cannot import '{HERE}:Missing': "),
        (f"{HERE}:HERE", f"{HERE}:HERE must be a class derived from dfkt.Method, but is '{HERE}'."),
        ("collections:OrderedDict", "collections:OrderedDict must be a class derived from dfkt.Method, but is "),
        (f"{HERE}:Plain", f"{HERE}:Plain must be a dataclass, but lacks @dataclass(frozen=True, kw_only=True)."),
        (f"{HERE}:Nameless", f"{HERE}:Nameless must have a name and a schedule, but lacks one of them."),
        (f"{HERE}:Abstract", f"{HERE}:Abstract must have a name and a schedule, but lacks one of them."),
        (f"{HERE}:Typed", f"{HERE}:Typed must give name, losses without a type, as all its instances have it."),
        (f"{HERE}:Bare", f"Every setting of {HERE}:Bare must have a default, but temperature has none."),
    ],
)
def test_what_is_no_method_is_refused_on_one_line(name, message):
    with pytest.raises(ConfigError) as refused:
        find_method(name)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
