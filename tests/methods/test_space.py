"""The search space: every sample is a run that can be trained."""

import warnings
from dataclasses import replace
from typing import Any

import optuna
import pytest

from dfkt.config import METHODS, FlowConfig, HintConfig, NetworkConfig, OptimizerConfig, RunConfig, TaskConfig
from dfkt.methods.builders import baseline, build_schedule
from dfkt.methods.patterns import flow_pairs
from dfkt.methods.space import MAX_ROUNDS, ORDERS, RANGES, Params, SearchSpace, describe_params, resolve
from dfkt.methods.terms import FlowTerm

optuna.logging.set_verbosity(optuna.logging.ERROR)
TAPS = (2, 3, 4, 10)
SPACES = [pytest.param(SearchSpace(taps, mode), id=f"{taps} {mode}") for taps in TAPS for mode in ("span", "pair")]
BASE = RunConfig(student=NetworkConfig(name="resnet8", width=0.25), task=TaskConfig(temperature=7.0))


def samples(space: SearchSpace, count: int) -> list[tuple[Params, optuna.trial.Trial]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(count)]
    return [(space(trial), trial) for trial in trials]


def weights_of(config: RunConfig, num_taps: int) -> dict[tuple[int, int], float]:
    weights = {}
    for stage in build_schedule(config, num_taps, (0, num_taps - 1)):
        for term in stage.terms:
            if isinstance(term, FlowTerm):
                weights |= dict(zip(term.pairs, term.weights, strict=True))
    return weights


@pytest.mark.parametrize("space", SPACES)
def test_every_sample_is_a_valid_run_with_the_tables_columns(space):
    types = space.types()
    seen: set[str] = set()
    for params, trial in samples(space, 150):
        config = resolve(params, BASE)
        schedule = build_schedule(config, space.num_taps, (0, space.num_taps - 1))

        assert sum(stage.epochs for stage in schedule) == pytest.approx(BASE.train.epochs)
        assert schedule[-1].phase == "task"
        assert all(stage.phase == "flow" for stage in schedule[:-1])
        assert len(schedule) > 1
        assert {name: type(value) for name, value in params.items()} == {name: types[name] for name in params}
        assert trial.params == {name: value for name, value in params.items() if name != "pattern"}
        assert describe_params(params).startswith(params["pattern"])
        assert set(weights_of(config, space.num_taps)) == set(flow_pairs(params["pattern"], space.num_taps))
        seen |= params.keys()
    if space.num_taps == 4:
        assert seen == set(types)
    else:
        assert seen <= set(types)


@pytest.mark.parametrize("space", SPACES)
def test_the_starting_point_lies_in_the_space_and_is_all_that_is_asked(space):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(space.start())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of a value outside its range
        params = space(study.ask())

    assert {name: value for name, value in params.items() if name != "pattern"} == space.start()
    run = resolve(params, BASE)
    assert set(weights_of(run, space.num_taps).values()) == {1.0}
    assert run.flow.rounds == 1
    assert run.flow.order == "cumulative"
    assert not run.flow.freeze_below
    assert len(weights_of(run, space.num_taps)) == space.num_taps * (space.num_taps - 1) // 2


def conditions(params: Params, space: SearchSpace) -> dict[str, bool]:
    """Say of every conditional parameter whether it must be there."""
    pairs = flow_pairs(params["pattern"], space.num_taps)
    tops = {j for _, j in pairs}
    spans = {j - i for i, j in pairs}
    frozen = any(min(i for i, j in pairs if j == top) > 0 for top in tops)
    several = len(tops) > 1
    there = {
        "dense_span": params["family"] == "dense",
        "sliding_span": params["family"] == "sliding",
        "order": several,
        "rounds": several,
        "freeze_below": several and params.get("order") == "local" and frozen,
        "kd_weight": params["soft_targets"],
        "temperature": params["soft_targets"],
    }
    there |= {f"length_{k}": several and k in tops for k in range(1, space.num_taps)}
    if space.weights == "span":
        return there | {f"weight_span_{s}": len(spans) > 1 and s in spans for s in range(1, space.num_taps)}
    every = [(i, j) for j in range(space.num_taps) for i in range(j)]
    return there | {f"weight_{i}_{j}": len(pairs) > 1 and (i, j) in pairs for i, j in every}


@pytest.mark.parametrize("space", SPACES)
def test_a_parameter_is_there_exactly_where_it_has_a_meaning(space):
    for params, _ in samples(space, 100):
        for name, there in conditions(params, space).items():
            assert (name in params) == there, (name, params)


