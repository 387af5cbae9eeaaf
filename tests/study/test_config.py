"""A study and its arms refuse what breaks a rule; an ablation is its parent's winner with one change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from study.played import arm, toy

from dfkt.config import TrainConfig, config_key, from_dict, key_dict, to_dict
from dfkt.errors import ConfigError
from dfkt.methods.dfkt import Dfkt
from dfkt.methods.fsp import Fsp
from dfkt.methods.kd import Kd
from dfkt.methods.scratch import Scratch
from dfkt.methods.space import Range, Space
from dfkt.study.config import ABLATIONS, ArmConfig, StudyConfig, ablations, default_arms

BAD = [
    (lambda: arm(""), "arm name .* name=''"),
    (lambda: arm("a/b"), "arm name .* name='a/b'"),
    (lambda: arm(".hidden"), r"arm name .* name='\.hidden'"),
    (lambda: arm("ä"), "arm name .* name='ä'"),
    (lambda: arm("a", -1), "trials >= 0.* trials=-1"),
    (lambda: arm("a", 1.5), "trials >= 0.* trials=1.5"),  # type: ignore[arg-type]
    (lambda: arm("a", epochs=0), "0 < epochs <= 1e6.*epochs=0"),
    (lambda: arm("a", 2, parent="dfkt"), "an ablation has no trials.* trials=2"),
    (lambda: arm("a", change={"rounds": 1}), "a change needs a parent.*rounds"),
    (lambda: toy("../up"), r"study name .* name='\.\./up'\. Choose one with --name"),
    (lambda: toy("x" * 101), "study name holds at most 100"),
    (lambda: toy(""), "study name .* name=''"),
    (lambda: toy(seeds=0), "seeds >= 1.* seeds=0"),
    (lambda: toy(search_seed=-1), "search_seed >= 0.* search_seed=-1"),
    (lambda: toy(reduction_factor=1), "reduction_factor >= 2.* reduction_factor=1"),
    (lambda: toy(max_failures=-1), "max_failures >= 0.* max_failures=-1"),
    (lambda: StudyConfig(name="s", arms=()), r"a study has an arm.* arms=\[\]"),
    (lambda: toy("s", arm("a"), arm("a")), r"different names.* arms=\['a', 'a'\]"),
    (lambda: toy("s", arm("a", parent="dfkt")), "parent stands before it.* parent='dfkt'.* Add that arm"),
    (lambda: toy("s", arm("a", parent="dfkt"), arm("dfkt", 1)), "parent stands before it"),
    (lambda: toy("s", arm("a", parent="a")), "parent stands before it"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_breaks_a_rule_is_refused_with_rule_and_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_an_ablation_changes_what_it_says_and_nothing_else(name: str) -> None:
    winner = Dfkt(
        pattern="dense-2", order="local", freeze_below=True, rounds=3, share=0.5, rate=0.2, weight=0.5,
        span_weights=(2.0,), pair_weights=((0, 1, 3.0),),
    )  # fmt: skip
    (one,) = ablations(arm("dfkt", 2), [name])
    old, new = to_dict(winner), to_dict(one.of(winner))
    assert (one.name, one.parent, one.trials) == (f"dfkt-{name}", "dfkt", 0)
    changed = {n: value for n, value in new.items() if value != old[n]}
    assert changed == {n: list(v) if isinstance(v, tuple) else v for n, v in ABLATIONS[name].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"turns": 2}, "turns"), ({"rounds": -1}, "rounds"), ({"norm": "odd"}, "norm"), ({"rate": "fast"}, "rate")],
)
def test_a_change_that_the_method_cannot_take_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arm("a", parent="dfkt", change=change).of(Dfkt())


def test_an_arms_run_has_the_arms_length_and_a_final_run_a_seed_of_its_own() -> None:
    config = toy("s", arm("scratch"), arm("long", epochs=7), train=TrainConfig(epochs=3, seed=4))
    short, long = config.arms
    assert (config.run(short, Scratch()).train.epochs, config.run(long, Scratch()).train.epochs) == (3, 7)
    assert (config.run(short, Scratch()).train.seed, config.run(long, Scratch(), 9).train.seed) == (4, 9)
    final = config.run(long, Kd(), 9)
    assert replace(final, train=replace(final.train, seed=4)) == config.run(long, Kd())


def test_a_study_of_one_method_has_the_usual_baselines_and_not_itself_twice() -> None:
    def named(**given: Any) -> list[tuple[str, int]]:
        return [(one.name, one.trials) for one in default_arms(**given)]

    assert named() == [("scratch", 0), ("kd", 0), ("fsp", 0), ("dfkt", 40)]
    assert named(searched=Kd(), trials=3) == [("scratch", 0), ("fsp", 0), ("kd", 3)]
    assert named(searched=Fsp(), baselines=()) == [("fsp", 40)]
    assert [one.name for one in StudyConfig(name="s").searched] == ["dfkt"]


def test_a_study_survives_json() -> None:
    space = Space({"rate": Range(0.1, 0.2), "pattern": ("dense", "adjacent")})
    config = toy("s", arm("dfkt", 3, space=space, epochs=5), *ablations(arm("dfkt", 3), ["equal-weights", "joint"]))
    back = from_dict(StudyConfig, to_dict(config))
    assert to_dict(back) == to_dict(config)
    assert isinstance(back.arms[0], ArmConfig)
    assert back.arms[0].space == space


def test_trials_seeds_and_restarts_can_change_without_making_another_study() -> None:
    config = toy("s", arm("dfkt", 3))
    assert key_dict(toy("s", arm("dfkt", 5), seeds=9, max_failures=0)) == key_dict(config)
    others = [toy("s", arm("dfkt", 3), reduction_factor=4), toy("s", arm("dfkt", 3, epochs=4)), toy("s", arm("dfkt-x"))]
    assert all(config_key(other) != config_key(config) for other in others)
