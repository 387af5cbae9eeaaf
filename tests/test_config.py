"""Every setting: its rule, its name by content, its way through JSON."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from dfkt.config import (
    AS_KEY,
    IF_GIVEN,
    NO_KEY,
    DataConfig,
    NetworkConfig,
    OptimizerConfig,
    Placement,
    TeacherConfig,
    TrainConfig,
    check_choice,
    check_rule,
    config_key,
    flatten,
    from_dict,
    is_finite,
    key_dict,
    to_dict,
)
from dfkt.errors import ConfigError, InputError

NAN = math.nan
OWN = {"checkpoint": "own.pt"}
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (DataConfig, {"name": ""}, "data name is not empty"),
    (DataConfig, {"val_fraction": 0}, "0 < val_fraction < 1"),
    (DataConfig, {"val_fraction": 1}, "0 < val_fraction < 1"),
    (DataConfig, {"val_fraction": NAN}, "0 < val_fraction < 1"),
    (DataConfig, {"image_size": 0}, "1 <= image_size <= 4096"),
    (DataConfig, {"limit_train": 0}, "1 <= limit_train"),
    (DataConfig, {"limit_test": -1}, "1 <= limit_test"),
    (DataConfig, {"padding": -1}, "0 <= padding <= 4096"),
    (NetworkConfig, {"name": ""}, "network name is not empty"),
    (NetworkConfig, {"width": 0}, "0 < width <= 64"),
    (NetworkConfig, {"width": math.inf}, "0 < width <= 64"),
    (NetworkConfig, {"taps": ("stem",)}, "len(taps) >= 2"),
    (NetworkConfig, {"taps": ("stem", "stem")}, "taps differ from each other"),
    (OptimizerConfig, {"momentum": 1}, "0 <= momentum < 1"),
    (OptimizerConfig, {"momentum": -0.1}, "0 <= momentum < 1"),
    (OptimizerConfig, {"weight_decay": -1e-4}, "weight_decay >= 0"),
    (OptimizerConfig, {"weight_decay": NAN}, "weight_decay >= 0"),
    (OptimizerConfig, {"nesterov": True, "momentum": 0}, "nesterov needs momentum > 0"),
    (TrainConfig, {"epochs": 0}, "0 < epochs <= 1e6"),
    (TrainConfig, {"epochs": math.inf}, "0 < epochs <= 1e6"),
    (TrainConfig, {"batch_size": 0}, "batch_size >= 1"),
    (TrainConfig, {"seed": -1}, "0 <= seed < 2**63"),
    (TrainConfig, {"seed": 2**63}, "0 <= seed < 2**63"),
    (TrainConfig, {"clip_norm": 0}, "clip_norm > 0"),
    (TeacherConfig, {"rate": 0}, "rate > 0"),
    (TeacherConfig, {"rate": NAN}, "rate > 0"),
    (TeacherConfig, {"mean": (0.5,)}, "a teacher's mean and std come together"),
    (TeacherConfig, OWN | {"std": (0.5,)}, "a teacher's mean and std come together"),
    (
        TeacherConfig,
        {"mean": (0.5,), "std": (0.5,), "checkpoint": None},
        "a teacher's mean and std need a checkpoint",
    ),
    *(
        (TeacherConfig, OWN | {"std": (0.5,), "mean": mean}, "0 <= mean <= 1")
        for mean in ((), (0.5, NAN), (123.7,), (-0.1,))
    ),
    *((TeacherConfig, OWN | {"mean": (0.5,), "std": std}, "std > 0") for std in ((), (0.5, 0), (math.inf,), (-1,))),
    (Placement, {"checkpoint_every": 0}, "checkpoint_every >= 1"),
    (Placement, {"threads": 0}, "threads >= 1"),
    (Placement, {"device": "tpu"}, "device is cpu, cuda or cuda:N"),
]
CHOICES: list[tuple[type, dict[str, str]]] = [
    (OptimizerConfig, {"schedule": "linear"}),
    (TrainConfig, {"precision": "float16"}),
]
TEACHER = TeacherConfig(
    network=NetworkConfig(name="torchvision:resnet18", taps=("maxpool", "layer1.0")),
    checkpoint="teacher.pt",
    rate=0.05,
    mean=(0.485, 0.456, 0.406),
    std=(0.25,),
    train=TrainConfig(epochs=2.5, clip_norm=1.0, optimizer=OptimizerConfig(schedule="step", nesterov=True)),
)
FULL = [
    DataConfig(name="/images/pets", image_size=32, limit_train=100, padding=2, flip=False),
    TEACHER,
    TEACHER.train,
    Placement(data_root="/data", threads=4, device="cuda:1"),
    DataConfig(),
]


def shown(**values: Any) -> str:
    name, value = next(reversed(values.items()))
    return f"{name}={value!r}"


@pytest.mark.parametrize(("kind", "values", "rule"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_value_outside_its_rule_is_refused_with_rule_and_value(kind, values, rule):
    with pytest.raises(ConfigError) as error:
        kind(**values)

    assert f"`{rule}" in str(error.value)
    assert shown(**values) in str(error.value)
    assert isinstance(error.value, InputError)


@pytest.mark.parametrize(("kind", "values"), CHOICES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_an_unknown_choice_is_refused_with_the_known_ones(kind, values):
    name, value = next(iter(values.items()))

    with pytest.raises(ConfigError, match=rf"`{name}` must be one of \w+, \w+.*, but got '{value}'"):
        kind(**values)


def test_a_rule_says_itself_its_values_and_the_remedy():
    check_rule(True, "never shown", a=1)
    check_choice("kind", 2, (1, 2))
    with pytest.raises(ConfigError) as error:
        check_rule(False, "a < b", "Swap them.", a=2, b="one")
    assert str(error.value) == "`a < b` must hold, but got a=2, b='one'. Swap them."


def test_only_finite_numbers_are_finite():
    assert [is_finite(value) for value in (0, -1.5, 2**70)] == [True] * 3
    assert [is_finite(value) for value in (NAN, math.inf, True, "1", None)] == [False] * 5


@pytest.mark.parametrize("config", FULL, ids=lambda c: type(c).__name__)
def test_json_and_back_is_the_same_configuration(config):
    text = json.dumps(to_dict(config))

    assert from_dict(type(config), json.loads(text)) == config


def test_what_a_dict_leaves_out_keeps_its_default():
    assert from_dict(TeacherConfig, {"train": {"epochs": 3}}) == TeacherConfig(train=TrainConfig(epochs=3))


def test_unknown_settings_are_refused_at_every_depth_with_the_known_ones():
    with pytest.raises(ConfigError, match="Unknown setting dropout in TrainConfig; known: batch_size, clip_norm"):
        from_dict(TeacherConfig, {"train": {"epochs": 3, "dropout": 0.5}})
    with pytest.raises(ConfigError, match="Unknown setting lr, speed in TeacherConfig"):
        from_dict(TeacherConfig, {"speed": 1, "lr": 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"epochs": 0}}, "`0 < epochs <= 1e6` must hold, but got epochs=0"),
        ({"train": {"batch_size": "many"}}, "A setting of TrainConfig has a value of another type"),
        ([1, 2], "TeacherConfig must be given by its settings, but got [1, 2]"),
    ],
)
def test_a_dict_with_a_value_outside_its_rule_is_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_dict(TeacherConfig, values)


def test_the_key_is_stable():
    assert config_key(OptimizerConfig()) == "00f78f65a48c"  # a new key would make every stored run another one
    assert config_key(TeacherConfig()) == "5c17468125b9"  # nor may settings that came later change one
    assert config_key(TEACHER) == config_key(from_dict(TeacherConfig, json.loads(json.dumps(to_dict(TEACHER)))))
    assert re.fullmatch("[0-9a-f]{12}", config_key(TEACHER))


def leaves(config: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        found += leaves(value, (*path, each.name)) if dataclasses.is_dataclass(value) else [(*path, each.name)]
    return found


CHANGED = {float: 0.5, int: 7, str: "step", bool: True, tuple: ("conv1", "layer2"), type(None): 5}
OTHER = {"mean": (0.5,), "std": (0.5,), "precision": "float64", "crop": "padded", "momentum": 0.3, "nesterov": False}


def with_another(config: Any, path: tuple[str, ...]) -> Any:
    """Return a configuration with another value of one setting."""
    name, *below = path
    value = getattr(config, name)
    if below:
        return replace(config, **{name: with_another(value, tuple(below))})
    if name == "pretrained":  # which a checkpoint leaves no place for
        return replace(config, pretrained="own", checkpoint=None)
    new = OTHER.get(name, CHANGED[type(value)])
    if new == value:
        new = "constant" if isinstance(value, str) else not value if isinstance(value, bool) else 2 * value
    return replace(config, **{name: new})


@pytest.mark.parametrize("path", leaves(TEACHER) + leaves(FULL[0]), ids=".".join)
def test_the_key_sees_every_setting_but_those_that_say_otherwise(path):
    config = TEACHER if path in leaves(TEACHER) else FULL[0]
    other = with_another(config, path)

    assert other != config
    assert (config_key(other) == config_key(config)) == (path == ("checkpoint",))


def test_a_folder_of_images_counts_by_its_last_name_and_a_known_set_by_its_own():
    keys = [config_key(DataConfig(name=name)) for name in ("/here/pets", "/there/pets", "pets/", "~/dogs", "digits")]

    assert len(set(keys)) == 3
    assert keys[0] == keys[1] == keys[2]
    assert to_dict(DataConfig(name="/here/pets"))["name"] == "/here/pets"


@dataclass(frozen=True)
class Odd:
    """Says for itself what counts."""

    shown: int = 1
    hidden: int = field(default=2, metadata=NO_KEY)
    halved: int = field(default=8, metadata={AS_KEY: lambda value: value // 2})
    later: int | None = field(default=None, metadata=IF_GIVEN)

    def json_head(self) -> dict[str, Any]:
        """Return what stands before the fields."""
        return {"name": "odd"}


@dataclass(frozen=True)
class Own:
    """Has a form of its own."""

    value: int = 3

    def to_json(self) -> int:
        """Return the form."""
        return self.value

    @classmethod
    def from_json(cls, value: Any) -> "Own":
        """Read the form."""
        return cls(value["value"])


def test_fields_and_classes_may_say_what_they_count_as_and_look_like():
    assert to_dict(Odd()) == {"name": "odd", "shown": 1, "hidden": 2, "halved": 8, "later": None}
    assert key_dict(Odd()) == {"name": "odd", "shown": 1, "hidden": None, "halved": 4}
    assert key_dict(Odd(later=0))["later"] == 0
    assert to_dict({"list": [Own(), Odd()], 5: (1, None)}) == {"list": [3, to_dict(Odd())], "5": [1, None]}
    assert from_dict(Own, {"value": 9}) == Own(9)


@pytest.mark.parametrize("config", FULL, ids=lambda c: type(c).__name__)
def test_a_configuration_cannot_be_changed(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = 1


def test_flat_names_are_dotted_and_complete():
    flat = flatten(TEACHER)

    assert flat["train.optimizer.schedule"] == "step"
    assert sorted(flat) == sorted(".".join(path) for path in leaves(TEACHER))


def test_a_whole_number_counts_the_same_as_the_same_number_with_a_point():
    assert config_key(TrainConfig(epochs=60)) == config_key(TrainConfig(epochs=60.0))
    assert config_key(TrainConfig(epochs=60)) != config_key(TrainConfig(epochs=60.5))