@pytest.mark.parametrize("space", SPACES)
def test_sampled_weights_end_up_at_their_pairs(space):
    for params, _ in samples(space, 100):
        for (i, j), weight in weights_of(resolve(params, BASE), space.num_taps).items():
            name = f"weight_span_{j - i}" if space.weights == "span" else f"weight_{i}_{j}"
            assert weight == params.get(name, 1.0)


def test_sampled_lengths_and_rates_end_up_at_their_stages():
    space = SearchSpace(4)
    for params, _ in samples(space, 100):
        config = resolve(params, BASE)
        flow = [stage for stage in build_schedule(config, 4, (0, 3)) if stage.phase == "flow"]
        lengths = [params.get(f"length_{stage.tap}", 1.0) for stage in flow]
        total = params["flow_share"] * BASE.train.epochs

        assert [stage.epochs for stage in flow] == pytest.approx([total * n / sum(lengths) for n in lengths])
        assert {stage.optimizer.lr for stage in flow} == {params["flow_lr"]}
        assert config.task.optimizer.lr == params["task_lr"]
        assert config.task.kd_weight == params.get("kd_weight", 0.0)


def test_names_of_many_taps_are_read_whole():
    params: dict[str, Any] = {"pattern": "dense-2", "flow_share": 0.3, "flow_lr": 0.1, "task_lr": 0.1}
    params |= {"weight_1_2": 2.0, "weight_10_11": 3.0, "length_11": 0.5}
    config = resolve(params, BASE)

    assert config.flow.pair_weights == ((1, 2, 2.0), (10, 11, 3.0))
    assert weights_of(config, 12)[10, 11] == 3.0
    assert weights_of(config, 12)[1, 2] == 2.0
    assert config.flow.stage_lengths == (*[1.0] * 10, 0.5)


def test_what_is_not_searched_comes_from_the_base():
    params = SearchSpace(4).start() | {"pattern": "dense-3"}
    base = RunConfig(
        data=BASE.data,
        flow=FlowConfig(norm="mean", clip_norm=2.0, rounds=3),
        hint=HintConfig(norm="sum"),
        task=TaskConfig(temperature=7.0, kd_weight=0.9, optimizer=OptimizerConfig(momentum=0.5, schedule="step")),
    )
    config = resolve(params, base)

    assert config.method == "dfkt"
    assert (config.data, config.teacher, config.student, config.train) == (
        base.data,
        base.teacher,
        base.student,
        base.train,
    )
    assert (config.flow.norm, config.flow.clip_norm, config.hint.norm) == ("mean", 2.0, "sum")
    assert config.task.kd_weight == 0.0  # no soft targets was sampled
    assert config.flow.rounds == 1  # searched
    assert config.task.optimizer == OptimizerConfig(momentum=0.5, schedule="step", lr=0.1)


def test_every_choice_is_reached():
    drawn = [params for params, _ in samples(SearchSpace(4), 300)]

    patterns = {"adjacent", "from-bottom", "to-top", "dense-2", "dense-3", "sliding-2", "sliding-3"}
    assert {params["pattern"] for params in drawn} == patterns
    assert {params.get("order") for params in drawn} == {*ORDERS, None}
    assert {params.get("rounds") for params in drawn} == {*range(1, MAX_ROUNDS + 1), None}
    assert {params.get("freeze_below") for params in drawn} == {True, False, None}


OTHERS = [method for method in METHODS if method != "dfkt"]


@pytest.mark.parametrize("method", OTHERS)
def test_the_other_methods_start_at_their_reference_settings(method):
    base = replace(BASE, method=method)
    assert resolve(SearchSpace(4, method=method).start(), base) == baseline(base, method)


@pytest.mark.parametrize("method", OTHERS)
def test_every_sample_of_every_method_is_a_run_with_the_tables_columns(method):
    space = SearchSpace(4, method=method)
    for params, trial in samples(space, 30):
        config = resolve(params, replace(BASE, method=method))
        assert sum(stage.epochs for stage in build_schedule(config, 4, (0, 1, 2, 3))) == pytest.approx(60)
        assert {name: type(value) for name, value in params.items()} == space.types()
        assert trial.params == params
        assert all(RANGES[name][0] <= value <= RANGES[name][1] for name, value in params.items())


@pytest.mark.parametrize("method", OTHERS)
def test_every_searched_setting_of_a_method_changes_its_schedule(method):
    base = replace(BASE, method=method)
    space = SearchSpace(4, method=method)
    start = build_schedule(resolve(space.start(), base), 4, (0, 1, 2, 3))
    for name in space.start():
        other = resolve(space.start() | {name: RANGES[name][0]}, base)
        assert build_schedule(other, 4, (0, 1, 2, 3)) != start, name


def test_a_sample_of_another_method_is_described_by_its_settings():
    assert describe_params(SearchSpace(4, method="kd").start()) == "task_lr 0.1, kd_weight 0.9, temperature 4"
