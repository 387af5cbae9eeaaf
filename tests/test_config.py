"""Every setting: its rule, its name by content, its way through JSON."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from dfkt.config import (
    DataConfig,
    FlowConfig,
    HintConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    StudyConfig,
    TaskConfig,
    TeacherConfig,
    TrainConfig,
    config_key,
    flatten,
    from_dict,
    to_dict,
)
from dfkt.errors import ConfigError, InputError

NAN = math.nan
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (DataConfig, {"name": ""}, "data name is not empty"),
    (DataConfig, {"val_fraction": 0}, "0 < val_fraction < 1"),
    (DataConfig, {"val_fraction": 1}, "0 < val_fraction < 1"),
    (DataConfig, {"val_fraction": NAN}, "0 < val_fraction < 1"),
    (DataConfig, {"image_size": 0}, "image_size >= 1"),
    (DataConfig, {"limit_train": 0}, "limit_train >= 1"),
    (DataConfig, {"limit_test": -1}, "limit_test >= 1"),
    (DataConfig, {"padding": -1}, "padding >= 0"),
    (NetworkConfig, {"name": ""}, "network name is not empty"),
    (NetworkConfig, {"width": 0}, "width > 0"),
    (NetworkConfig, {"width": math.inf}, "width > 0"),
    (NetworkConfig, {"taps": ("stem",)}, "len(taps) >= 2"),
    (NetworkConfig, {"taps": ("stem", "stem")}, "taps differ from each other"),
    (OptimizerConfig, {"lr": 0}, "lr > 0"),
    (OptimizerConfig, {"lr": NAN}, "lr > 0"),
    (OptimizerConfig, {"momentum": 1}, "0 <= momentum < 1"),
    (OptimizerConfig, {"momentum": -0.1}, "0 <= momentum < 1"),
    (OptimizerConfig, {"weight_decay": -1e-4}, "weight_decay >= 0"),
    (OptimizerConfig, {"nesterov": True, "momentum": 0}, "nesterov needs momentum > 0"),
    (FlowConfig, {"rounds": 0}, "rounds >= 1"),
    (FlowConfig, {"share": 0}, "0 < share < 1"),
    (FlowConfig, {"share": 1}, "0 < share < 1"),
    (FlowConfig, {"span_weights": (1.0, -1.0)}, "span_weights >= 0"),
    (FlowConfig, {"pair_weights": ((0, 1, NAN),)}, "pair_weights >= 0"),
    (FlowConfig, {"stage_lengths": (1.0, 0.0)}, "stage_lengths > 0"),
    (TaskConfig, {"kd_weight": 1.1}, "0 <= kd_weight <= 1"),
    (TaskConfig, {"kd_weight": -0.1}, "0 <= kd_weight <= 1"),
    (TaskConfig, {"temperature": 0}, "temperature > 0"),
    (TrainConfig, {"epochs": 0}, "epochs > 0"),
    (TrainConfig, {"epochs": math.inf}, "epochs > 0"),
    (TrainConfig, {"batch_size": 0}, "batch_size >= 1"),
    (TrainConfig, {"seed": -1}, "0 <= seed < 2**63"),
    (TrainConfig, {"clip_norm": 0}, "clip_norm > 0"),
    (TrainConfig, {"checkpoint_every": 0}, "checkpoint_every >= 1"),
    (StudyConfig, {"name": ""}, "study name holds letters"),
    (StudyConfig, {"name": ".hidden"}, "study name holds letters"),
    (StudyConfig, {"name": "a/b"}, "study name holds letters"),
    (StudyConfig, {"name": "s", "trials": -1}, "trials >= 0"),
    (StudyConfig, {"name": "s", "seeds": 0}, "seeds >= 1"),
    (HintConfig, {"share": 1.0}, "0 < share < 1"),
    (HintConfig, {"clip_norm": -1.0}, "clip_norm > 0"),
    (HintConfig, {"soft_weights": (4.0,)}, "soft_weights are two numbers >= 0"),
    (TaskConfig, {"attention_weight": -1.0}, "attention_weight >= 0"),
    (TaskConfig, {"similarity_weight": math.inf}, "similarity_weight >= 0"),
    (TaskConfig, {"decoupled_weights": (1.0, -8.0)}, "decoupled_weights are two numbers >= 0"),
    (TaskConfig, {"warmup": 2.0}, "0 <= warmup <= 1"),
    (StudyConfig, {"name": "s", "reduction_factor": 1}, "reduction_factor >= 2"),
    (StudyConfig, {"name": "s", "max_failures": -1}, "max_failures >= 0"),
    (StudyConfig, {"name": "s", "baselines": ("scratch", "dfkt")}, "baselines leave out the method that is searched"),
]
CHOICES: list[tuple[type, dict[str, Any]]] = [
    (OptimizerConfig, {"schedule": "linear"}),
    (FlowConfig, {"norm": "max"}),
    (FlowConfig, {"order": "reverse"}),
    (TrainConfig, {"precision": "float16"}),
    (RunConfig, {"method": "magic"}),
    (StudyConfig, {"weights": "tap"}),
    (StudyConfig, {"baselines": ("scratch", "magic")}),
    (HintConfig, {"norm": "max"}),
]
FULL = StudyConfig(
    name="full",
    base=RunConfig(
        data=DataConfig(name="folder", image_size=32, limit_train=100, padding=2, flip=False),
        teacher=TeacherConfig(network=NetworkConfig(name="torchvision:resnet18", taps=("conv1", "layer1"))),
        student=NetworkConfig(width=0.5, taps=("stem", "layer1.0", "layer2.0")),
        flow=FlowConfig(
            span_weights=(1.0, 0.5), pair_weights=((0, 1, 0.25), (1, 2, 2.0)), stage_lengths=(1.0, 3.0), order="local"
        ),
        hint=HintConfig(norm="sum", share=0.25, soft_weights=(2.0, 0.5)),
        task=TaskConfig(
            kd_weight=0.5,
            decoupled_weights=(1.0, 2.0),
            optimizer=OptimizerConfig(lr=0.05, schedule="step", nesterov=True),
        ),
        train=TrainConfig(epochs=2.5, clip_norm=1.0, compile=True),
    ),
    baselines=("kd",),
    weights="pair",
)


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
    wrong = value if isinstance(value, str) else value[-1]
    required = {"name": "s"} if kind is StudyConfig else {}

    with pytest.raises(ConfigError, match=rf"`{name}` must be one of \w+, \w+.*, but got '{wrong}'"):
        kind(**required, **values)


@pytest.mark.parametrize(
    "config",
    [FULL, FULL.base, StudyConfig(name="plain"), RunConfig(), TeacherConfig(checkpoint="teacher.pt"), DataConfig()],
    ids=lambda c: type(c).__name__,
)
def test_json_and_back_is_the_same_configuration(config):
    text = json.dumps(to_dict(config))

    assert from_dict(type(config), json.loads(text)) == config


def test_what_a_dict_leaves_out_keeps_its_default():
    assert from_dict(RunConfig, {"train": {"epochs": 3}}) == RunConfig(train=TrainConfig(epochs=3))


def test_unknown_settings_are_refused_at_every_depth_with_the_known_ones():
    with pytest.raises(ConfigError, match="Unknown setting dropout in TrainConfig; known: batch_size, checkpoint"):
        from_dict(RunConfig, {"train": {"epochs": 3, "dropout": 0.5}})
    with pytest.raises(ConfigError, match="Unknown setting lr, speed in RunConfig"):
        from_dict(RunConfig, {"speed": 1, "lr": 2})


def test_a_dict_with_a_value_outside_its_rule_is_refused():
    with pytest.raises(ConfigError, match=re.escape("`epochs > 0` must hold, but got epochs=0")):
        from_dict(RunConfig, {"train": {"epochs": 0}})


def test_the_key_is_stable():
    assert config_key(OptimizerConfig()) == "1395de1a8d27"  # a new key would make every stored run another one
    assert config_key(FULL) == config_key(from_dict(StudyConfig, to_dict(FULL)))
    assert re.fullmatch("[0-9a-f]{12}", config_key(FULL))


def leaves(config: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        deeper = leaves(value, (*path, field.name)) if dataclasses.is_dataclass(value) else [(*path, field.name)]
        found += deeper
    return found


@pytest.mark.parametrize("path", leaves(FULL), ids=".".join)
def test_the_key_sees_every_setting(path):
    changed = to_dict(FULL)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = "something else"  # plain dicts have keys too, and no rules

    assert config_key(FULL) != key_of(changed)
    assert key_of(to_dict(FULL)) == config_key(FULL)


def key_of(values: dict[str, Any]) -> str:
    return config_key(dataclasses.make_dataclass("Bare", list(values))(**values))


@pytest.mark.parametrize("config", [FULL, FULL.base, FULL.base.train, FULL.base.flow.optimizer])
def test_a_configuration_cannot_be_changed(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = config.lr = config.epochs = config.method = 1


def test_flat_names_are_dotted_and_complete():
    flat = flatten(FULL)

    assert flat["base.task.optimizer.lr"] == 0.05
    assert sorted(flat) == sorted(".".join(path) for path in leaves(FULL))
